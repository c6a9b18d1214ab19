"""Steps whose loss or gradient is not finite: the run stops or skips them, and keeps the batch."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minilm_jax.errors import UserError
from minilm_jax.train.devices import Devices
from minilm_jax.train.hosts import writes

log = logging.getLogger(__name__)

DUMPS = 3
"""Batches that a start of the run dumps at most; a run that skips could fill the disk."""


class NonfiniteSteps:
    """Finds such steps by their metrics, and dumps their batches into the run's folder.

    The batch is made again when it is wanted, because batches are a function of the step: nothing
    is kept or waited for on account of it.
    """

    def __init__(
        self,
        policy: Literal["stop", "skip"],
        *,
        folder: Path,
        batches: Callable[[int], AbstractContextManager[Iterator[Any]]],
        devices: Devices,
    ) -> None:
        """Remembers where the batches come from, as in `loop.fit`, and where they go."""
        self._policy = policy
        self._folder = folder
        self._batches = batches
        self._devices = devices
        self._dumped = 0
        self._examined = 0

    def examine(self, pending: Sequence[Mapping[str, Any]], done: int) -> None:
        """Stops or warns where a step is not finite, once; all processes do the same.

        Args:
          pending: the metrics of the latest steps.
          done: the last of them, counted from 1.

        Raises:
          UserError: one of them is not finite, and the policy is to stop.
        """
        for step, metrics in enumerate(pending, done - len(pending) + 1):
            if step <= self._examined or metrics["finite"]:
                continue
            values = {
                name: np.asarray(value)
                for name, value in metrics.items()
                if name not in ("counts", "finite")
            }
            culprits = [name for name, value in values.items() if not np.isfinite(value).all()]
            told = f"loss or gradient is not finite at step {step} ({', '.join(culprits)})"
            if self._dumped < DUMPS:
                told += f", its batch is in {self._dump(step, values)}"
            if self._policy == "stop":
                raise UserError(
                    f"{told}: nothing of it was saved; lower the learning rate (--override "
                    "optimizer.learning_rate), or continue past such steps with --train.nonfinite "
                    "skip --override train.nonfinite"
                )
            log.warning("%s: its update was skipped", told)
        self._examined = done

    def _dump(self, step: int, values: Mapping[str, np.ndarray]) -> Path:
        """Writes arrays `batch.NAME` in the order of the rows, and `metrics.NAME`."""
        self._dumped += 1
        with self._batches(step - 1) as stream:
            batch = self._devices.fetch_batch(next(stream))
        path = self._folder / f"nonfinite-step-{step}.npz"
        arrays: dict[str, Any] = {f"batch.{name}": value for name, value in batch.items()}
        arrays |= {f"metrics.{name}": value for name, value in values.items()}
        if writes():
            np.savez(path, **arrays)
        return path
