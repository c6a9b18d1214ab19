"""Batches as a pure function of (seed, step): the same rows for any number of hosts and workers.

A document of n tokens is cut into pieces of at most L - 2, each written `[CLS] … [SEP]`. An epoch
is a plan: every piece once, pieces packed into rows (or one a row), rows in a shuffled order. The
plan depends on (seed, epoch) alone and the number of rows on the lengths alone, so a step's rows
are found by arithmetic, and resuming replays nothing. Epochs follow one another without a gap: a
batch may hold the end of one and the beginning of the next.
"""

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from minilm_jax.data.corpus import Corpus
from minilm_jax.data.packing import pack
from minilm_jax.data.randomness import permutation
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.errors import ConfigError, DataError
from minilm_jax.settings import FINITE, Positive, Settings, Share, above, at_least

Batch = dict[str, np.ndarray]
Layout = Literal["packed", "padded"]

# To be raised when the rows of a (seed, step) change.
_ORDER = 1
# Rows (or bucketed batches) in which a mixture keeps its weights exactly.
_BLOCK = 1 << 16
_SPECIALS = 2
_NO_LANGUAGE = "no language"
_Length = Annotated[int, at_least(_SPECIALS + 1)]


@dataclass(frozen=True)
class BatchConfig(Settings):
    """The shape of a batch and what it is drawn from."""

    batch_size: Positive = 256
    """Rows of the global batch, over all hosts."""
    sequence_length: _Length = 512
    """Tokens of a row, special tokens included."""
    layout: Layout = "packed"
    """`packed`: several documents share a row, kept apart by segments. `padded`: one a row."""
    buckets: tuple[_Length, ...] = ()
    """Shorter rows for padded batches, such as (64, 128, 256): all rows of a
    batch have the shortest length that holds them. The last is always
    sequence_length."""
    weights: tuple[Annotated[float, above(0), FINITE], ...] = ()
    """Share of the rows for each corpus; empty reads all corpora as one,
    each document once an epoch. With weights each corpus has epochs of
    its own."""
    language_exponent: Share | None = None
    """Samples languages in proportion to tokens ** exponent (XLM-R: 0.3);
    None reads each document once an epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = (0, *self.buckets, self.sequence_length)
        if any(a >= b for a, b in itertools.pairwise(ordered)):
            raise ConfigError(
                f"buckets is {self.buckets}: give growing lengths below sequence_length"
                f" ({self.sequence_length})"
            )
        if self.buckets and self.layout == "packed":
            raise ConfigError(f"buckets is {self.buckets}: only layout padded has them")

    def check_weights(self, corpora: int) -> None:
        """Raises ConfigError unless there is a weight for each of so many corpora, or none."""
        if self.weights and len(self.weights) != corpora:
            raise ConfigError(
                f"weights has {len(self.weights)} entries for {corpora} corpora: give one for each"
            )


class Batches:
    """All batches of a run over one or more corpora; safe to share between threads."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: BatchConfig,
        *,
        seed: int,
        tokenizer: Tokenizer,
    ) -> None:
        """Lays out the streams that batches are drawn from.

        Args:
            corpora: Splits of prepared corpora, all of one tokenizer.
            config: Shape and mixture.
            seed: Decides the order.
            tokenizer: Must be that of the corpora; gives the special ids.

        Raises:
            DataError: A corpus is empty, or was made with another tokenizer.
            ConfigError: The weights do not match the corpora.
        """
        self.config = config
        self.seed = seed
        self._corpora = tuple(corpora)
        self._tokenizer = tokenizer
        if not self._corpora:
            raise DataError("no corpus given: name at least one prepared folder")
        for corpus in self._corpora:
            if corpus.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(
                    f"{corpus.folder}: was prepared with another tokenizer than the model's"
                    f" ({corpus.manifest.tokenizer_kind}, {corpus.manifest.vocab_size} ids, not"
                    f" {tokenizer.kind}, {tokenizer.vocab_size}); prepare it again"
                )
            if not len(corpus):
                raise DataError(f"{corpus.folder}: split {corpus.split} holds no document")
        config.check_weights(len(self._corpora))
        self._first_document = np.cumsum([0, *map(len, self._corpora)])
        self._lengths = np.concatenate([corpus.lengths for corpus in self._corpora])
        groups = self._groups()
        self._names = [group.name for group in groups]
        self._streams = [
            _Stream(group.documents, self._lengths, config, seed=seed, number=number)
            for number, group in enumerate(groups)
        ]
        self._schedule = _Schedule([group.weight for group in groups], seed=seed)

    # The rows of a step

    def at(self, step: int, *, rows: slice | None = None) -> Batch:
        """Returns the batch of a step.

        Args:
            step: Any step from 0; a pure function of it and the seed.
            rows: The rows of the global batch that this host wants; None for all.

        Returns:
            `input_ids` int32 [B, L]; `segments` int32 [B, L], 0 for padding and 1, 2, … for the
            pieces of a row; `rows` int32 [B], the rows' numbers in the global batch.
        """
        wanted = np.arange(self.config.batch_size)[slice(None) if rows is None else rows]
        if not self._bucketed:
            units, inside = step * self.config.batch_size + wanted, np.zeros_like(wanted)
        else:
            units, inside = np.full_like(wanted, step), wanted
        numbers, indices = self._schedule.look_up(units)
        chosen: list[_Rows] = []
        for number in np.unique(numbers):
            stream = self._streams[number]
            epochs, places = np.divmod(indices, stream.units)
            for epoch in np.unique(epochs[numbers == number]):
                mine = np.flatnonzero((numbers == number) & (epochs == epoch))
                plan = stream.plan(int(epoch))
                chosen.append(plan.rows(plan.order[places[mine]], inside[mine], to=mine))
        return self._fill(chosen, wanted)

    def evaluation_batches(
        self, *, documents: np.ndarray | None = None, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Yields every document of the corpora, or of a part, exactly once, whatever the mixture.

        The order depends on nothing but the corpora and the shape, and is shuffled: the first
        batches are a fair sample, short documents and long. Where the rows do not fill the
        batches, one of them, the last without buckets, ends with empty rows (segments all 0).

        Args:
            documents: One of `parts`; None for all.
            rows: As of `at`.
        """
        if documents is None:
            documents = np.arange(len(self._lengths))
        stream = _Stream(documents, self._lengths, self.config, seed=0, number=0)
        plan = stream.plan(0)
        size = self.config.batch_size
        wanted = np.arange(size)[slice(None) if rows is None else rows]
        for batch in range(stream.units if self._bucketed else -(-stream.units // size)):
            if self._bucketed:
                places, inside = np.full_like(wanted, batch), wanted
            else:
                places, inside = batch * size + wanted, np.zeros_like(wanted)
            mine = np.flatnonzero(places < stream.units)
            units = plan.order[places[mine]]
            yield self._fill([plan.rows(units, inside[mine], to=mine)], wanted)

    def parts(self) -> dict[str, np.ndarray]:
        """Returns the documents of each corpus and of each language, where there are several.

        A language that is all of a corpus stands there once, by the corpus's folder.
        """
        everything = np.arange(len(self._lengths))
        parts = {}
        if len(self._corpora) > 1:
            split = np.split(everything, self._first_document[1:-1])
            parts = {str(c.folder): part for c, part in zip(self._corpora, split, strict=True)}
        if len(self._codes) > 1:
            languages = self._document_languages()
            for number, code in enumerate(self._codes):
                spoken = np.flatnonzero(languages == number)
                if not any(np.array_equal(spoken, part) for part in parts.values()):
                    parts[code or _NO_LANGUAGE] = spoken
        return parts

    # What a run is compared by

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold every document once."""
        factor = self.config.batch_size if self._bucketed else 1
        return sum(stream.units for stream in self._streams) * factor

    @property
    def efficiency(self) -> float:
        """Share of the tokens of an epoch's batches that are not padding."""
        return sum(stream.tokens for stream in self._streams) / sum(
            stream.room for stream in self._streams
        )

    def shares(self) -> dict[str, float]:
        """Returns the share of the rows that each corpus or language is drawn with."""
        return dict(zip(self._names, self._schedule.weights, strict=True))

    def passes(self, steps: int) -> dict[str, float]:
        """Returns how many times so many steps read all of each corpus or language."""
        units = steps * (1 if self._bucketed else self.config.batch_size)
        return {
            name: share * units / stream.units
            for (name, share), stream in zip(self.shares().items(), self._streams, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        """Returns everything that decides the batches, for the run's record."""
        content = {
            "order": _ORDER,
            "seed": self.seed,
            **dataclasses.asdict(self.config),
            "tokenizer": self._tokenizer.fingerprint,
            "corpora": [
                {
                    "fingerprint": corpus.fingerprint,
                    "documents": len(corpus),
                    "tokens": corpus.num_tokens,
                }
                for corpus in self._corpora
            ],
        }
        return json.loads(json.dumps(content))  # as it is read back from a run's record

    # Streams

    @property
    def _bucketed(self) -> bool:
        return bool(self.config.buckets)

    @cached_property
    def _codes(self) -> list[str]:
        return sorted({code for corpus in self._corpora for code in corpus.languages})

    def _groups(self) -> list["_Group"]:
        """Returns what each stream is made of."""
        weights, exponent = self.config.weights, self.config.language_exponent
        everything = np.arange(len(self._lengths))
        pools = [_Group("" if exponent is not None else "all", everything, 1.0)]
        if weights:
            corpora = np.split(everything, self._first_document[1:-1])
            pools = [
                _Group(f"corpus {i}", documents, weight)
                for i, (documents, weight) in enumerate(zip(corpora, weights, strict=True))
            ]
        if exponent is None:
            return pools
        languages = self._document_languages()
        groups = []
        for name, documents, weight in pools:
            present = np.unique(languages[documents])
            members = [documents[languages[documents] == code] for code in present]
            sizes = np.asarray([self._lengths[m].sum() for m in members], np.float64) ** exponent
            for code, member, size in zip(present, members, sizes / sizes.sum(), strict=True):
                label = f"{name} {self._codes[code] or _NO_LANGUAGE}".strip()
                groups.append(_Group(label, member, weight * float(size)))
        return groups

    def _document_languages(self) -> np.ndarray:
        index = {code: i for i, code in enumerate(self._codes)}
        tables = [np.asarray([index[c] for c in corpus.languages]) for corpus in self._corpora]
        return np.concatenate(
            [t[c.document_languages] for t, c in zip(tables, self._corpora, strict=True)]
        )

    # Copying tokens

    def _fill(self, chosen: list["_Rows"], wanted: np.ndarray) -> Batch:
        width = chosen[0].width if chosen else self.config.sequence_length
        shape = (len(wanted), width)
        ids = np.full(shape, self._tokenizer.pad_id, np.int32)
        segments = np.zeros(shape, np.int32)
        for rows in chosen:
            self._copy(rows, ids, segments)
        return {"input_ids": ids, "segments": segments, "rows": wanted.astype(np.int32)}

    def _copy(self, rows: "_Rows", ids: np.ndarray, segments: np.ndarray) -> None:
        slots = rows.lengths + _SPECIALS
        ends = np.cumsum(slots)
        # Where each piece begins in its row: its place among all minus its row's first piece's.
        begins = ends - slots
        first_of_row = np.cumsum(rows.counts) - rows.counts
        columns = begins - np.repeat(
            begins[first_of_row[rows.counts > 0]], rows.counts[rows.counts > 0]
        )
        numbers = np.arange(len(slots)) - np.repeat(first_of_row, rows.counts) + 1
        flat = np.repeat(rows.to, rows.counts) * ids.shape[1] + columns
        flat_ids, flat_segments = ids.reshape(-1), segments.reshape(-1)
        spread = np.repeat(flat - begins, slots) + np.arange(ends[-1] if len(ends) else 0)
        flat_segments[spread] = np.repeat(numbers, slots)
        flat_ids[flat] = self._tokenizer.cls_id
        flat_ids[flat + slots - 1] = self._tokenizer.sep_id
        corpus_of = np.searchsorted(self._first_document, rows.documents, side="right") - 1
        for number in np.unique(corpus_of):
            corpus = self._corpora[number]
            mine = np.flatnonzero(corpus_of == number)
            shards, starts = corpus.locate(rows.documents[mine] - self._first_document[number])
            starts = starts + rows.starts[mine]
            sources = {int(s): corpus.tokens(int(s)) for s in np.unique(shards)}
            for shard, start, length, to in zip(
                shards.tolist(),
                starts.tolist(),
                rows.lengths[mine].tolist(),
                (flat[mine] + 1).tolist(),
                strict=True,
            ):
                flat_ids[to : to + length] = sources[shard][start : start + length]


class _Group(NamedTuple):
    """Documents that are read as one stream."""

    name: str
    documents: np.ndarray
    weight: float
    """Share of the rows, before all shares are made to sum to 1."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a plan and the pieces in them."""

    to: np.ndarray
    """Where each row stands in the batch."""
    counts: np.ndarray
    """Pieces of each row."""
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    width: int


@dataclass(frozen=True)
class _Plan:
    """One epoch of a stream."""

    stream: "_Stream"
    pieces: np.ndarray
    """Every piece once, in the order of the rows."""
    order: np.ndarray
    """The units (rows or bucketed batches) shuffled."""

    def rows(self, units: np.ndarray, inside: np.ndarray, *, to: np.ndarray) -> _Rows:
        """Returns rows of the plan, and their places `to` in a batch."""
        stream = self.stream
        numbers = units.astype(np.int64) * stream.rows_per_unit + inside
        firsts = stream.row_first[numbers]
        counts = stream.row_first[numbers + 1] - firsts
        ends = np.cumsum(counts)
        chosen = np.repeat(firsts - (ends - counts), counts) + np.arange(
            ends[-1] if len(ends) else 0
        )
        pieces = self.pieces[chosen].astype(np.int64)
        places = np.searchsorted(stream.first_piece, pieces, side="right") - 1
        starts = (pieces - stream.first_piece[places]) * stream.longest
        documents = stream.documents[places]
        lengths = np.minimum(stream.lengths[documents] - starts, stream.longest)
        width = int(stream.widths[units[0]]) if len(units) else int(stream.widths[-1])
        return _Rows(to, counts, documents, starts, lengths, width)


class _Stream:
    """Documents that are read once before any is read again."""

    def __init__(
        self,
        documents: np.ndarray,
        lengths: np.ndarray,
        config: BatchConfig,
        *,
        seed: int,
        number: int,
    ) -> None:
        self.documents = documents
        self.lengths = lengths
        self.longest = config.sequence_length - _SPECIALS
        self._config = config
        self._key = (seed, number)
        own = lengths[documents]
        self.first_piece = np.concatenate([[0], np.cumsum(-(-own // self.longest))])
        self.pieces = int(self.first_piece[-1])
        slots = np.full(
            self.pieces,
            config.sequence_length,
            np.uint16 if config.sequence_length < 1 << 16 else np.uint32,
        )
        remainder = own - (np.diff(self.first_piece) - 1) * self.longest
        slots[self.first_piece[1:] - 1] = remainder + _SPECIALS
        self._slots = slots
        self.tokens = int(slots.sum(dtype=np.int64))
        self._plans: dict[int, _Plan] = {}
        self._lock = threading.Lock()
        histogram = np.bincount(slots, minlength=config.sequence_length + 1)
        if config.layout == "packed":
            self._lay_out_packed(histogram)
        else:
            self._lay_out_padded(histogram)
        self.units = len(self.widths)

    rows_per_unit: int
    row_first: np.ndarray
    """First piece, in the plan's order, of each row; int64 [rows + 1]."""
    widths: np.ndarray
    """Length of the rows of each unit."""

    @property
    def room(self) -> int:
        """Tokens of an epoch, padding included."""
        return int(self.widths.sum(dtype=np.int64)) * self.rows_per_unit

    def _lay_out_packed(self, histogram: np.ndarray) -> None:
        self._patterns = pack(histogram, capacity=self._config.sequence_length)
        sizes = [len(pattern.lengths) for pattern in self._patterns]
        counts = np.repeat(sizes, [pattern.rows for pattern in self._patterns])
        self.rows_per_unit = 1
        self.row_first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.widths = np.full(len(counts), self._config.sequence_length, np.int32)

    def _lay_out_padded(self, histogram: np.ndarray) -> None:
        config = self._config
        buckets = (*config.buckets, config.sequence_length)
        if not config.buckets:
            self.rows_per_unit = 1
            self.row_first = np.arange(self.pieces + 1)
            self.widths = np.full(self.pieces, config.sequence_length, np.int32)
            return
        self.rows_per_unit = config.batch_size
        begins = (0, *(bucket + 1 for bucket in buckets[:-1]))
        counts: list[np.ndarray] = []
        widths: list[int] = []
        waiting = 0
        for begin, bucket in zip(begins, buckets, strict=True):
            # What does not fill a batch goes with the next longer rows.
            waiting += int(histogram[begin : bucket + 1].sum())
            batches, waiting = divmod(waiting, config.batch_size)
            counts += [np.ones(batches * config.batch_size, np.int64)]
            widths += [bucket] * batches
        if waiting:
            counts.append((np.arange(config.batch_size) < waiting).astype(np.int64))
            widths.append(config.sequence_length)
        self.row_first = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
        self.widths = np.asarray(widths, np.int32)

    def plan(self, epoch: int) -> _Plan:
        """Returns the plan of an epoch; the two last used are kept."""
        with self._lock:
            if epoch not in self._plans:
                while len(self._plans) > 1:
                    self._plans.pop(min(self._plans))
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        shuffled = _permutation(self.pieces, *self._key, epoch, 0)
        pieces = shuffled
        if self._config.layout == "packed":
            pieces = self._packed_pieces(shuffled)
        elif self._config.buckets:
            buckets = np.asarray((*self._config.buckets, self._config.sequence_length))
            bucket_of = np.searchsorted(buckets, self._slots[shuffled]).astype(np.uint16)
            pieces = shuffled[np.argsort(bucket_of, kind="stable")]
        return _Plan(self, pieces, _permutation(self.units, *self._key, epoch, 1))

    def _packed_pieces(self, shuffled: np.ndarray) -> np.ndarray:
        """Returns pieces in the order of the rows: each pattern takes the next of each length."""
        slots = self._slots[shuffled]
        by_length = shuffled[np.argsort(slots, kind="stable")]
        taken = np.cumsum(np.bincount(slots, minlength=self._config.sequence_length + 1))
        taken = np.concatenate([[0], taken[:-1]])
        rows = []
        for pattern in self._patterns:
            table = np.empty((pattern.rows, len(pattern.lengths)), shuffled.dtype)
            for place, length in enumerate(pattern.lengths):
                table[:, place] = by_length[taken[length] : taken[length] + pattern.rows]
                taken[length] += pattern.rows
            rows.append(table.reshape(-1))
        return np.concatenate(rows)


def _permutation(size: int, *keys: int) -> np.ndarray:
    """Returns `permutation` in half the memory, where 32 bits hold its numbers."""
    return permutation(size, *keys).astype(np.uint32 if size < 1 << 32 else np.int64)


class _Schedule:
    """Which stream each row (or bucketed batch) of the run comes from.

    In every block of 65,536 units stream k has its share to within one, and by the end of block j
    it has had floor(j·65536·c_k) - floor(j·65536·c_{k-1}) units, c being the cumulated weights: so
    the place in a stream is arithmetic too.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        self._seed = seed
        shares = np.asarray(weights, np.float64)
        # Below, a stream could have a negative number of units in a block.
        shares = np.maximum(shares / shares.sum(), 2 / _BLOCK)
        shares /= shares.sum()
        self.weights = [float(share) for share in shares]
        scaled = [int(c * 2**32) for c in np.cumsum(shares)[:-1]]
        self._cumulated = [0, *scaled, 1 << 32]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def look_up(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns each unit's stream and its place in that stream."""
        if len(self.weights) == 1:
            return np.zeros_like(units), units
        numbers, indices = np.empty_like(units), np.empty_like(units)
        for block in np.unique(units // _BLOCK):
            mine = units // _BLOCK == block
            streams, places = self._block(int(block))
            numbers[mine] = streams[units[mine] % _BLOCK]
            indices[mine] = places[units[mine] % _BLOCK]
        return numbers, indices

    def _before(self, block: int) -> np.ndarray:
        marks = [(block * _BLOCK * c) >> 32 for c in self._cumulated]
        return np.diff(np.asarray(marks, np.int64))

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            if block not in self._blocks:
                while len(self._blocks) > 1:
                    self._blocks.pop(min(self._blocks))
                before = self._before(block)
                counts = self._before(block + 1) - before
                # Sorted by stream; place i of the block takes the shuffled entry i.
                streams = np.repeat(np.arange(len(counts)), counts)
                streams = streams[permutation(_BLOCK, self._seed, block, 2)]
                places = np.empty(_BLOCK, np.int64)
                for stream, (first, count) in enumerate(zip(before, counts, strict=True)):
                    places[streams == stream] = first + np.arange(count)
                self._blocks[block] = (streams, places)
            return self._blocks[block]
