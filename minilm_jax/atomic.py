"""Files that are there whole or not at all, whenever a process is killed or a disk fills up."""

import os
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Returns where a file is written before it takes its name."""
    # The process number: a worker that outlives a killed run must not write into our file.
    return path.with_name(f"{path.name}.{os.getpid()}.unfinished")


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until it is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a file, text as UTF-8, beside its place and then renames it."""
    beside = unfinished(path)
    try:
        write_synced(beside, data.encode() if isinstance(data, str) else data)
        beside.rename(path)
    finally:
        beside.unlink(missing_ok=True)
