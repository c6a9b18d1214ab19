"""pytorch_model.bin, read without torch and without executing anything.

Since torch 1.6 such a file is a zip archive: `data.pkl`, a pickle that names tensors, and one
uncompressed entry per storage. A pickle is a program; here it is run by a machine of our own that
knows only the instructions a state dict needs, calls nothing, and turns every call the program asks
for into a plain record. Older files are left to torch's own restricted loader.
"""

import dataclasses
import io
import math
import pickletools
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from minilm_jax.convert.files import (
    DTYPES,
    MAX_TENSORS,
    Stored,
    TensorSource,
    WeightFile,
    check_tensor,
    open_indexed,
)
from minilm_jax.errors import CheckpointError, first_line

_MAX_PICKLE = 8 * 2**20
_MAX_OPERATIONS = 2_000_000
_MAX_DIRECTORY = 16 * 2**20
_MAX_TUPLE = 64
# What torch < 1.6 starts a file with: protocol 2 and its magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

_STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


def open_torch(path: Path) -> TensorSource:
    """Returns the open .bin file with every tensor's place.

    Raises:
      CheckpointError: it is no state dict of dense tensors, is damaged, asks for code, or is older
        than torch 1.6 and torch ≥ 2.10 is not installed.
    """
    with WeightFile(path) as file:
        head = file.bytes_at(0, min(len(_LEGACY_MAGIC), file.size))
    return _LegacyFile(path) if head == _LEGACY_MAGIC else open_indexed(path, _index)


# The zip archive


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    offset: int
    size: int
    crc: int


def _index(file: WeightFile) -> dict[str, Stored]:
    if file.bytes_at(0, min(4, file.size)) != b"PK\x03\x04":
        raise CheckpointError(f"{file.path} is neither a zip archive nor an older torch file")
    entries = _directory(file)
    root = _root(file.path, entries)
    if entries[f"{root}data.pkl"].size > _MAX_PICKLE:
        raise CheckpointError(f"{file.path}: data.pkl is larger than {_MAX_PICKLE:,} bytes")
    _check_sum(file, f"{root}data.pkl", entries[f"{root}data.pkl"])
    order = entries.get(f"{root}byteorder")
    if order is not None and file.bytes_at(order.offset, min(order.size, 16)) != b"little":
        raise CheckpointError(f"{file.path}: written on a big-endian machine, which is not read")
    pickled = entries[f"{root}data.pkl"]
    tensors = run_pickle(file.path, file.bytes_at(pickled.offset, pickled.size))
    found: dict[str, Stored] = {}
    checked: set[str] = set()
    for name, value in tensors.items():
        entry = entries.get(f"{root}data/{value.storage.key}")
        if entry is None:
            raise CheckpointError(
                f"{file.path}: tensor {name!r:.200} lies in data/{value.storage.key}, "
                f"which the archive lacks"
            )
        found[name] = _place(file.path, name, value, entry)
        if value.storage.key not in checked:
            checked.add(value.storage.key)
            _check_sum(file, f"data/{value.storage.key}", entry)
    return found


