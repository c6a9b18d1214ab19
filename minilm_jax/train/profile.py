"""A trace of a few steps, for XProf, TensorBoard or Perfetto. Its failure never stops a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from minilm_jax.errors import first_line

PROFILE = "profile"
log = logging.getLogger(__name__)


class Profile:
    """Traces `count` steps from step `first` on, where it is given (first, count)."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path) -> None:
        """Writes the trace into `folder`; steps count from 1."""
        self._first, count = steps or (0, 0)
        self._last = self._first + count - 1
        self._folder = folder
        self._running = False

    def before(self, step: int) -> None:
        """Starts the trace where `step` is the first."""
        if step == self._first:
            with _only_warn():
                jax.profiler.start_trace(self._folder)
                self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace where `step` is the last, once the devices have computed its outputs."""
        if self._running and step >= self._last:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        """Ends a trace that a run was stopped in."""
        if self._running:
            self._running = False
            with _only_warn():
                jax.profiler.stop_trace()


@contextmanager
def _only_warn() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("no profile of this run (%s); training goes on", first_line(error))
