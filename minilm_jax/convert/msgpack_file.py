"""flax_model.msgpack of Hugging Face's old Flax models, indexed without unpacking it.

The file is a tree of maps whose leaves are extension type 1: an array [shape, dtype name, bytes].
Only these kinds are read; the bytes stay in the file until their tensor is asked for. Names come
out as PyTorch's, so that one table serves both: `kernel` is the transposed `weight`.
"""

import math
from pathlib import Path
from typing import NoReturn

from minilm_jax.convert.files import (
    DTYPES,
    MAX_TENSORS,
    Stored,
    WeightFile,
    check_tensor,
    open_indexed,
)
from minilm_jax.errors import CheckpointError

_MAX_DEPTH = 32
_MAX_TEXT = 1000
_CODES = {dtype.name: code for code, dtype in DTYPES.items()}
_ARRAY = 1
_LAST = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def open_msgpack(path: Path) -> WeightFile:
    """Returns the open file with every tensor's place, under PyTorch's names.

    Raises:
      CheckpointError: the file is not exactly one tree of arrays.
    """
    return open_indexed(path, lambda file: _Walk(file).tree())


class _Walk:
    """Reads msgpack headers from front to back and steps over the tensors' bytes."""

    def __init__(self, file: WeightFile) -> None:
        self.file = file
        self.position = 0
        self.found: dict[str, Stored] = {}

    def tree(self) -> dict[str, Stored]:
        """Returns every array's place."""
        self._map(())
        if self.position != self.file.size:
            self._refuse(f"{self.file.size - self.position:,} bytes follow the tree")
        return self.found

    def _map(self, path: tuple[str, ...]) -> None:
        if len(path) > _MAX_DEPTH:
            self._refuse("the tree is nested too deeply")
        byte = self._number(1)
        if 0x80 <= byte <= 0x8F:
            count = byte - 0x80
        elif byte in (0xDE, 0xDF):
            count = self._number(2 if byte == 0xDE else 4)
        else:
            self._refuse(f"byte {byte:#x} where a map or an array is expected")
        seen: set[str] = set()
        for _ in range(count):
            key = self._text()
            if key in seen:
                self._refuse(f"{key!r:.200} stands twice in one map")
            seen.add(key)
            if key == "__msgpack_chunked_array__":
                self._refuse("an array larger than 1 GiB, stored in chunks, is not read")
            if self._peek() in (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
                self._array((*path, key))
            else:
                self._map((*path, key))

    def _array(self, path: tuple[str, ...]) -> None:
        byte = self._number(1)
        sizes = {0xC7: 1, 0xC8: 2, 0xC9: 4}
        size = self._number(sizes[byte]) if byte in sizes else 2 ** (byte - 0xD4)
        kind = self._number(1)
        end = self.position + size
        if kind != _ARRAY or end > self.file.size:
            self._refuse(f"{'.'.join(path)!r:.200} is no array, or cut off")
        if self._number(1) != 0x93:
            self._refuse(f"{'.'.join(path)!r:.200} is no [shape, dtype, bytes]")
        shape = tuple(self._integer() for _ in range(self._list()))
        dtype = self._text()
        length = self._bytes()
        name = _torch_name(path)
        code = _CODES.get(dtype, dtype)
        nbytes = check_tensor(self.file.path, name, dtype=code, shape=shape)
        if length != nbytes or self.position + length != end:
            self._refuse(f"{name!r:.200} of {dtype} {list(shape)} has {length:,} bytes")
        if name in self.found or len(self.found) >= MAX_TENSORS:
            self._refuse(f"{name!r:.200} stands twice, or there are too many tensors")
        self.found[name] = _stored(path, code, shape, self.position)
        self.position = end

    def _peek(self) -> int:
        return self.file.bytes_at(self.position, 1)[0]

    def _number(self, size: int) -> int:
        raw = self.file.bytes_at(self.position, size)
        self.position += size
        return int.from_bytes(raw, "big")

    def _text(self) -> str:
        byte = self._number(1)
        if 0xA0 <= byte <= 0xBF:
            length = byte - 0xA0
        elif byte in (0xD9, 0xDA, 0xDB):
            length = self._number({0xD9: 1, 0xDA: 2, 0xDB: 4}[byte])
        else:
            self._refuse(f"byte {byte:#x} where text is expected")
        if length > _MAX_TEXT:
            self._refuse(f"a name of {length:,} bytes")
        raw = self.file.bytes_at(self.position, length)
        self.position += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file.path}: a name is not UTF-8") from error

    def _list(self) -> int:
        byte = self._number(1)
        if not 0x90 <= byte <= 0x9F:
            self._refuse(f"byte {byte:#x} where a shape is expected")
        return byte - 0x90

    def _integer(self) -> int:
        byte = self._number(1)
        if byte <= 0x7F:
            return byte
        if byte not in (0xCC, 0xCD, 0xCE, 0xCF):
            self._refuse(f"byte {byte:#x} where an axis is expected")
        return self._number({0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}[byte])

    def _bytes(self) -> int:
        byte = self._number(1)
        if byte not in (0xC4, 0xC5, 0xC6):
            self._refuse(f"byte {byte:#x} where a tensor's bytes are expected")
        return self._number({0xC4: 1, 0xC5: 2, 0xC6: 4}[byte])

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self.file.path}: at byte {self.position:,}: {what}")


def _torch_name(path: tuple[str, ...]) -> str:
    names = path[1:] if path[0] == "params" else path
    return ".".join((*names[:-1], _LAST.get(names[-1], names[-1]))) if names else "params"


def _stored(path: tuple[str, ...], code: str, shape: tuple[int, ...], offset: int) -> Stored:
    if path[-1] == "kernel" and len(shape) == 2:
        # Flax's [in, out] is PyTorch's [out, in] with the steps exchanged.
        strides = (1, math.prod(shape[1:]))
        return Stored(dtype=code, shape=shape[::-1], offset=offset, strides=strides)
    return Stored(dtype=code, shape=shape, offset=offset)
