"""Writes the seeds of the corpus: one small honest file per feature of each format. Needs torch."""

import json
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import safetensors.numpy
import torch
from flax.serialization import msgpack_serialize

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    """Returns nothing; see the top of the file."""
    for name in ("safetensors", "torch", "pickle", "msgpack", "json"):
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
    small = np.arange(6, dtype=np.float32).reshape(2, 3)
    folder = CORPUS / "safetensors"
    safetensors.numpy.save_file({"a": small}, folder / "one")
    several = {"a": small, "b": small.astype(np.float16), "c": np.arange(3)}
    safetensors.numpy.save_file(several, folder / "several", metadata={"format": "pt"})
    (folder / "empty_header").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "lfs").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")

    folder = CORPUS / "torch"
    tensor = torch.tensor(small)
    states = {
        "one": {"a": tensor},
        "tied": {"a": tensor, "b": tensor},
        "transposed": {"a": tensor.T, "b": tensor[:, 1]},
        "kinds": {"a": tensor.bfloat16(), "b": torch.arange(3), "c": torch.nn.Parameter(tensor)},
    }
    for name, state in states.items():
        torch.save(state, folder / name)
    torch.save(states["kinds"], folder / "protocol4", pickle_protocol=4)
    torch.save(states["one"], folder / "legacy", _use_new_zipfile_serialization=False)
    torch.save({"a": tensor, "epoch": 3}, folder / "not_a_tensor")

    for path in folder.iterdir():
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (name,) = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                (CORPUS / "pickle" / path.name).write_bytes(archive.read(name))

    folder = CORPUS / "msgpack"
    tree = {"encoder": {"dense": {"kernel": small, "bias": small[0]}}, "norm": {"scale": small[1]}}
    (folder / "tree").write_bytes(msgpack_serialize(tree))
    (folder / "params").write_bytes(msgpack_serialize({"params": tree}))
    (folder / "plain").write_bytes(msgpack.packb({"a": 1, "b": [1, 2], "c": None}))

    folder = CORPUS / "json"
    config = {"model_type": "bert", "hidden_size": 16, "id2label": {"0": "a"}, "eps": 1e-12}
    (folder / "config").write_text(json.dumps(config))
    (folder / "index").write_text(json.dumps({"metadata": {}, "weight_map": {"a": "b"}}))
    (folder / "hostile").write_text('{"a": [[[[NaN, 1e999, "\\ud800"]]]], "a": null}')


if __name__ == "__main__":
    main()
