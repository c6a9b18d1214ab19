"""Checksums of the files of a folder, kept in one more file beside them."""

import json
import zlib
from pathlib import Path

from minilm_jax.errors import CheckpointError

CHECKSUMS = "checksums.json"
_PIECE = 1 << 18


def write_checksums(folder: Path) -> None:
    """Writes the CRC-32 of every file beneath the folder into its `checksums.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _crc32(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def check_files(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Reads the files again, and compares them with what `write_checksums` found.

    Args:
      folder: that was written.
      part: from 0; which share of the files, where several processes divide them.
      parts: how many shares there are.

    Raises:
      CheckpointError: a file, or the checksums themselves, are missing or not what was written.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name in sorted(sums)[part::parts]:
            if _crc32(folder / name) != sums[name]:
                raise CheckpointError(f"{name} has a wrong checksum")
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{CHECKSUMS} is damaged: {error}") from None


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found
