"""The token corpus on disk: written once by `prepare`, read by memory map.

A folder holds `manifest.json`, the tokenizer's files under `tokenizer/`, and for each split
(`train`, `heldout`) shards of three raw little-endian files: `.tokens` (uint16 where the
vocabulary fits, else uint32) without special tokens, `.offsets` (int64, one more than documents)
and `.languages` (uint16 index into the shard's own list). The manifest is written last: a folder
without one is unfinished.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minilm_jax import atomic
from minilm_jax.data.skipped import Skipped
from minilm_jax.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
"""Written last: a corpus that has it is finished."""
Split = Literal["train", "heldout"]
Verify = Literal["auto", "hashes", "sizes"]
_VERIFIED_BY_DEFAULT = 2 << 30
_ENDINGS = ("tokens", "offsets", "languages")
# Memory maps hold a file descriptor each, and 1,024 is a usual limit.
_OPEN_SHARDS = 512


@dataclass(frozen=True)
class Shard:
    """One shard of one split."""

    name: str
    documents: int
    tokens: int
    languages: tuple[str, ...]
    """The codes that the numbers in the `.languages` file stand for."""
    hashes: dict[str, str]
    """SHA-256 of each of the three files, by ending."""


@dataclass(frozen=True)
class Manifest:
    """What a finished corpus says of itself."""

    dtype: Literal["uint16", "uint32"]
    tokenizer_fingerprint: str
    tokenizer_kind: str
    vocab_size: int
    splits: dict[str, tuple[Shard, ...]]
    skipped: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    skipped_files: dict[str, list[str]] = field(default_factory=dict)
    """The first files that they were left out of, by reason."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the corpus was prepared with; another run on the folder must have the same."""
    format: int = FORMAT

    @property
    def documents(self) -> int:
        """Number of documents in all splits."""
        return sum(shard.documents for shards in self.splits.values() for shard in shards)

    @property
    def tokens(self) -> int:
        """Number of tokens in all splits, without special tokens."""
        return sum(shard.tokens for shards in self.splits.values() for shard in shards)

    def left_out(self) -> Skipped:
        """Returns what the text had that the corpus has not."""
        return Skipped(Counter(self.skipped), self.skipped_files)

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def read_manifest(folder: str | Path) -> Manifest:
    """Returns the manifest of a corpus folder.

    Raises:
        DataError: The folder is none, is unfinished, or of a format this version does not know.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if not Path(folder).exists():
            reason = "does not exist"
        elif (Path(folder) / "settings.json").is_file():
            reason = "is unfinished: run the same prepare command again"
        else:
            reason = "is not a prepared corpus (no manifest.json): make one with minilm-jax prepare"
        raise DataError(f"{folder}: {reason}")
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise DataError(
                f"{path}: has format {content['format']}, this version reads {FORMAT};"
                " prepare the corpus again"
            )
        splits = {
            split: tuple(shard_from_json(shard) for shard in shards)
            for split, shards in content.pop("splits").items()
        }
        return Manifest(splits=splits, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error}); prepare the corpus again") from error


def shard_from_json(content: dict[str, Any]) -> Shard:
    """Returns a shard from its entry in a JSON file."""
    return Shard(**{**content, "languages": tuple(content["languages"])})


class Corpus:
    """One split of a prepared corpus, memory-mapped; safe to share between threads."""

    def __init__(self, folder: Path, split: str, manifest: Manifest) -> None:
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self._shards = manifest.splits.get(split, ())
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._maps: dict[int, np.ndarray] = {}
        self._offsets = [np.fromfile(self._path(shard, "offsets"), "<i8") for shard in self._shards]
        counts = [shard.documents for shard in self._shards]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        for shard, offsets in zip(self._shards, self._offsets, strict=True):
            if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) < 0).any():
                raise _damaged(self._path(shard, "offsets"))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        split: Split = "train",
        verify: Verify = "auto",
    ) -> "Corpus":
        """Returns a split of a prepared corpus.

        Args:
            folder: What `prepare` wrote.
            split: `train` or `heldout`; the latter is empty unless asked for.
            verify: `hashes` reads every byte and compares SHA-256, `sizes` compares file sizes,
                `auto` takes hashes up to 2 GiB.

        Raises:
            DataError: Unfinished, of another format, or a file is missing, cut or changed.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        shards = manifest.splits.get(split, ())
        width = np.dtype(manifest.dtype).itemsize
        size = sum(shard.tokens for shard in shards) * width
        for shard in shards:
            expected = {
                "tokens": shard.tokens * width,
                "offsets": (shard.documents + 1) * 8,
                "languages": shard.documents * 2,
            }
            for ending in _ENDINGS:
                path = folder / split / f"{shard.name}.{ending}"
                if not path.is_file() or path.stat().st_size != expected[ending]:
                    raise _damaged(path)
                if verify == "hashes" or (verify == "auto" and size <= _VERIFIED_BY_DEFAULT):
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != shard.hashes[ending]:
                        raise _damaged(path)
        return cls(folder, split, manifest)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the split, without special tokens."""
        return sum(shard.tokens for shard in self._shards)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._offsets)])

    @property
    def languages(self) -> tuple[str, ...]:
        """The language codes that occur, sorted; "" for documents without one."""
        return tuple(sorted({code for shard in self._shards for code in shard.languages}))

    @property
    def document_languages(self) -> np.ndarray:
        """Index into `languages` of each document, uint16 [documents]."""
        index = {code: i for i, code in enumerate(self.languages)}
        parts = [np.zeros(0, np.uint16)]
        for shard in self._shards:
            table = np.asarray([index[code] for code in shard.languages], np.uint16)
            parts.append(table[np.fromfile(self._path(shard, "languages"), "<u2")])
        return np.concatenate(parts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents: the tokenizer and every shard, in order."""
        content = [self.manifest.tokenizer_fingerprint, self.split]
        content += [shard.hashes[ending] for shard in self._shards for ending in _ENDINGS]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def document(self, index: int) -> np.ndarray:
        """Returns the tokens of a document, without special tokens; a view, not a copy."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        shards, starts = self.locate(np.asarray([index]))
        end = self._offsets[shards[0]][index - self._first[shards[0]] + 1]
        return self.tokens(int(shards[0]))[starts[0] : end]

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the shard and the first token in it of each document, int64 [n] each."""
        shards = np.searchsorted(self._first, documents, side="right") - 1
        inside = documents - self._first[shards]
        starts = np.empty(len(documents), np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            starts[chosen] = self._offsets[shard][inside[chosen]]
        return shards, starts

    def tokens(self, shard: int) -> np.ndarray:
        """Returns all tokens of a shard, memory-mapped."""
        mapped = self._maps.get(shard)
        if mapped is None:
            path = self._path(self._shards[shard], "tokens")
            if self._shards[shard].tokens == 0:
                mapped = np.zeros(0, self._dtype)
            else:
                mapped = np.memmap(path, self._dtype, mode="r").view(np.ndarray)
            while len(self._maps) >= _OPEN_SHARDS:
                self._maps.pop(next(iter(self._maps)), None)
            self._maps[shard] = mapped
        return mapped

    def _path(self, shard: Shard, ending: str) -> Path:
        return self.folder / self.split / f"{shard.name}.{ending}"


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path}: is missing or not what prepare wrote; copy it again, or delete it together with"
        " manifest.json and run prepare again, which makes only what is missing"
    )


