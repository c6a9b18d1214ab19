"""The safetensors format (github.com/huggingface/safetensors), read and written by our own checks.

A file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape,
data_offsets}}`, and the tensors' bytes back to back. The reader accepts exactly that: no gap, no
overlap, no byte left over, so that two parsers cannot see two different models. The writer takes
one tensor at a time, where the library's wants all of them in memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.convert.files import (
    DTYPES,
    MAX_TENSORS,
    Stored,
    WeightFile,
    check_tensor,
    open_indexed,
)
from minilm_jax.convert.strict_json import parse_json
from minilm_jax.errors import CheckpointError

# The format allows 100 MB; an encoder of 100 layers needs 200 kB, and parsing takes memory.
MAX_HEADER = 4 * 2**20
_PIECE = 2**24
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> WeightFile:
    """Returns the open file with every tensor's place.

    Raises:
      CheckpointError: the file is not exactly one valid safetensors file.
    """
    return open_indexed(path, _index)


def _index(file: WeightFile) -> dict[str, Stored]:
    path = file.path
    if file.size < 8:
        raise CheckpointError(f"{path} has {file.size} bytes: no safetensors file is so short")
    length = int.from_bytes(file.bytes_at(0, 8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} declares a header of {length:,} bytes; at most {MAX_HEADER:,} are read"
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path} declares a header of {length:,} bytes but has only {file.size:,} in all"
        )
    raw = file.bytes_at(8, length)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not start with '{{'")
    header = parse_json(raw, name=f"{path} (header)")
    _check_metadata(path, header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        raise CheckpointError(
            f"{path} names {len(header):,} tensors; at most {MAX_TENSORS:,} are read"
        )
    found = {}
    for name, entry in header.items():
        found[name] = _entry(path, name, entry, start=8 + length)
    _check_tiling(file, found, start=8 + length)
    return found


def _check_metadata(path: Path, metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")


def _entry(path: Path, name: str, entry: Any, *, start: int) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: tensor {name!r:.200} needs exactly dtype, shape and data_offsets"
        )
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(shape, list) or not isinstance(dtype, str):
        raise CheckpointError(f"{path}: tensor {name!r:.200} has no proper dtype and shape")
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)
    ):
        raise CheckpointError(f"{path}: tensor {name!r:.200} has data_offsets {offsets!r:.80}")
    nbytes = check_tensor(path, name, dtype=dtype, shape=tuple(shape))
    begin, end = offsets
    if not 0 <= begin <= end or end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r:.200} of {dtype} {shape} needs {nbytes:,} bytes, "
            f"but data_offsets are {offsets}"
        )
    return Stored(dtype=dtype, shape=tuple(shape), offset=start + begin)


def _check_tiling(file: WeightFile, tensors: Mapping[str, Stored], *, start: int) -> None:
    position = start
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
        if stored.offset != position:
            kind = "overlaps its neighbour" if stored.offset < position else "leaves a gap"
            raise CheckpointError(f"{file.path}: tensor {name!r:.200} {kind} in data_offsets")
        position += stored.nbytes
    if position > file.size:
        raise CheckpointError(
            f"{file.path} is truncated: its header promises {position:,} bytes, "
            f"the file has {file.size:,}"
        )
    if position < file.size:
        raise CheckpointError(
            f"{file.path} has {file.size - position:,} bytes that belong to no tensor"
        )


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes tensors, (name, dtype, shape) triples, asking `read` for one array at a time.

    The file is read back and compared byte for byte: a library bug has written transposed arrays
    wrong without a word before (safetensors 0.8.0, issue 825).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, position = [], 0
    for name, dtype, shape in tensors:
        nbytes = check_tensor(path, name, dtype=dtype, shape=shape)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        names.append(name)
        position += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("xb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            file.write(_wire(path, name, read(name), header[name]).data)
        file.flush()
        os.fsync(file.fileno())
    with open_safetensors(path) as written:
        for name in names:
            wire = _wire(path, name, read(name), header[name])
            if not _is_in_file(written, written.tensors[name].offset, wire):
                raise CheckpointError(
                    f"{path}: tensor {name!r} reads back differently: a broken disk?"
                )


def _is_in_file(file: WeightFile, offset: int, wire: np.ndarray) -> bool:
    # In pieces: a vocabulary of 250,000 is a gigabyte.
    for start in range(0, wire.size, _PIECE):
        piece = wire[start : start + _PIECE]
        if file.bytes_at(offset + start, piece.size) != piece.tobytes():
            return False
    return True


def _wire(path: Path, name: str, array: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    # The dtype and shape were promised in the header before the array existed.
    if _NAMES.get(array.dtype) != entry["dtype"] or list(array.shape) != entry["shape"]:
        raise CheckpointError(
            f"{path}: tensor {name!r} is {array.dtype} {array.shape}, promised was {entry}"
        )
    return np.require(array, requirements="C").reshape(-1).view(np.uint8)
