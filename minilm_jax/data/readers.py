"""One reader a file format: each yields records and never holds more than one of them."""

import bz2
import csv
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from minilm_jax.data.documents import Document
from minilm_jax.errors import DataError, first_line

if TYPE_CHECKING:
    from minilm_jax.data.sources import Stretch, TextSource

_BLOCK = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LONGEST_CELL = 2**31 - 1


class BrokenFileError(Exception):
    """A file breaks off, or can be read no further; the documents before are good."""

    def __init__(self, what: str, *, remedy: str = "repair the file") -> None:
        super().__init__(what)
        self.remedy = remedy


def compression(path: str) -> str:
    """Returns the compression's ending of a file name, or ""."""
    suffix = Path(path).suffix.lower()
    return suffix if suffix in (".gz", ".bz2", ".xz", ".zst") else ""


# Text, JSON lines and comma-separated values


def read_text(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[Document]:
    """Yields the documents of a text file, of at most `source.longest_document` bytes."""
    ends = source.documents_of(stretch.path)
    gather = {"blank-line": _paragraphs, "line": _single_lines, "file": _whole}[ends]
    for position, raw in gather(source, stretch, skipped):
        text = _decode(raw, source, skipped)
        if text is not None:
            yield Document(text.strip(), origin=f"{stretch.path}:byte {position}")


def read_jsonl(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[Document]:
    """Yields one document an object; the file's first object must have the text column."""
    # Of the file, not of the stretch: a file is cut where it happens to be.
    beginning = dataclasses.replace(stretch, start=0, stop=_BLOCK)
    for _, _, record in itertools.islice(_objects(source, beginning, Counter()), 1):
        if source.text_column not in record:
            raise _missing_column(source.text_column, stretch.path, list(record))
    for position, line, record in _objects(source, stretch, skipped):
        text = record.get(source.text_column)
        if not isinstance(text, str):
            skipped["no text"] += 1
            continue
        if "\\u" in line:
            # Half of a surrogate pair is legal JSON and not Unicode.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield Document(
            text,
            language=_language(source, stretch, record),
            origin=f"{stretch.path}:byte {position}",
        )


def read_csv(source: "TextSource", stretch: "Stretch", skipped: Counter[str]) -> Iterator[Document]:
    """Yields one document a row; the first line names the columns.

    Quoting is RFC 4180's, and semicolons may stand for commas. In a .tsv, quotes are text.
    """
    tabs = stretch.path.lower().removesuffix(compression(stretch.path)).endswith(".tsv")
    # Python's own limit, of 128 KiB a cell, is less than many a document.
    csv.field_size_limit(_LONGEST_CELL)
    with _open(stretch.path) as file, _broken_file_errors(), _csv_errors():
        head = _without_mark(file.readline(_BLOCK)).decode("utf-8", "surrogateescape")
        divider = "\t" if tabs else max(",;\t", key=head.count)
        quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
        # What is not UTF-8 is left to each cell.
        rest = io.TextIOWrapper(
            cast(IO[bytes], file), "utf-8", errors="surrogateescape", newline=""
        )
        lines = itertools.chain([head], rest)
        rows = csv.reader(lines, delimiter=divider, quoting=quoting, strict=True)
        names = next(rows, [])
        _columns(source, stretch, names)
        for number, cells in enumerate(rows, start=2):
            if len(cells) != len(names):
                if cells:
                    skipped["row of another width"] += 1
                continue
            record = dict(zip(names, cells, strict=True))
            raw = record[source.text_column].encode("utf-8", "surrogateescape")
            text = _decode(raw, source, skipped)
            if text is not None:
                yield Document(
                    text,
                    language=_language(source, stretch, record),
                    origin=f"{stretch.path}:row {number}",
                )


@contextmanager
def _csv_errors() -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise BrokenFileError(
            f"is not CSV ({error})", remedy="put a cell with a quote in it in quotes"
        ) from error


def _objects(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (byte position, line, object); lines that are no object are counted."""
    for position, raw in _single_lines(source, stretch, skipped):
        line = _decode(raw, source, skipped)
        if line is None or not line.strip():
            continue
        if position == 0 and line.lstrip().startswith("["):
            raise BrokenFileError(
                "is one JSON array", remedy="write one object per line (jq -c '.[]' does)"
            )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield position, line, record
        else:
            skipped["broken json"] += 1


def _missing_column(
    column: str,
    path: str,
    columns: list[str],
    *,
    setting: Literal["text_column", "language_column"] = "text_column",
) -> DataError:
    there = ", ".join(sorted(columns)) or "none"
    return DataError(
        f"{path}: no column {column!r}; it has {there}: set {setting} of the source to one of them"
    )


def _language(source: "TextSource", stretch: "Stretch", record: dict[str, Any]) -> str:
    if source.language_from != "column":
        return ""
    if source.language_column not in record:
        raise _missing_column(
            source.language_column, stretch.path, list(record), setting="language_column"
        )
    return str(record[source.language_column] or "")


def _decode(raw: bytes | None, source: "TextSource", skipped: Counter[str]) -> str | None:
    if raw is None:
        skipped["too long"] += 1
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        if source.broken_text == "skip":
            skipped["broken utf-8"] += 1
            return None
        skipped["replaced utf-8"] += 1
        return raw.decode("utf-8", errors="replace")


def _single_lines(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines whose first byte lies in the stretch; None for one that is too long."""
    for position, line in _lines(stretch, longest=source.longest_document):
        if line is None or line.strip():
            yield position, line


def _whole(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[tuple[int, bytes | None]]:
    with _open(stretch.path) as file, _broken_file_errors():
        raw = _without_mark(file.read(source.longest_document + 1))
    if raw.strip():
        yield 0, raw if len(raw) <= source.longest_document else None


def _paragraphs(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[tuple[int, bytes | None]]:
    """Yields the runs of lines between blank lines.

    A document belongs to the stretch in which the first blank line before it begins, so that
    neighbouring stretches share every document of the file without loss.
    """
    # Past the stretch's end, up to the first blank line that begins there.
    lines = _lines(stretch, longest=source.longest_document, beyond=True)
    inside = stretch.start == 0
    gathered: list[bytes] = []
    size = 0
    begin = 0
    for position, line in lines:
        if line is not None and not line.strip():
            if gathered:
                yield begin, b"".join(gathered) if size <= source.longest_document else None
                gathered, size = [], 0
            inside = inside or position >= stretch.start
            if stretch.stop is not None and position >= stretch.stop:
                return
        elif inside:
            begin = begin if gathered else position
            size += source.longest_document + 1 if line is None else len(line)
            if size > source.longest_document:
                gathered = [b""]  # marks an over-long document without keeping its text
            else:
                gathered.append(line or b"")
    if gathered:
        yield begin, b"".join(gathered) if size <= source.longest_document else None


def _lines(
    stretch: "Stretch", *, longest: int, beyond: bool = False
) -> Iterator[tuple[int, bytes | None]]:
    """Yields (byte position, line) of lines that begin in the stretch, or `beyond` its end too.

    A line of more than `longest` bytes is never held: None stands for it.
    """
    with _open(stretch.path) as file, _broken_file_errors():
        position = stretch.start
        if position:
            # A line that began before belongs to the stretch before.
            file.seek(position - 1)
            position += _skip_line(file) - 1
        while beyond or stretch.stop is None or position < stretch.stop:
            line = file.readline(longest + 1)
            if not line:
                return
            length = len(line)
            too_long = length > longest and not line.endswith(b"\n")
            if too_long:
                length += _skip_line(file)
            if position == 0:
                line = _without_mark(line)
            yield position, None if too_long else line
            position += length


def _without_mark(beginning: bytes) -> bytes:
    """Returns the beginning of a file without UTF-8's byte order mark; UTF-16's is refused."""
    if beginning[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise BrokenFileError("is UTF-16", remedy="convert it to UTF-8 (iconv does)")
    return beginning.removeprefix(_BYTE_ORDER_MARK)


def _skip_line(file: io.BufferedIOBase) -> int:
    skipped = 0
    while block := file.readline(_BLOCK):
        skipped += len(block)
        if block.endswith(b"\n"):
            break
    return skipped


def _open(path: str) -> io.BufferedIOBase:
    compressed = compression(path)
    try:
        # Even no text has a header; Python's gzip takes a file without a byte for whole.
        if compressed and not Path(path).stat().st_size:
            raise BrokenFileError("the compressed data is broken (the file is empty)")
        match compressed:
            case ".gz":
                return gzip.open(path)
            case ".bz2":
                return bz2.open(path)
            case ".xz":
                return lzma.open(path)
            case ".zst":
                return io.BufferedReader(_ZstdFile(path), _BLOCK)
            case _:
                return io.BufferedReader(io.FileIO(path), _BLOCK)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _broken_file_errors() -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise BrokenFileError(f"the compressed data is broken ({error})") from error
    except OSError as error:
        raise BrokenFileError(f"reading failed ({error})") from error


class _ZstdFile(io.RawIOBase):
    """Reads zstandard frames; unlike zstandard's own reader it notices a file that breaks off."""

    _file: Any = None  # closing happens even where opening failed

    def __init__(self, path: str) -> None:
        self._module = _import("zstandard", path)
        self._file = Path(path).open("rb")  # noqa: SIM115 — closed with this file
        self._frame: Any = None
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            # A few bytes can stand for a block of 128 KiB: this much inflates to 128 MiB at most.
            block = self._file.read(1 << 12)
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._rest = memoryview(self._decompress(block))
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def _decompress(self, block: bytes) -> bytes:
        out = []
        while block:
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor().decompressobj()
            try:
                out.append(self._frame.decompress(block))
            except self._module.ZstdError as error:
                raise EOFError(str(error)) from error
            block = b""
            if self._frame.eof:
                block, self._frame = self._frame.unused_data, None
        return b"".join(out)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


# Tables


def parquet_row_groups(path: str) -> int:
    """Returns the number of row groups: a parquet file can be entered at each."""
    parquet = _import("pyarrow.parquet", path)
    with _table_errors(path):
        return parquet.ParquetFile(path).num_row_groups


def read_parquet(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[Document]:
    """Yields one document a row, one record batch at a time."""
    parquet = _import("pyarrow.parquet", stretch.path)
    with _table_errors(stretch.path), parquet.ParquetFile(stretch.path) as file:
        columns = _columns(source, stretch, file.schema_arrow.names)
        stop = file.num_row_groups if stretch.stop is None else stretch.stop
        groups = list(range(stretch.start, stop))
        batches = file.iter_batches(batch_size=1024, row_groups=groups, columns=columns)
        yield from _table_documents(batches, source, stretch, skipped)


def read_arrow(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[Document]:
    """Yields one document a row of an Arrow stream (what `datasets` saves) or Arrow file."""
    arrow = _import("pyarrow", stretch.path)
    ipc = _import("pyarrow.ipc", stretch.path)
    with _table_errors(stretch.path), arrow.memory_map(stretch.path) as file:
        if file.read(6) == b"ARROW1":
            reader = ipc.open_file(stretch.path)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            reader = ipc.open_stream(file)
            batches = iter(reader)
        columns = _columns(source, stretch, reader.schema.names)
        chosen = (batch.select(columns) for batch in batches)
        yield from _table_documents(chosen, source, stretch, skipped)


def _columns(source: "TextSource", stretch: "Stretch", names: list[str]) -> list[str]:
    wanted: dict[Literal["text_column", "language_column"], str]
    wanted = {"text_column": source.text_column}
    if source.language_from == "column":
        wanted["language_column"] = source.language_column
    for setting, column in wanted.items():
        if column not in names:
            raise _missing_column(column, stretch.path, names, setting=setting)
    return list(wanted.values())


def _table_documents(
    batches: Iterator[Any], source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[Document]:
    row = 0
    for batch in batches:
        columns = batch.to_pydict()
        languages = columns.get(source.language_column, [None] * batch.num_rows)
        for text, language in zip(columns[source.text_column], languages, strict=True):
            row += 1
            if isinstance(text, bytes):
                text = _decode(text, source, skipped)
                if text is None:
                    continue
            if text is not None and not isinstance(text, str):
                raise DataError(
                    f"{stretch.path}: column {source.text_column!r} holds"
                    f" {type(text).__name__}, not text; set text_column to another"
                )
            if text is None:
                skipped["no text"] += 1
                continue
            given = str(language or "") if source.language_from == "column" else ""
            yield Document(text, language=given, origin=f"{stretch.path}:row {row}")


@contextmanager
def _table_errors(path: str) -> Iterator[None]:
    arrow = _import("pyarrow", path)
    try:
        yield
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"a row is not UTF-8 ({error})") from error
    except (arrow.ArrowException, OSError) as error:
        raise BrokenFileError(f"the table is broken ({first_line(error)})") from error


def is_huggingface(folder: Path) -> bool:
    """Tells whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def huggingface_files(folder: Path, split: str) -> list[Path]:
    """Returns the Arrow files, in order, of a folder that `datasets.save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8")).get("splits", [])
        if split not in splits:
            raise DataError(
                f"{folder}: no split {split!r}; it has {', '.join(splits)}: set split to one"
            )
        folder = folder / split
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: state.json is missing or broken; save the data set again"
        ) from error
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: missing, though state.json lists it; copy the folder again")
    return files


# tensorflow-datasets, read by random access through array_record


def tfds_stretches(source: "TextSource", name: str) -> list["Stretch"]:
    """Returns one stretch for a data set's split: its records are numbered."""
    from minilm_jax.data.sources import Stretch

    builder = _tfds_builder(source, name)
    if source.split not in builder.info.splits:
        there = ", ".join(builder.info.splits) or "none (not prepared)"
        raise DataError(f"{name}: no split {source.split!r}; it has {there}: set split to one")
    count = builder.info.splits[source.split].num_examples
    if source.text_column not in builder.info.features:
        raise _missing_column(source.text_column, name, list(builder.info.features))
    version = str(builder.info.full_name)
    return [Stretch(name, "tfds", 0, count, size=count, version=version)]


def read_tfds(
    source: "TextSource", stretch: "Stretch", skipped: Counter[str]
) -> Iterator[Document]:
    """Yields one document a record; TensorFlow is not needed, the files must be array_record."""
    builder = _tfds_builder(source, stretch.path)
    try:
        data = builder.as_data_source(split=source.split)
    except Exception as error:
        raise DataError(
            f"{stretch.path}: cannot be read without TensorFlow ({error}); prepare it with"
            " file_format='array_record'"
        ) from error
    stop = len(data) if stretch.stop is None else stretch.stop
    for first in range(stretch.start, stop, 256):
        rows = list(range(first, min(first + 256, stop)))
        for row, record in zip(rows, data.__getitems__(rows), strict=True):
            text = record[source.text_column]
            if isinstance(text, bytes):
                text = _decode(text, source, skipped)
                if text is None:
                    continue
            yield Document(
                str(text),
                language=_language(source, stretch, record),
                origin=f"{stretch.path}:record {row}",
            )


def _tfds_builder(source: "TextSource", name: str) -> Any:
    tfds = _import("tensorflow_datasets", name)
    try:
        if Path(name).is_dir():
            return tfds.builder_from_directory(name)
        # Without these, names such as wikipedia, c4 or squad are unknown.
        _import("tensorflow_datasets.text", name)
        _import("tensorflow_datasets.question_answering", name)
        return tfds.builder(name, data_dir=source.data_folder or None)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{name}: tensorflow-datasets cannot open it ({first_line(error)})"
        ) from error


def _import(module: str, path: str) -> ModuleType:
    """Returns a module of the optional extra, so that plain text needs none of them."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{path}: needs {module.split('.')[0]}; install it: pip install 'minilm_jax[corpora]'"
        ) from error
