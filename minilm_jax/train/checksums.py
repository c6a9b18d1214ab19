"""Checksums of the files of a folder, kept in one more file beside them."""

import json
import zlib
from pathlib import Path

CHECKSUMS = "checksums.json"
_PIECE = 1 << 18


def write_checksums(folder: Path) -> None:
    """Writes the CRC-32 of every file beneath the folder into its `checksums.json`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _crc32(path) for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def find_damage(folder: Path, *, part: int = 0, parts: int = 1) -> str:
    """Returns which file is missing or not what `write_checksums` read; "" where there is none.

    Args:
      folder: that was written.
      part: from 0; which share of the files, where several processes divide them.
      parts: how many shares there are.

    Raises:
      OSError: a file that is there cannot be read: that is no proof of damage.
    """
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        for name in sorted(sums)[part::parts]:
            if _crc32(folder / name) != sums[name]:
                return f"{name} has a wrong checksum"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except ValueError as error:
        return f"{CHECKSUMS} is damaged: {error}"
    return ""


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found
