"""Where text comes from: files, folders and data sets, each read as a stream of documents."""

import dataclasses
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minilm_jax.data import readers
from minilm_jax.data.documents import Document
from minilm_jax.data.skipped import Skipped
from minilm_jax.errors import DataError
from minilm_jax.settings import Positive, Settings

Format = Literal[
    "auto", "text", "jsonl", "csv", "parquet", "arrow", "huggingface", "tfds", "machine-docs"
]

_ENDINGS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_MARKUP = frozenset({".md", ".markdown", ".rst"})
# Beside data these lie around as descriptions of it.
_NOT_DATA = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
_LARGEST_PART = 256 << 20
_SMALLEST_PART = 1 << 20


@dataclass(frozen=True)
class TextSource(Settings):
    """One kind of text and how to read it."""

    paths: tuple[str, ...] = ()
    """Files, folders (read recursively) or patterns such as
    `wiki/*.jsonl.zst`, where a file is read once however often links or
    paths lead to it; for format `tfds` names such as `lm1b` or prepared
    folders; none for `machine-docs`."""
    format: Format = "auto"
    """`auto` goes by the file name's ending; .gz, .bz2, .xz and .zst may follow it."""
    text_column: str = "text"
    """Column (JSON field, feature) that holds a document's text."""
    documents: Literal["auto", "blank-line", "line", "file"] = "auto"
    """What ends a document in a text file. auto: the end of the file in
    Markdown and reStructuredText, whose blank lines end paragraphs, and a
    blank line in plain text."""
    language: str = ""
    """Language code of every document that has no other."""
    language_from: Literal["setting", "column", "file", "folder"] = "setting"
    """Where a document's language stands: in `language`, in
    `language_column`, in the file's name up to the first dot
    (`en.txt.gz`), or in its folder's name (`en/part-1.txt`)."""
    language_column: str = "language"
    """Column that holds the language when `language_from` is `column`."""
    split: str = "train"
    """Split of a tfds or Hugging Face data set."""
    data_folder: str = ""
    """Folder with prepared tfds data sets; empty for tfds's own default."""
    broken_text: Literal["skip", "replace"] = "skip"
    """What happens to a document that is not UTF-8: skipped and counted, or
    the broken bytes become U+FFFD."""
    broken_files: Literal["stop", "keep"] = "stop"
    """What happens when a file breaks off (a truncated gzip): an error once
    everything else is prepared, or what could be read is kept and the
    break is counted."""
    longest_document: Positive = 64 << 20
    """Bytes; a longer document is skipped and counted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format == "machine-docs":
            if self.paths:
                raise DataError(
                    f"format machine-docs reads no file, but paths is {self.paths}: leave "
                    "them out, or choose format auto"
                )
        elif not self.paths:
            raise DataError(
                "a text source needs paths (files, folders or patterns), or format machine-docs"
            )

    def documents_of(self, path: str) -> Literal["blank-line", "line", "file"]:
        """Returns what ends a document in this text file."""
        if self.documents != "auto":
            return self.documents
        return "file" if _ending(path) in _MARKUP else "blank-line"


@dataclass(frozen=True)
class Stretch:
    """A piece of one file: bytes of a text file, row groups or records of a table."""

    path: str
    format: Format
    start: int = 0
    stop: int | None = None
    """None: to the end. Compressed files cannot be entered in the middle and have no other."""
    size: int = 0
    """Bytes or records: the weight of the stretch for progress and for cutting."""
    version: str = ""
    """Size and time of the file: a changed file is read anew."""


@dataclass(frozen=True)
class Part:
    """What one worker reads in one go; the parts of a source do not depend on the workers."""

    source: TextSource
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        """The sum of the sizes of the stretches."""
        return sum(stretch.size for stretch in self.stretches)

    @property
    def key(self) -> str:
        """A name that changes when anything that decides the documents changes."""
        # How a broken file is met does not change what was read before the break.
        source = {**dataclasses.asdict(self.source), "paths": (), "broken_files": ""}
        stretches = [dataclasses.asdict(stretch) for stretch in self.stretches]
        text = json.dumps([source, stretches], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_documents(source: TextSource, *, skipped: Skipped | None = None) -> Iterator[Document]:
    """Yields every document of the source in a fixed order.

    Args:
        source: What to read.
        skipped: What was left out; filled while reading.

    Raises:
        DataError: A path does not exist, a column is missing, a file is broken.
    """
    skipped = skipped or Skipped()
    for part in split_source(source, skipped=skipped):
        yield from read_part(part, skipped=skipped)


def read_part(part: Part, *, skipped: Skipped) -> Iterator[Document]:
    """Yields the documents of one part; what is left out is counted by reason in `skipped`."""
    counts = skipped.counts
    for stretch in part.stretches:
        found, before = False, counts.copy()
        try:
            for document in _read_stretch(part.source, stretch, counts):
                if not document.text.strip():
                    counts["empty"] += 1
                elif _is_longer(document.text, part.source.longest_document):
                    counts["too long"] += 1
                else:
                    found = True
                    yield document
        except readers.BrokenFileError as error:
            if part.source.broken_files == "stop":
                raise DataError(
                    f"{stretch.path}: {error}; {error.remedy}, or set broken_files to keep to go on"
                    " with what can be read"
                ) from error
            counts["broken file"] += 1
        # A language that is missing would not be missed otherwise.
        if not found and counts == before and stretch.stop is None:
            counts["no document in a file"] += 1
        for reason in counts - before:
            skipped.name(reason, [stretch.path])


def _is_longer(text: str, size: int) -> bool:
    # At most four bytes a character: most texts need no look.
    return 4 * len(text) > size and len(text.encode("utf-8", "surrogatepass")) > size


def split_source(source: TextSource, *, skipped: Skipped | None = None) -> list[Part]:
    """Returns the parts of the source: the same for any number of workers.

    Large text and table files are cut into many parts, small files are gathered in one. There
    are about 64 parts of at least 1 MiB and at most 256 MiB. Files in folders that hold no text by
    their endings are left out, and counted in `skipped`.
    """
    skipped = skipped or Skipped()
    if source.format == "machine-docs":
        return [Part(source, (Stretch("", "machine-docs", size=1),))]
    if source.format == "tfds":
        stretches = [s for name in source.paths for s in readers.tfds_stretches(source, name)]
    else:
        stretches = []
        for path, format in _files(source, skipped):
            if format == "text" and source.language_from == "column":
                raise DataError(
                    f"{path}: a text file has no column {source.language_column!r}; set"
                    " language_from to setting, file or folder, or name only files with columns"
                )
            stretches.append(_whole_file(path, format))
    total = sum(stretch.size for stretch in stretches)
    part_size = min(max(total // 64, _SMALLEST_PART), _LARGEST_PART)
    if source.format == "tfds":
        part_size = max(total // 64, 1)
    pieces = [piece for stretch in stretches for piece in _cut(source, stretch, part_size)]
    return _gather(source, pieces, part_size)


def _gather(source: TextSource, pieces: list[Stretch], part_size: int) -> list[Part]:
    parts: list[Part] = []
    gathered: list[Stretch] = []
    size = 0
    for piece in pieces:
        if gathered and size + piece.size > part_size:
            parts.append(Part(source, tuple(gathered)))
            gathered, size = [], 0
        gathered.append(piece)
        size += piece.size
    if gathered:
        parts.append(Part(source, tuple(gathered)))
    return parts


def _whole_file(path: Path, format: Format) -> Stretch:
    try:
        status = path.stat()
    except OSError as error:  # such as a link that leads nowhere
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); repair or remove it"
        ) from error
    version = f"{status.st_size}-{status.st_mtime_ns}"
    return Stretch(str(path), format, size=status.st_size, version=version)


def _cut(source: TextSource, stretch: Stretch, part_size: int) -> list[Stretch]:
    """Returns the pieces of a file that can be entered in the middle, or the file itself."""
    if stretch.size <= part_size:
        return [stretch]
    if stretch.format == "parquet":
        ends = readers.parquet_row_groups(stretch.path)
        part_size = max(1, part_size * ends // stretch.size)
    elif stretch.format == "tfds" or _is_lines(source, stretch):
        ends = stretch.size
    else:
        return [stretch]
    return [
        dataclasses.replace(
            stretch,
            start=start,
            stop=min(start + part_size, ends),
            size=stretch.size * (min(start + part_size, ends) - start) // ends,
        )
        for start in range(0, ends, part_size)
    ]


def _is_lines(source: TextSource, stretch: Stretch) -> bool:
    if readers.compression(stretch.path):
        return False
    whole_files = stretch.format == "text" and source.documents_of(stretch.path) == "file"
    return stretch.format in ("text", "jsonl") and not whole_files


def refuse_inside(source: TextSource, folder: Path) -> None:
    """Raises DataError where `folder` lies in a folder that is read, or would be one itself."""
    if source.format in ("machine-docs", "tfds"):
        return
    real = Path(os.path.realpath(folder))
    for pattern in source.paths:
        # What a pattern does not reach yet it reaches once it is there.
        whole = os.path.abspath(pattern)  # noqa: PTH100 - it has no links to follow
        if glob.has_magic(pattern) and any(path.match(whole) for path in (real, *real.parents)):
            raise DataError(
                f"{folder} matches {pattern}, so its files would be read as text the next time; "
                "give another folder for the output"
            )
    for path in (path for pattern in source.paths for path in _matches(pattern)):
        if path.is_dir() and real.is_relative_to(os.path.realpath(path)):
            raise DataError(
                f"{folder} lies in {path}, where its files would be read as text the next time; "
                "give another folder for the output"
            )


def _files(source: TextSource, skipped: Skipped) -> Iterator[tuple[Path, Format]]:
    """Yields each file once, where it is first reached."""
    reached: set[str] = set()
    unread: set[str] = set()
    for pattern in source.paths:
        found = _matches(pattern)
        if not found:
            raise DataError(f"{pattern}: no such file, folder or pattern; check paths")
        count = 0
        for path in found:
            named = path == Path(pattern)
            for file, format in _files_below(path, source, named=named, walked=set()):
                real = os.path.realpath(file)
                if format is None:
                    unread.add(real)
                    continue
                count += 1
                if real not in reached:
                    reached.add(real)
                    yield file, format
        if count == 0 and source.format not in ("auto", "huggingface"):
            raise DataError(
                f"{pattern}: no file ends as {source.format} does; name the file in full to have it"
                " read as that, or choose format auto"
            )
        if count == 0:
            raise DataError(
                f"{pattern}: no file with a known ending ({' '.join(_ENDINGS)}, also followed by"
                " .gz .bz2 .xz .zst); rename the files or set format"
            )
    left_out = [file for file in unread - reached if Path(file).name.lower() not in _NOT_DATA]
    if left_out:
        skipped.add("file of another kind", len(left_out), sorted(left_out))


def _matches(pattern: str) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    # Path.glob refuses absolute patterns.
    return [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207


def _files_below(
    path: Path, source: TextSource, *, named: bool, walked: set[str]
) -> Iterator[tuple[Path, Format | None]]:
    """Yields the files below `path` and how each is read; None is not at all."""
    if path.is_dir():
        # A link may lead to a folder again, even from within it.
        if (real := os.path.realpath(path)) in walked:
            return
        walked.add(real)
        if source.format in ("auto", "huggingface") and readers.is_huggingface(path):
            for file in readers.huggingface_files(path, source.split):
                yield file, "arrow"
            return
        for child in sorted(path.iterdir()):
            if not child.name.startswith("."):
                yield from _files_below(child, source, named=False, walked=walked)
        return
    format = _format_of(path)
    if source.format not in ("auto", "huggingface"):
        chosen = named or source.format == format or format is None
        format = source.format if chosen else None
    yield path, format


def _format_of(path: Path) -> Format | None:
    return None if path.name.lower() in _NOT_DATA else _ENDINGS.get(_ending(path))


def _ending(path: str | Path) -> str:
    """Returns the ending in lower case, the one before that of a compressed file."""
    name = Path(path).name.lower()
    return Path(name.removesuffix(readers.compression(name))).suffix


def _read_stretch(
    source: TextSource, stretch: Stretch, skipped: Counter[str]
) -> Iterator[Document]:
    if stretch.format == "machine-docs":
        # Here, because most sources have no use for it.
        from minilm_jax.data.machine_docs import machine_documents

        yield from machine_documents()
        return
    language = source.language
    if source.language_from == "file":
        language = Path(stretch.path).name.split(".")[0]
    elif source.language_from == "folder":
        language = Path(stretch.path).resolve().parent.name
    read = {
        "text": readers.read_text,
        "jsonl": readers.read_jsonl,
        "csv": readers.read_csv,
        "parquet": readers.read_parquet,
        "arrow": readers.read_arrow,
        "tfds": readers.read_tfds,
    }[stretch.format]
    for record in read(source, stretch, skipped):
        yield Document(record.text, language=record.language or language, origin=record.origin)
