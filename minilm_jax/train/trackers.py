"""Where else a run is shown: TensorBoard and Weights & Biases. Neither can stop or slow a run."""

import contextlib
import importlib.util
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from minilm_jax.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb"]
TENSORBOARD, WANDB_ID = "tensorboard", "wandb_id"
_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_QUEUED = 1000
log = logging.getLogger(__name__)


class Service(Protocol):
    """What a tracker writes to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records a step."""

    def close(self) -> None:
        """Sends what is not yet sent."""


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raises ConfigError where a tracker that was asked for is not installed."""
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(
                f"train.trackers names {name}, which is not installed: "
                f"pip install 'minilm_jax[{name}]', or leave it out"
            )


class Tracker:
    """A service behind a thread of its own: whatever it does, the run goes on.

    The first failure is a warning, and the end of this tracker.
    """

    def __init__(
        self, name: str, connect: Callable[[], Service], *, patience_s: float = 60.0
    ) -> None:
        """Connects in the background; `close` waits for at most `patience_s` seconds."""
        self._name, self._connect, self._patience_s = name, connect, patience_s
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_QUEUED)
        self._failed = False
        # A daemon: one that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Hands a step over: numbers, or lists of them."""
        values: dict[str, float] = {}
        for name, value in metrics.items():
            if isinstance(value, list):
                values |= {f"{name}/{index}": x for index, x in enumerate(value)}
            else:
                values[name] = value
        if not self._failed:
            try:
                self._queue.put_nowait((step, values))
            except queue.Full:
                self._fail(f"it is {_QUEUED} steps behind")

    def close(self) -> None:
        """Waits until everything is sent, within patience."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            self._fail(f"it did not finish within {self._patience_s:g} s")

    def _work(self) -> None:
        try:
            service = self._connect()
            while (item := self._queue.get()) is not None:
                service.log(*item)
            service.close()
        except BaseException as error:  # some services exit where they should raise
            self._fail(f"{type(error).__name__}: {error}".partition("\n")[0][:200])

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            log.warning("%s stopped showing this run (%s); training goes on", self._name, reason)


def open_trackers(
    names: Sequence[TrackerName], folder: Path, *, config: Mapping[str, Any], first_step: int
) -> tuple[Tracker, ...]:
    """Returns the trackers of a run.

    Args:
      names: which; docs/training.md says what each needs.
      folder: of the run.
      config: shown beside the curves where the service can.
      first_step: steps already taken; what an earlier start showed of later ones is replaced.
    """
    services: dict[str, Callable[[], Service]] = {
        "tensorboard": lambda: _TensorBoard(folder / TENSORBOARD, first_step),
        "wandb": lambda: _WeightsAndBiases(folder, config),
    }
    return tuple(Tracker(name, services[name]) for name in names)


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(logdir=str(folder), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        # Kept with the run, so that the next start continues the same curves.
        file = folder / WANDB_ID
        if not file.exists():
            file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minilm_jax"),
            name=folder.name,
            id=file.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
