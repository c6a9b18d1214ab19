"""Batches of a task: shuffled for training as a function of (seed, step), in order for scoring.

A last batch that is not full is filled with empty rows of weight 0, so that every example counts
once on any number of devices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minilm_jax.errors import DataError
from minilm_jax.settings import Positive, Settings
from minilm_jax.tasks.features import Feature

Batch = dict[str, np.ndarray]
Layout = Literal["bucketed", "padded"]


@dataclass(frozen=True, kw_only=True)
class RowConfig(Settings, name="batch"):
    """The shape of a task's batches."""

    batch_size: Positive = 32
    """Rows of the global batch."""
    layout: Layout = "bucketed"
    """bucketed: rows of a batch are as long as its longest, rounded up to
    `bucket`; padded: all are max_length. Scores are the same."""
    bucket: Positive = 32
    """Tokens; a smaller one computes less and compiles more programs."""


class TaskBatches:
    """A task's rows as batches."""

    def __init__(
        self, features: Sequence[Feature], *, config: RowConfig, max_length: int, pad_id: int
    ) -> None:
        """Takes the rows; they are padded when a batch is made."""
        if not features:
            raise DataError("no example is left to train on or to score")
        self.features = features
        self.config = config
        self._max_length = max_length
        self._pad_id = pad_id
        self._lengths = np.array([len(feature.ids) for feature in features])
        self._last_order: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def steps_an_epoch(self) -> int:
        """Batches that hold every row once; the last one may not be full."""
        return -(-len(self.features) // self.config.batch_size)

    def at(self, step: int, *, seed: int) -> Batch:
        """Returns the batch of a training step: a function of (seed, step) alone."""
        epoch, index = divmod(step, self.steps_an_epoch)
        size = self.config.batch_size
        rows = self._order(seed, epoch)[index * size : (index + 1) * size]
        return self._batch(rows) | self._labels(rows)

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """Returns the rows shuffled; one epoch's are kept, for all of its steps."""
        last = self._last_order  # read once: another thread may replace it
        if last is None or last[0] != (seed, epoch):
            shuffled = np.random.default_rng((seed, epoch)).permutation(len(self.features))
            self._last_order = last = (seed, epoch), shuffled
        return last[1]

    def in_order(self) -> Iterator[tuple[np.ndarray, Batch]]:
        """Yields (rows, batch) of every row once; the first len(rows) of a batch are theirs.

        Labels are left out: scores come from the examples. Bucketed batches hold rows of like
        length.
        """
        order = np.arange(len(self.features))
        if self.config.layout == "bucketed":
            order = np.argsort(-self._lengths, kind="stable")
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            yield rows, self._batch(rows)

    def _labels(self, rows: np.ndarray) -> Batch:
        size = self.config.batch_size
        given = [self.features[row].label for row in rows]
        shape = (size, 2) if isinstance(given[0], tuple) else (size,)
        labels = np.zeros(shape, np.float32 if isinstance(given[0], float) else np.int32)
        labels[: len(rows)] = given
        return {"labels": labels}

    def _batch(self, rows: np.ndarray) -> Batch:
        size, length = self.config.batch_size, self._max_length
        if self.config.layout == "bucketed":
            bucket = self.config.bucket
            length = min(length, -(-int(self._lengths[rows].max()) // bucket) * bucket)
        batch: Batch = {
            "input_ids": np.full((size, length), self._pad_id, np.int32),
            "token_type_ids": np.zeros((size, length), np.int32),
            "segments": np.zeros((size, length), np.int32),
            "rows": np.arange(size, dtype=np.int32),
            "weights": np.zeros(size, np.float32),
        }
        for at, row in enumerate(rows):
            feature = self.features[row]
            n = len(feature.ids)
            batch["input_ids"][at, :n] = feature.ids
            batch["token_type_ids"][at, :n] = feature.token_type_ids
            batch["segments"][at, :n] = 1
            batch["weights"][at] = 1.0
        return batch
