"""Torch's zip files written without torch, so that hostile ones can be written too."""

import zipfile
from pathlib import Path

import numpy as np

_CLASSES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage"}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str,
    count: int,
    *,
    offset: int = 0,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    storage: str = "FloatStorage",
    rebuild: str = "_rebuild_tensor_v2",
) -> bytes:
    """Returns the instructions that make one tensor."""
    return (
        name("torch._utils", rebuild)
        + b"(("
        + text("storage")
        + name("torch", storage)
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + name("collections", "OrderedDict")
        + b")RtR"
    )


def program(values: dict[str, bytes]) -> bytes:
    """Returns the pickle of a dict of such values."""
    return b"\x80\x02}(" + b"".join(text(k) + v for k, v in values.items()) + b"u."


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=int)) for axis in range(len(shape)))


def archive(
    path: Path,
    values: dict[str, bytes],
    storages: dict[str, bytes],
    *,
    extra: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """Writes a torch zip archive of these parts."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", program(values))
        file.writestr("archive/byteorder", b"little")
        for key, raw in storages.items():
            file.writestr(f"archive/data/{key}", raw)
        for other, raw in (extra or {}).items():
            file.writestr(other, raw)
    return path


def save(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Writes an honest state dict."""
    values, storages = {}, {}
    for index, (key, array) in enumerate(arrays.items()):
        values[key] = tensor(
            str(index),
            array.size,
            shape=array.shape,
            strides=contiguous(array.shape),
            storage=_CLASSES[str(array.dtype)],
        )
        storages[str(index)] = array.tobytes()
    return archive(path, values, storages)
