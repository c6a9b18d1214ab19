"""Peak memory of converting a checkpoint as large as XLM-R large (560M parameters).

    python benchmarks/convert_memory.py [--folder /some/disk/with/7/GB]

Writes a synthetic XLM-R-large (random bytes of its exact shapes), converts it in a process of its
own, and prints that process's peak resident memory as a ratio of the tensors' bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.convert.matching import write_names
from minilm_jax.convert.model import flatten
from minilm_jax.convert.safetensors_file import write_safetensors

CONFIG = {
    "model_type": "xlm-roberta",
    "architectures": ["XLMRobertaModel"],
    "vocab_size": 250002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}


def write_source(folder: Path) -> int:
    """Returns the bytes of the tensors written to `folder`."""
    import jax
    import jax.numpy as jnp

    from minilm_jax.convert.hf_config import from_hf_config
    from minilm_jax.encoder.encoder import Encoder
    from minilm_jax.encoder.heads import Pooler

    config = from_hf_config(CONFIG, name="XLM-R large")
    tokens = jnp.ones((1, 4), jnp.int32)
    key = jax.random.key(0)
    encoder = jax.eval_shape(lambda k: Encoder(config).init(k, tokens, segments=tokens), key)
    hidden = jnp.zeros((1, 4, 1024))
    pooler = jax.eval_shape(lambda k: Pooler(config).init(k, hidden), key)
    params = {"encoder": encoder["params"], "pooler": pooler["params"]}
    _, matches = write_names({p: leaf.shape for p, leaf in flatten(params).items()}, config=config)
    shapes = {match.foreign: match.shape for match in matches}

    def read(name: str) -> np.ndarray:
        rng = np.random.default_rng(len(name))
        return rng.standard_normal(shapes[name], np.float32) * np.float32(0.02)

    folder.mkdir()
    write_safetensors(
        folder / "model.safetensors", [(n, "F32", s) for n, s in shapes.items()], read=read
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


def convert(source: str, target: str, dtype: Any) -> None:
    """Returns nothing; converts, and prints peak memory before and after in KiB."""
    from minilm_jax.jobs.convert import ConvertConfig, run

    before = peak()
    run(ConvertConfig(source=source, target=Path(target), tokenizer="none", dtype=dtype))
    print(before, peak())


def peak() -> int:
    """Returns this process's largest resident memory so far in KiB (Linux)."""
    # getrusage would report the parent's, which a child inherits.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Returns nothing; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--convert", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(*arguments.convert)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        nbytes = write_source(Path(scratch) / "source")
        for dtype in ("float32", "float16"):
            started = time.monotonic()
            command = [sys.executable, __file__, "--convert", f"{scratch}/source"]
            done = subprocess.run(
                [*command, f"{scratch}/{dtype}", dtype],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            before, after = (int(n) * 1024 for n in done.stdout.split()[-2:])
            print(
                f"to {dtype}: tensors {nbytes / 1e9:.3f} GB, peak {after / 1e9:.3f} GB "
                f"({after / nbytes:.2f} of the tensors; {before / 1e9:.3f} GB before reading), "
                f"{time.monotonic() - started:.0f} s"
            )


if __name__ == "__main__":
    main()
