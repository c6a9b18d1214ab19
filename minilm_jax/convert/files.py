"""A weight file as an index of tensors, each read alone: what the readers of every format return.

Nothing here trusts the file. An index is complete and checked against the file's size before the
first tensor is read, and a tensor is read from its own bytes, so memory is bounded by the largest
tensor and never by what a header claims.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from minilm_jax.errors import CheckpointError

# safetensors' names for element types. Everything else (F8, F4, complex, …) is refused by name.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
FLOATS = ("F64", "F32", "F16", "BF16")

# An encoder of 100 layers has 1,600 tensors; a header with more than this is an attack on our time.
MAX_TENSORS = 20_000
MAX_RANK = 8
MAX_NAME = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies in its file."""

    dtype: str
    """One of DTYPES."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the start of the file."""
    strides: tuple[int, ...] | None = None
    """Elements to step for each axis; None where the tensor is contiguous."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements, held once each."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def span(self) -> int:
        """Bytes of the file from its first to its last element."""
        if self.strides is None:
            return self.nbytes
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * DTYPES[self.dtype].itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    path: Path

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name in the file."""

    def read(self, name: str) -> np.ndarray:
        """Returns the tensor `name`, contiguous, in its stored dtype."""

    def close(self) -> None:
        """Lets go of the file, and refuses if it changed while it was read."""


class WeightFile:
    """An open weight file, and the index its format's reader found in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        self._before = os.fstat(self.file.fileno())
        self.size = self._before.st_size
        self.tensors: dict[str, Stored] = {}

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.file.close()

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Returns exactly `count` bytes from `offset`."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise CheckpointError(
                f"{self.path} is truncated: bytes {offset:,} to {offset + count:,} are needed, "
                f"the file has {self.size:,}"
            )
        self.file.seek(offset)
        found = self.file.read(count)
        if len(found) != count:
            raise CheckpointError(f"{self.path} became shorter while it was read")
        return found

    def read(self, name: str) -> np.ndarray:
        """Returns the tensor `name`, contiguous, in its stored dtype."""
        stored = self.tensors[name]
        buffer = np.empty(stored.span, np.uint8)
        self.file.seek(stored.offset)
        if self.file.readinto(buffer.data) != stored.span:
            raise CheckpointError(f"{self.path} became shorter while {name!r} was read")
        elements = buffer.view(DTYPES[stored.dtype])
        if stored.strides is None:
            return elements.reshape(stored.shape)
        steps = tuple(step * elements.itemsize for step in stored.strides)
        strided = np.lib.stride_tricks.as_strided(elements, stored.shape, steps, writeable=False)
        return np.require(strided, requirements="C")

    def close(self) -> None:
        """Closes the file; refuses when it is not the file that was opened."""
        after = os.fstat(self.file.fileno())
        self.file.close()
        if (after.st_size, after.st_mtime_ns) != (self._before.st_size, self._before.st_mtime_ns):
            raise CheckpointError(f"{self.path} changed while it was read: try again")


def open_indexed(path: Path, index: Callable[[WeightFile], dict[str, Stored]]) -> WeightFile:
    """Returns the open file with the place of every tensor, as `index` finds them."""
    file = WeightFile(path)
    try:
        refuse_disguise(path, file.bytes_at(0, min(64, file.size)))
        file.tensors = index(file)
    except BaseException:
        file.file.close()
        raise
    return file


# Called after each tensor with its name, the bytes done so far and the bytes in all.
OnTensor = Callable[[str, int, int], None]


def check_tensor(path: Path, name: str, *, dtype: str, shape: tuple[int, ...]) -> int:
    """Returns the bytes of a tensor so declared.

    Raises:
      CheckpointError: a dtype no converter reads, or a shape no tensor has.
    """
    if len(name) > MAX_NAME:
        raise CheckpointError(
            f"{path}: a tensor's name has {len(name):,} characters: {name[:80]!r}…"
        )
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r:.200} has dtype {dtype!r:.40}; "
            f"readable are {', '.join(DTYPES)}"
        )
    if len(shape) > MAX_RANK:
        raise CheckpointError(f"{path}: tensor {name!r:.200} has {len(shape)} axes")
    # Python integers do not overflow, so a product that does elsewhere is simply too large here.
    if any(type(n) is not int or not 0 < n < 2**40 for n in shape):
        raise CheckpointError(
            f"{path}: tensor {name!r:.200} has the impossible shape {shape!r:.200}"
        )
    return math.prod(shape) * DTYPES[dtype].itemsize


_DISGUISES = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull` in its repository"),
    (b"<!doctype", "an HTML page: the download failed; fetch the file again"),
    (b"<html", "an HTML page: the download failed; fetch the file again"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: no checkpoint is stored so"),
    (b"\xfd7zxz", "an xz archive: unpack it first"),
)


def refuse_disguise(path: Path | str, head: bytes) -> None:
    """Raises CheckpointError where `head` begins a well-known file of another kind."""
    start = head.lstrip()[:64].lower()
    for magic, what in _DISGUISES:
        if head.startswith(magic) or start.startswith(magic):
            raise CheckpointError(f"{path} does not match its name: it holds {what}")
