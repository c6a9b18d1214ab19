"""Output folders: written beside, renamed at the end, and never over somebody's work."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm_jax import __version__
from minilm_jax.convert.strict_json import read_json
from minilm_jax.errors import CheckpointError

# Written into every folder, so that a later run knows its own output from somebody's work.
MANIFEST = "minilm_jax.json"


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Returns nothing; writes `value` the same way every time."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_manifest(folder: Path, *, source: str, sha256: str) -> None:
    """Returns nothing; writes what is in `folder`, so that a later run knows its own output."""
    files = {
        str(file.relative_to(folder)): _digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    write_json(
        folder / MANIFEST,
        {
            "written_by": f"minilm_jax {__version__}",
            "source": source,
            "source_sha256": sha256,
            "files": files,
        },
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_own_output(folder: Path) -> bool:
    """Returns whether `folder` is what this package wrote, to the byte, and nothing else."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        files = read_json(folder / MANIFEST).get("files")
    except CheckpointError:
        return False
    there = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} - {MANIFEST}
    return (
        isinstance(files, dict)
        and there == set(files)
        and all(_digest(folder / name) == digest for name, digest in files.items())
    )


def _clear_up(target: Path) -> None:
    """Returns nothing; undoes what killed writes of `target` left half done beside it."""
    ours = re.compile(rf"\.{re.escape(target.name)}\.(partial|old)-\d+")
    for left in target.parent.iterdir() if target.parent.is_dir() else ():
        match = ours.fullmatch(left.name)
        if match and match[1] == "old" and not target.exists():
            left.rename(target)
        elif match:
            shutil.rmtree(left)


def replace_folder(
    target: Path, fill: Callable[[Path], None], *, source: Path | None = None
) -> Path:
    """Returns `target` after `fill` wrote a folder beside it that was then renamed to it.

    A write that fails leaves the old state. So does one that is killed, but for the instant between
    its two renames: the old folder then lies beside as `.NAME.old-…`, and the next write puts it
    back before anything else. What killed writes left beside the target is removed.

    Raises:
      CheckpointError: `target` holds something that this package did not write, or is the source.
    """
    if source is not None and target.resolve() == source.resolve():
        raise CheckpointError(f"{target} is the source itself: choose another target")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        _clear_up(target)
        empty = target.is_dir() and not any(target.iterdir())
        if target.exists() and not empty and not (target.is_dir() and is_own_output(target)):
            raise CheckpointError(
                f"{target} exists and is no untouched output of ours: choose another"
            )
        partial.mkdir(parents=True)
        fill(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    return target
