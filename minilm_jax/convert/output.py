"""Output folders: written beside, renamed at the end, and never over somebody's work."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minilm_jax import __version__
from minilm_jax.convert.strict_json import read_json
from minilm_jax.errors import CheckpointError

# Written into every folder, so that a later run knows its own output from somebody's work.
MANIFEST = "minilm_jax.json"


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes `value` the same way every time."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_manifest(folder: Path, *, source: str, sha256: str) -> None:
    """Writes down what is in `folder`, so that a later run knows its own output."""
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


def replace_folder(
    target: Path, fill: Callable[[Path], None], *, source: Path | None = None
) -> Path:
    """Returns `target` after `fill` wrote a folder beside it that was then renamed to it.

    Where `target` is a link, the folder that it leads to is replaced and the link stays.

    A write that fails leaves the old state. So does one that is killed, but for the instant between
    its two renames: the old folder then lies beside as `.NAME.old-…`, and the next write on the
    same host puts it back before anything else. What killed writes left beside the target is
    removed; writes that run at the same time leave each other alone, and the last one stays.

    Raises:
      CheckpointError: `target` holds something that this package did not write, is the source, or
        holds the current directory.
    """
    with _ONE_AT_A_TIME:
        folder = check_target(target, source=source)
        with _unwritable(target):
            _write_and_rename(folder, fill)
    return target


_ONE_AT_A_TIME = threading.RLock()
"""Threads of this process would take each other's unfinished folders for those of a killed one."""


def check_target(target: Path, *, source: Path | None = None) -> Path:
    """Returns the folder that `replace_folder` would replace, or raises as it does.

    For whoever has gigabytes to read before there is anything to write.
    """
    with _ONE_AT_A_TIME, _unwritable(target):
        folder = _real(target)
        if source is not None and folder == _real(source):
            raise CheckpointError(f"{target} is the source itself: choose another target")
        if Path.cwd().is_relative_to(folder):
            raise CheckpointError(
                f"{target} holds the current directory, which would be replaced: "
                "choose another target, or run from elsewhere"
            )
        _clear_up(folder)
        _refuse_work_of_others(folder)
    return folder


@contextlib.contextmanager
def _unwritable(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error


def _real(path: Path) -> Path:
    # Not Path.resolve, which raises a RuntimeError where links lead in a circle.
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} cannot be a folder: {error}") from error


def _refuse_work_of_others(folder: Path) -> None:
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not is_own_output(folder):
        raise CheckpointError(
            f"{folder} exists and is no unmodified output of this command: choose another"
        )


def _write_and_rename(folder: Path, fill: Callable[[Path], None]) -> None:
    mine = f"{socket.gethostname()}-{os.getpid()}"
    partial = folder.with_name(f".{folder.name}.partial-{mine}")
    old = folder.with_name(f".{folder.name}.old-{mine}")
    try:
        partial.mkdir(parents=True)
        fill(partial)
        _refuse_work_of_others(folder)  # Again: filling took its time.
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _clear_up(folder: Path) -> None:
    """Undoes what killed writes of `folder` left half done beside it.

    Storage may be shared: only this host's processes are known to be dead.
    """
    host = re.escape(socket.gethostname())
    ours = re.compile(rf"\.{re.escape(folder.name)}\.(partial|old)-{host}-(\d{{1,9}})")
    for left in folder.parent.iterdir() if folder.parent.is_dir() else ():
        match = ours.fullmatch(left.name)
        if match is None or _is_running(int(match[2])):
            continue
        if match[1] == "old" and not folder.exists():
            left.rename(folder)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # Numbers come again: this process has not yet written anything.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # Another user's.
    return True