class ShardWriter:
    """Writes one shard beside its place; `finish` moves it there."""

    def __init__(self, folder: Path, name: str, dtype: Literal["uint16", "uint32"]) -> None:
        self._folder = folder
        self._name = name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._offsets = [0]
        self._languages: list[int] = []
        self._codes: dict[str, int] = {}
        self._hash = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._unfinished("tokens").open("wb")

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self._offsets[-1]

    def add(self, ids: np.ndarray, language: str) -> None:
        """Appends one document."""
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))
        self._languages.append(self._codes.setdefault(language, len(self._codes)))

    def finish(self) -> Shard:
        """Returns the shard, once its files are whole and on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        arrays = {
            "offsets": np.asarray(self._offsets, "<i8"),
            "languages": np.asarray(self._languages, "<u2"),
        }
        hashes = {"tokens": self._hash.hexdigest()}
        for ending, array in arrays.items():
            data = array.tobytes()
            atomic.write_synced(self._unfinished(ending), data)
            hashes[ending] = hashlib.sha256(data).hexdigest()
        for ending in _ENDINGS:
            self._unfinished(ending).rename(self._folder / f"{self._name}.{ending}")
        return Shard(
            name=self._name,
            documents=len(self._languages),
            tokens=self.tokens,
            languages=tuple(self._codes),
            hashes=hashes,
        )

    def discard(self) -> None:
        """Removes what was written; does nothing after `finish`."""
        self._file.close()
        for ending in _ENDINGS:
            self._unfinished(ending).unlink(missing_ok=True)

    def _unfinished(self, ending: str) -> Path:
        return atomic.unfinished(self._folder / f"{self._name}.{ending}")
