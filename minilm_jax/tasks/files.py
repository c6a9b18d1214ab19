"""Text files read strictly: UTF-8 or an error with file and line, tabs that mean columns."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minilm_jax.errors import DataError
from minilm_jax.tasks.examples import Skips

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = 2**31 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")


class Row(NamedTuple):
    """One line of a table, by column name."""

    origin: str
    values: dict[str, str]


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields ("file:line", text) of each line.

    Lines end at a line feed and nowhere else: Unicode's other line separators do occur inside
    sentences of XNLI.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file{listed_beside(path)}")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
                if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path}:1: is UTF-16; convert the file to UTF-8")
            yield f"{path}:{number}", decode(raw, f"{path}:{number}").rstrip("\r\n")


def listed_beside(path: Path) -> str:
    """Returns "; beside it there is …" of a file that is not there: those that end alike first."""
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    files = sorted((p.suffix != path.suffix, p.name) for p in there if not p.name.startswith("."))
    names = [name for _, name in files]
    return f"; beside it there is {', '.join(names[:8])}" if names else ""


def decode(raw: bytes, origin: str) -> str:
    """Returns UTF-8 text; DataError at `origin` where it is something else."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8; the file"
            " or a part of it has another encoding: convert it to UTF-8"
        ) from None


def read_tsv(
    path: Path,
    *,
    needs: Sequence[str],
    names: Sequence[str] | None = None,
    ragged: Literal["refuse", "skip"] = "refuse",
    skips: Skips | None = None,
) -> Iterator[Row]:
    """Yields the rows of a tab-separated file without quoting, as all official ones are.

    Args:
      path: the file.
      needs: columns that must be there.
      names: the columns of a file without a header line; None takes them from its first line.
      ragged: whether a row of another width is an error, or is skipped as the official readers
        of QQP do.
      skips: where skipped rows are counted.
    """
    lines = read_lines(path)
    if names is None:
        names = _first_line(path).split("\t")
        _check_header(path, names, needs)
        next(lines)
    for origin, line in lines:
        cells = line.split("\t")
        if len(cells) != len(names):
            if not line.strip():
                continue
            if ragged == "refuse":
                raise DataError(
                    f"{origin}: {len(cells)} columns instead of {len(names)}"
                    f" ({', '.join(names)}); a tab is missing, or a tab or a line end stands"
                    " inside a text"
                )
            if skips is not None:
                skips.add(f"{len(cells)} columns instead of {len(names)}", origin)
            continue
        yield Row(origin, dict(zip(names, cells, strict=True)))


def read_csv(path: Path, *, needs: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a file of comma-separated values with a header line.

    Quoting is RFC 4180's, as spreadsheets and pandas write it: a quoted cell may hold commas, line
    feeds and doubled quotes. Semicolons or tabs divide the columns where the header has them
    instead, as spreadsheets write where the comma divides decimals.

    Args:
      path: the file.
      needs: columns that must be there.
    """
    header = _first_line(path)
    # Python's own limit, of 128 KiB a cell, is less than many a document.
    csv.field_size_limit(_LONGEST_CELL)
    divider = max(",;\t", key=header.count)
    lines = (f"{line}\n" for _, line in read_lines(path))
    reader = csv.reader(lines, strict=True, delimiter=divider)
    names: list[str] | None = None
    while True:
        at = f"{path}:{reader.line_num + 1}"  # where the row begins; a cell may hold line feeds
        try:
            cells = next(reader, None)
        except csv.Error as error:
            why = "a quote that opens in this row is not closed, or stands inside a cell"
            raise DataError(f"{at}: is not CSV ({error}): {why}") from None
        if cells is None:
            return
        if names is None:
            names = cells
            _check_header(path, names, needs)
        elif len(cells) == len(names):
            yield Row(at, dict(zip(names, cells, strict=True)))
        elif "".join(cells).strip():
            raise DataError(
                f"{at}: {len(cells)} columns instead of {len(names)} ({', '.join(names)}); a cell"
                f" with a {divider!r} or a quote in it stands in quotes"
            )


def _first_line(path: Path) -> str:
    """Returns the line that names the columns; DataError where it does not."""
    line = next((line for _, line in read_lines(path)), None)
    if line is None:
        raise DataError(f"{path}: is empty")
    if "\r" in line:
        raise DataError(
            f"{path}:1: lines end in a carriage return alone; convert them to line feeds"
        )
    if not line.strip():
        raise DataError(f"{path}:1: is empty, where the names of the columns belong")
    return line


def _check_header(path: Path, names: Sequence[str], needs: Sequence[str]) -> None:
    """Raises DataError where a column that must be there is not, or one is there twice."""
    missing = [name for name in needs if name not in names]
    if missing:
        raise DataError(
            f"{path}:1: no column {', '.join(map(repr, missing))}; it has"
            f" {', '.join(f'{name!r:.60}' for name in names)}: rename the column that it is; else"
            " the first line names no columns, or the file belongs to another task or split"
        )
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise DataError(f"{path}:1: column {twice[0]!r} occurs twice; remove or rename one")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file:line", object) of each line that is not blank."""
    for origin, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{origin}: is not JSON ({error}); expected one object per line"
            ) from None
        if not isinstance(value, dict):
            raise DataError(f"{origin}: is a {type(value).__name__}; expected one object per line")
        _check_characters(line, value, origin)
        yield origin, value


def read_json(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: is a {type(value).__name__}, not an object; is it SQuAD's format?"
        )
    _check_characters(text, value, str(path))
    return value


def _check_characters(text: str, value: Any, origin: str) -> None:
    """Raises DataError where JSON's escapes spell half of a surrogate pair, which is no text."""
    if "\\u" not in text:
        return  # UTF-8 itself has none
    said = json.dumps(value, ensure_ascii=False)
    found = _SURROGATE.search(said)
    if found:
        near = said[max(found.start() - 20, 0) : found.end() + 20]
        raise DataError(
            f"{origin}: {near!a} contains half of a surrogate pair; write the full character or"
            " remove it"
        )
