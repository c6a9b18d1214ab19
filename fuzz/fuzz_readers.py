"""Coverage-guided fuzzing of the file readers: whatever the bytes, tensors or a CheckpointError.

    python fuzz/fuzz_readers.py safetensors fuzz/corpus/safetensors -runs=1000000

Readers: safetensors, torch, pickle (data.pkl of a torch file, which the zip's checksum otherwise
hides from the fuzzer), msgpack, json. Needs `pip install atheris`. Any other exception, a
tensor larger than its file, or more than 2 GiB of memory is a finding; add its input to the corpus.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["minilm_jax.convert"]):
    from minilm_jax.convert.msgpack_file import open_msgpack
    from minilm_jax.convert.safetensors_file import open_safetensors
    from minilm_jax.convert.strict_json import parse_json
    from minilm_jax.convert.torch_file import open_torch, run_pickle
    from minilm_jax.errors import CheckpointError

OPENERS = {"safetensors": open_safetensors, "torch": open_torch, "msgpack": open_msgpack}
# Files older than the zip form are torch's to read; what we do without it is fuzzed here.
sys.modules["torch"] = None  # type: ignore[assignment]


def check_json(data: bytes) -> None:
    """Returns nothing; raises only what is a finding."""
    try:
        parse_json(data, name="fuzz")
    except CheckpointError:
        return


def check_pickle(data: bytes) -> None:
    """Returns nothing; raises only what is a finding."""
    try:
        run_pickle(Path("fuzz"), data)
    except CheckpointError:
        return


def check_file(reader: str, path: Path, data: bytes) -> None:
    """Returns nothing; raises only what is a finding."""
    path.write_bytes(data)
    try:
        file = OPENERS[reader](path)
    except CheckpointError:
        return
    total = 0
    for name, stored in file.tensors.items():
        array = file.read(name)
        assert array.shape == stored.shape and array.flags.c_contiguous, name
        assert array.nbytes <= len(data), f"{name}: {array.nbytes} of {len(data)} bytes"
        total += array.nbytes
    file.close()
    # Zip storages may be shared by tied tensors; elsewhere every byte belongs to one tensor.
    assert reader == "torch" or total <= len(data)


def main() -> None:
    """Returns nothing; see the top of the file."""
    reader = sys.argv.pop(1)
    if reader in ("json", "pickle"):
        check = check_json if reader == "json" else check_pickle
    else:
        folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        path = folder / f"fuzz{os.getpid()}"

        def check(data: bytes) -> None:
            check_file(reader, path, data)

    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