def _directory(file: WeightFile) -> dict[str, _Entry]:
    path = file.path
    # torch writes no comment, so the end record is the last 22 bytes; anything behind it would let
    # two parsers see two archives.
    end = file.bytes_at(max(0, file.size - 22), min(22, file.size))
    if not end.startswith(b"PK\x05\x06"):
        raise CheckpointError(f"{path}: the zip archive is truncated or has bytes behind its end")
    count, size = int.from_bytes(end[10:12], "little"), int.from_bytes(end[12:16], "little")
    if count > MAX_TENSORS + 100 or size > _MAX_DIRECTORY:
        raise CheckpointError(f"{path}: the archive has {count:,} entries; too many to be a model")
    try:
        file.file.seek(0)
        with zipfile.ZipFile(file.file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, OverflowError) as error:
        raise CheckpointError(f"{path}: the zip archive is broken: {error}") from error
    entries: dict[str, _Entry] = {}
    folded: set[str] = set()
    for info in infos:
        name = info.filename
        if name.lower() in folded:
            raise CheckpointError(f"{path}: the archive holds {name!r:.200} twice (case ignored)")
        folded.add(name.lower())
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name:
            raise CheckpointError(f"{path}: the archive holds {name!r:.200}, which leads out of it")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"{path}: {name!r:.200} is compressed; torch never does that")
        # Bit 3: sizes follow the data; bit 11: the name is UTF-8. torch sets both, nothing else.
        if info.flag_bits & ~0x808:
            raise CheckpointError(f"{path}: {name!r:.200} has zip flags {info.flag_bits:#x}")
        entries[name] = _Entry(offset=_data_offset(file, info), size=info.file_size, crc=info.CRC)
    _refuse_overlap(file, entries)
    return entries


def _data_offset(file: WeightFile, info: zipfile.ZipInfo) -> int:
    header = file.bytes_at(info.header_offset, 30)
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    name = file.bytes_at(info.header_offset + 30, name_length)
    if header[:4] != b"PK\x03\x04" or name != info.orig_filename.encode("utf-8", "replace"):
        raise CheckpointError(
            f"{file.path}: {info.filename!r:.200} has another name in its own header"
        )
    return info.header_offset + 30 + name_length + extra_length


def _refuse_overlap(file: WeightFile, entries: dict[str, _Entry]) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset < position or entry.offset + entry.size > file.size:
            raise CheckpointError(f"{file.path}: {name!r:.200} overlaps another entry or the end")
        position = entry.offset + entry.size


def _root(path: Path, entries: dict[str, _Entry]) -> str:
    names = list(entries)
    if any(n.endswith(("/constants.pkl", "/archive_format")) or "/code/" in n for n in names):
        raise CheckpointError(f"{path} is a TorchScript or exported program, not a state dict")
    roots = [n[: -len("data.pkl")] for n in names if n.split("/")[-1].lower() == "data.pkl"]
    if (
        len(roots) != 1
        or not re.fullmatch(r"[^/]+/", roots[0])
        or roots[0] + "data.pkl" not in names
    ):
        raise CheckpointError(f"{path}: a torch archive has exactly one <name>/data.pkl")
    return roots[0]


def _check_sum(file: WeightFile, name: str, entry: _Entry) -> None:
    # torch checks it too; reading by offset would not.
    crc, position = 0, entry.offset
    while position < entry.offset + entry.size:
        block = file.bytes_at(position, min(2**20, entry.offset + entry.size - position))
        crc = zlib.crc32(block, crc)
        position += len(block)
    if crc != entry.crc:
        raise CheckpointError(f"{file.path}: {name} is damaged: its checksum does not fit")


# The pickle


def run_pickle(path: Path, program: bytes) -> dict[str, "_Tensor"]:
    """Returns the state dict that the pickle `program` describes; `path` is for errors.

    Raises:
      CheckpointError: it describes anything else, or asks for code.
    """
    return _named_tensors(path, _Machine(path).run(program))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Storage:
    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


class _Mark:
    """A place on the machine's stack."""


_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER = "torch._utils._rebuild_parameter"


