"""A checkpoint's weights, in one file or in shards, whatever their format."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilm_jax.convert.files import Stored, TensorSource
from minilm_jax.convert.msgpack_file import open_msgpack
from minilm_jax.convert.safetensors_file import open_safetensors
from minilm_jax.convert.strict_json import read_json
from minilm_jax.convert.torch_file import open_torch
from minilm_jax.errors import CheckpointError

# In this order: where a folder holds several forms of one model, the safest is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
)
_TORCH = (".bin", ".pt", ".pth", ".ckpt")
_SUFFIXES = (".safetensors", *_TORCH, ".msgpack")
# What a trainer leaves beside weights.
_BESIDE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)")
_FOREIGN = {
    "tf_model.h5": "TensorFlow's: transformers before 5 reads it (from_tf=True) and saves it anew",
    "model.jaxexport": "an exported function, which is not read back: name what it was made of",
}
_TRAINING = "_CHECKPOINT_METADATA"  # Orbax's, of a step
MAX_SHARDS = 1000
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Open weight files, seen as one set of named tensors."""

    path: Path
    """The file, or the index of the shards."""
    owners: dict[str, TensorSource]
    """The file each tensor is in."""
    fingerprint: str

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, kind: object, error: object, at: object) -> None:
        for source in dict.fromkeys(self.owners.values()):
            source.close()

    def stored(self, name: str) -> Stored:
        """Returns where the tensor `name` lies in its file."""
        return self.owners[name].tensors[name]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape."""
        return {name: source.tensors[name].shape for name, source in self.owners.items()}


def find_weights(folder: Path) -> Path:
    """Returns the weight file of `folder`, or the index of its shards."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    raise CheckpointError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}{instead(folder)}")


def instead(folder: Path) -> str:
    """Returns what to name instead of `folder`, which holds no model; nothing if nothing helps."""
    if not folder.is_dir():
        return ""
    for form, way_out in _FOREIGN.items():
        if (folder / form).exists():
            return f"; {form} is {way_out}"
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    # A sweep's folder has them one deeper, in its runs.
    places = [f"{deep}/{name}" for deep in ("[!.]*", "[!.]*/[!.]*") for name in WEIGHT_FILES]
    holders = {file.parent for place in places for file in folder.glob(place)}
    for kind, found in (
        ("folders", sorted(str(holder.relative_to(folder)) for holder in holders)),
        ("files", [p.name for p in inside if p.suffix in _SUFFIXES and not _BESIDE.match(p.name)]),
    ):
        if found:
            return f"; name one of its {kind} instead: {', '.join(found[:5])}"
    states = [f"{deep}{_TRAINING}" for deep in ("", "[0-9]*/", "*/[0-9]*/")]
    if any(True for name in states for _ in folder.glob(name)):
        return (
            "; it holds training states, each with all that a run goes on with: name the folder "
            "student/ or best/ that the run writes beside them"
        )
    return ""


def open_weights(path: Path, *, sha256: str | None = None) -> Weights:
    """Returns the weights in `path`, a weight file or an index, every header checked.

    Args:
      path: the file.
      sha256: what the fingerprint must be; it is compared before any header is parsed.

    Raises:
      CheckpointError: a file is missing, broken, outside the folder, or not the one asked for.
    """
    index = read_json(path) if path.name.endswith(".index.json") else None
    files = {path.name: path} if index is None else _shards(path, index)
    digests = {name: _sha256(file) for name, file in sorted(files.items())}
    fingerprint = digests[path.name] if index is None else _combine(digests)
    if sha256 is not None and sha256.lower() != fingerprint:
        raise CheckpointError(
            f"{path} has SHA-256 {fingerprint}, expected {sha256}: it is not the file you meant"
        )
    owners: dict[str, TensorSource] = {}
    opened: list[TensorSource] = []
    try:
        for file in files.values():
            source = open_file(file)
            opened.append(source)
            for name in source.tensors:
                if name in owners:
                    raise CheckpointError(
                        f"tensor {name!r} is in two shards: {owners[name].path} and {file}"
                    )
                owners[name] = source
        if index is not None:
            _check_index(path, index, owners)
    except BaseException:
        for source in opened:
            source.close()
        raise
    return Weights(path=path, owners=owners, fingerprint=fingerprint)


def open_file(path: Path) -> TensorSource:
    """Returns one open weight file, by the reader its name asks for."""
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in _TORCH:
        return open_torch(path)
    if path.suffix == ".msgpack":
        return open_msgpack(path)
    raise CheckpointError(f"{path} is none of {', '.join(_SUFFIXES)}")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _combine(digests: dict[str, str]) -> str:
    lines = "".join(f"{name} {digest}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    if not all(isinstance(file, str) for file in mapping.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    return mapping


def _shards(path: Path, index: Mapping[str, Any]) -> dict[str, Path]:
    names = sorted(set(_weight_map(path, index).values()))
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{path}: {len(names):,} shards; at most {MAX_SHARDS:,} are read")
    folder = path.parent.resolve()
    # A snapshot of the Hub's cache links to its blobs; nothing else may lead out of the folder.
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    files = {}
    for name in names:
        if not _SHARD_NAME.fullmatch(name) or name.endswith(".index.json"):
            raise CheckpointError(
                f"{path}: weight_map names {name!r:.200}, which is no plain file name"
            )
        file = path.parent / name
        if not file.exists():
            raise CheckpointError(f"{path}: shard {name} is missing from {path.parent}")
        if file.resolve().parent not in allowed:
            raise CheckpointError(
                f"{path}: shard {name} leads out of the folder to {file.resolve()}"
            )
        files[name] = file
    return files


def _check_index(path: Path, index: Mapping[str, Any], owners: Mapping[str, TensorSource]) -> None:
    mapping = _weight_map(path, index)
    problems = [
        f"{name} is not in {file}"
        for name, file in mapping.items()
        if name not in owners or owners[name].path.name != file
    ]
    problems += [f"{name} is in a shard but not listed" for name in owners if name not in mapping]
    if problems:
        shown = "; ".join(problems[:10])
        raise CheckpointError(f"{path} and its shards disagree ({len(problems)}): {shown}")
    total = index.get("metadata") or {}
    claimed = total.get("total_size") if isinstance(total, dict) else None
    # Tied tensors are counted once or twice, depending on who wrote the index.
    actual = sum(source.tensors[name].nbytes for name, source in owners.items())
    if claimed is not None and (type(claimed) not in (int, float) or claimed < actual):
        raise CheckpointError(
            f"{path}: total_size={claimed!r:.40}, but the listed tensors have {actual:,} bytes"
        )
