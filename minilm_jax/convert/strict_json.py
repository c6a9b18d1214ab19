"""JSON from a stranger: bounded in size, no duplicate keys, no NaN; errors name the file."""

import json
from pathlib import Path
from typing import Any

from minilm_jax.convert.files import refuse_disguise
from minilm_jax.errors import CheckpointError

# The largest honest file here is an index of a sharded model, well under a megabyte.
MAX_BYTES = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in the file `path`.

    Raises:
      CheckpointError: the file is missing, too large, or not one strict JSON object.
    """
    return parse_json(_read(path), name=str(path))


def read_json_list(path: Path) -> list[Any]:
    """Returns the list in the file `path`; otherwise as `read_json`."""
    value = _parse(_read(path), name=str(path))
    if not isinstance(value, list):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, expected a list")
    return value


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_BYTES:,} bytes, too large for JSON here")
    return raw


def parse_json(raw: bytes, *, name: str) -> dict[str, Any]:
    """Returns the object in `raw`; `name` is what errors call it."""
    value = _parse(raw, name=name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} holds a JSON {type(value).__name__}, expected an object")
    return value


def _parse(raw: bytes, *, name: str) -> Any:
    refuse_disguise(name, raw[:64])
    if raw.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(f"{name} starts with a byte order mark: save it as plain UTF-8")
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not valid JSON: {_short(error)}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r:.100} stands twice in one object")
            seen.add(key)
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _short(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"{error!s:.200}"