class _Machine:
    """Runs the pickle of a state dict; every other instruction or name is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        """Returns what the program builds, made of dicts, tuples, numbers, text and tensors."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(program))):
                if count > _MAX_OPERATIONS:
                    raise CheckpointError(f"{self.path}: data.pkl is too long to be a state dict")
                if opcode.name == "STOP":
                    (result,) = self.stack
                    return result
                self._step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: data.pkl is broken: {error!s:.200}") from error
        raise CheckpointError(f"{self.path}: data.pkl ends without a result")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINFLOAT":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                stack.append(_Mark())
            case "TUPLE":
                stack.append(_flat_tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                if len(stack) < size:
                    raise IndexError("a tuple of more values than there are")
                stack[-size:] = [_flat_tuple(stack[-size:])]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self._global(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not isinstance(attribute, str) or not isinstance(module, str):
                    raise TypeError("a name that is no text")
                stack.append(self._global(f"{module}.{attribute}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set(key, value)
            case "SETITEMS":
                values = self._since_mark()
                for key, value in zip(values[::2], values[1::2], strict=True):
                    self._set(key, value)
            case "APPEND" | "APPENDS":
                values = self._since_mark() if name == "APPENDS" else [stack.pop()]
                if not isinstance(stack[-1], list):
                    raise TypeError("a value is appended to what is no list")
                stack[-1].extend(values)
            case "BUILD":
                # Sets attributes (a state dict's _metadata); nothing here has any use for them.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise TypeError("attributes are set on what is no dict")
            case _:
                raise CheckpointError(
                    f"{self.path}: data.pkl uses the instruction {name}, which no state dict needs"
                )

    def _since_mark(self) -> list[Any]:
        values: list[Any] = []
        while not isinstance(self.stack[-1], _Mark):
            values.append(self.stack.pop())
        self.stack.pop()
        return values[::-1]

    def _set(self, key: Any, value: Any) -> None:
        # An optimizer's state, which is refused by its name later, has numbers for keys.
        if type(key) not in (str, int) or not isinstance(self.stack[-1], dict):
            raise TypeError("a dict with other keys than names and numbers")
        if key in self.stack[-1]:
            raise ValueError(f"{key!r:.200} stands twice")
        self.stack[-1][key] = value

    def _global(self, name: str) -> _Global:
        module, _, attribute = name.rpartition(".")
        if name not in (_ORDERED_DICT, _PARAMETER, *_TENSOR) and not (
            module == "torch" and attribute in _STORAGES
        ):
            raise CheckpointError(
                f"{self.path}: data.pkl asks for {name!r:.200}, which is no plain tensor; "
                f"nothing was executed. Save model.state_dict() of dense tensors instead"
            )
        return _Global(name)

    def _storage(self, reference: Any) -> _Storage:
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, _Global) or type(count) is not int:
            raise ValueError("a reference to something that is no storage")
        if not isinstance(key, str):
            # Its text could be exponentially long: lists nest through the memo.
            raise TypeError(f"a storage named by a {type(key).__name__}")
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise ValueError(f"a storage named {key!r:.80}")
        return _Storage(dtype=_STORAGES[storage.name.rpartition(".")[2]], key=key, count=count)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no function")
        if function.name == _ORDERED_DICT and arguments == ():
            return {}
        if function.name == _PARAMETER:
            if not isinstance(arguments[0], _Tensor):
                raise TypeError("a parameter that is no tensor")
            return arguments[0]
        if function.name in _TENSOR:
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, _Storage):
                raise TypeError("a tensor of what is no storage")
            if not isinstance(shape, tuple) or not isinstance(strides, tuple):
                raise TypeError("a shape or strides that are no tuple")
            if any(type(n) is not int for n in (offset, *shape, *strides)):
                raise TypeError("an offset, a shape or strides that are no whole numbers")
            return _Tensor(storage=storage, offset=offset, shape=shape, strides=strides)
        raise ValueError(f"a call of {function.name} with {len(arguments)} arguments")


def _flat_tuple(values: list[Any]) -> tuple[Any, ...]:
    """Returns the values as a tuple, which holds tuples at most one level deep.

    A call's arguments hold shapes and strides, and those hold numbers. A program of 200 bytes can
    nest tuples through the memo so that whatever walks them takes hours.
    """
    if len(values) > _MAX_TUPLE:
        raise ValueError(f"a tuple of {len(values):,} values")
    if any(isinstance(value, tuple) and tuple in map(type, value) for value in values):
        raise ValueError("tuples nested more deeply than in any state dict")
    return tuple(values)


def _named_tensors(path: Path, state: Any) -> dict[str, _Tensor]:
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict")
    if len(state) > MAX_TENSORS:
        raise CheckpointError(f"{path} names {len(state):,} tensors; at most {MAX_TENSORS:,}")
    _refuse_what_is_no_tensor(path, state, _Tensor)
    return state


def _refuse_what_is_no_tensor(path: Path, state: dict[Any, Any], tensor: type) -> None:
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, tensor):
            continue
        # Trainers save the model's tensors as one value among others.
        inner = [
            key
            for key, held in state.items()
            if isinstance(held, dict) and held and all(isinstance(v, tensor) for v in held.values())
        ]
        raise CheckpointError(
            f"{path}: {name!r:.200} is a {type(value).__name__}, not a tensor; "
            + (
                f"save only the value of {inner[0]!r:.80}"
                if inner
                else "save only model.state_dict()"
            )
        )


def _place(path: Path, name: str, tensor: _Tensor, entry: _Entry) -> Stored:
    storage = tensor.storage
    nbytes = check_tensor(path, name, dtype=storage.dtype, shape=tensor.shape)
    itemsize = nbytes // max(1, math.prod(tensor.shape))
    where = f"{path}: tensor {name!r:.200} {list(tensor.shape)}"
    if storage.count * itemsize != entry.size:
        raise CheckpointError(f"{where}: its storage has {entry.size:,} bytes, not {storage.count}")
    if len(tensor.strides) != len(tensor.shape) or min((tensor.offset, *tensor.strides)) < 0:
        raise CheckpointError(f"{where} has impossible strides {tensor.strides!r:.80}")
    stored = Stored(
        dtype=storage.dtype,
        shape=tensor.shape,
        offset=entry.offset + tensor.offset * itemsize,
        strides=None if tensor.strides == _contiguous(tensor.shape) else tensor.strides,
    )
    # Strides of 0 could make terabytes of four bytes.
    if tensor.offset * itemsize + stored.span > entry.size or nbytes > entry.size:
        raise CheckpointError(f"{where} reaches beyond its storage of {entry.size:,} bytes")
    return stored


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# Files older than the zip form


class _LegacyFile:
    """A file of torch < 1.6, loaded whole by torch's restricted unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays = _load_legacy(path)
        names = {dtype: name for name, dtype in DTYPES.items()}
        self.tensors: dict[str, Stored] = {}
        for name, array in self._arrays.items():
            dtype = names.get(array.dtype, str(array.dtype))
            check_tensor(path, name, dtype=dtype, shape=array.shape)
            self.tensors[name] = Stored(dtype=dtype, shape=array.shape, offset=len(self.tensors))

    def read(self, name: str) -> np.ndarray:
        """Returns the tensor `name`, contiguous, in its stored dtype."""
        return np.require(self._arrays[name], requirements="C")

    def close(self) -> None:
        """Lets go of the tensors."""
        self._arrays = {}


def _load_legacy(path: Path) -> dict[str, np.ndarray]:
    way_out = f"{path} was written by torch < 1.6; reading it needs torch ≥ 2.10"
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{way_out}: pip install 'minilm_jax[torch]'") from error
    # Before, weights_only could be tricked into executing code (CVE-2025-32434, CVE-2026-24747).
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise CheckpointError(f"{way_out}, installed is {torch.__version__}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises bare ones
        raise CheckpointError(f"{path}: torch refuses it: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a state dict")
    _refuse_what_is_no_tensor(path, state, torch.Tensor)
    arrays = {}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name!r:.200} is no dense tensor")
        if tensor.dtype == torch.bfloat16:
            bits = tensor.detach().contiguous().view(torch.int16).numpy()
            arrays[name] = bits.view(ml_dtypes.bfloat16)
        else:
            arrays[name] = tensor.detach().numpy()
    return arrays
