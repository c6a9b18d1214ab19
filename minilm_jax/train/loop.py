"""The loop: batches in, steps out, checkpoints and metrics on the way, and a clean stop."""

import logging
import math
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np

from minilm_jax.signals import Stopped, first_signal
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import Goodput
from minilm_jax.train.hosts import any_process, writes
from minilm_jax.train.monitor import Interval, Monitor
from minilm_jax.train.nonfinite import NonfiniteSteps
from minilm_jax.train.profile import Profile
from minilm_jax.train.state import TrainState
from minilm_jax.train.step import Given

log = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """What an evaluation on the way found, the same in every process."""

    heldout: float | None = None
    """A held-out loss: it is logged, and decides which checkpoint is the best."""
    enough: bool = False
    """Whether the run ends here, whatever steps are left."""


def fit(
    step: Callable[..., Any],
    start: Callable[[], TrainState],
    given: Given,
    batches: Callable[[int], AbstractContextManager[Iterator[Any]]],
    *,
    config: TrainConfig,
    devices: Devices,
    checkpoints: Checkpoints,
    make_monitor: Callable[[int], Monitor],
    goodput: Goodput | None = None,
    flops: Callable[[Any], int] | None = None,
    profile: Profile | None = None,
    evaluate: Callable[[TrainState], Evaluation] | None = None,
) -> TrainState:
    """Returns the state after the last step, resuming from the latest checkpoint.

    The last step is that of the config, or the one whose evaluation said that it is enough.

    The host never waits for a step it does not report: metrics of an interval stay on the devices
    until it is logged.

    Args:
      step: the lifted step.
      start: makes the state to start from where there is no checkpoint. Made here, because a caller
        would keep the whole of it on one device as long as the run lasts.
      given: what all steps are given, placed.
      batches: opens an iterator of placed batches from a step on; closed at the end.
      config: of the run.
      devices: where it runs.
      checkpoints: where it saves and resumes.
      make_monitor: opens the monitor at the resumed step.
      goodput: books where the time goes.
      flops: of the matrix products of a step on a placed batch, over all devices; for the log.
      profile: traces some steps.
      evaluate: looks at a state every config.evaluate_every steps and at the last, before it is
        saved: where a process dies in between, the steps since the checkpoint before and the
        evaluation are done again.

    Raises:
      Stopped: SIGTERM or SIGINT arrived, be it in the last step; everything up to the last
        finished step is saved.
      UserError: the loss is not finite and config.nonfinite is "stop".
      CheckpointError: the disk has no room, a save has failed, or no checkpoint can be read.
    """
    shapes = jax.eval_shape(start)
    restored = checkpoints.restore(shapes, devices.shardings(shapes))
    state = devices.place(start()) if restored is None else restored
    first = int(state.step)
    goodput = goodput or Goodput()
    goodput.begin(first)
    if first >= config.steps:
        return state
    checkpoints.check_space(state)
    nonfinite = NonfiniteSteps(
        config.nonfinite, folder=checkpoints.folder.parent, batches=batches, devices=devices
    )
    monitor = make_monitor(first) if writes() else None
    pending: list[dict[str, Any]] = []
    timed, work = first, 0
    with _signals() as stop, batches(first) as stream:
        try:
            for done in range(first + 1, config.steps + 1):
                batch = next(stream)
                starting = done == first + 1
                if not starting:
                    # A wait while the devices are still at the step before loses nothing.
                    idle = not pending or pending[-1]["finite"].is_ready()
                    goodput.lap("data" if idle else "training")
                if profile is not None:
                    profile.before(done)
                state, metrics = step(state, given, batch)
                pending.append(metrics)
                if profile is not None:
                    profile.after(done, metrics)
                if flops and monitor is not None:
                    work += flops(batch)
                if starting:
                    jax.block_until_ready(state)  # traced, compiled and run: no measure of speed
                    timed, work = first + 1, 0
                goodput.lap("startup" if starting else "training")
                if _due(done, config.log_every, config):
                    checkpoints.check()
                    _report(monitor, done, pending, nonfinite, goodput, done - timed, work)
                    pending, timed, work = [], done, 0
                evaluating = evaluate is not None and _due(done, config.evaluate_every, config)
                saving = evaluating or _due(done, config.save_every, config)
                if saving:
                    _settle(state, pending, done, nonfinite)
                    goodput.lap("training")
                found = Evaluation()
                if evaluate is not None and evaluating:
                    found = evaluate(state)
                    if found.heldout is not None and monitor is not None:
                        monitor.log_heldout(done, found.heldout)
                        if not math.isfinite(found.heldout):
                            log.warning("the held-out loss after step %d is not finite", done)
                    goodput.lap("evaluation")
                # Asked after the evaluation, which may have taken long.
                stopping = _agree_to_stop(stop, done, config)
                if stopping and not saving:
                    _settle(state, pending, done, nonfinite)
                    goodput.lap("training")
                if saving or stopping:
                    checkpoints.save(done, state, heldout=found.heldout)
                    goodput.lap("checkpoints")
                    goodput.record(done)
                if stopping:
                    checkpoints.wait()
                    raise _stopped(stop, done)
                if found.enough:
                    break
            checkpoints.wait()
            goodput.lap("checkpoints")
            if any_process(bool(stop)):  # during the wait
                raise _stopped(stop, done)
        finally:
            if monitor is not None:
                monitor.close()
            if profile is not None:
                profile.close()
    return state


def _due(done: int, every: int, config: TrainConfig) -> bool:
    """Returns whether something that happens every so many steps, and at the last, happens now."""
    return bool(every) and (done % every == 0 or done == config.steps)


def _agree_to_stop(stop: list[int], done: int, config: TrainConfig) -> bool:
    """Returns whether the run ends after this step, the same in every process."""
    if jax.process_count() == 1:
        return bool(stop)
    # Asking costs a round trip, so it is asked only where the host waits for the devices anyway.
    return _due(done, config.log_every, config) and any_process(bool(stop))


def _stopped(stop: list[int], done: int) -> Stopped:
    # Another process may have had the signal.
    signum = stop[0] if stop else signal.SIGTERM
    return Stopped(
        f"stopped by {signal.Signals(signum).name} after step {done}, which is saved; run the same "
        "command to continue",
        signum,
    )


def _settle(
    state: TrainState, pending: list[dict[str, Any]], done: int, nonfinite: NonfiniteSteps
) -> None:
    """Returns once the state is there and known to be sound: nothing poisoned is saved."""
    nonfinite.examine(pending, done)
    jax.block_until_ready(state)  # whatever comes next would wait, but waiting is not saving


def _report(
    monitor: Monitor | None,
    done: int,
    pending: list[dict[str, Any]],
    nonfinite: NonfiniteSteps,
    goodput: Goodput,
    steps: int,
    flops: int,
) -> None:
    """Fetches an interval's metrics; what is written is the last step's, a function of it alone."""
    fetched = jax.device_get(pending)
    goodput.lap("training")
    nonfinite.examine(fetched, done)
    goodput.record(done)
    if monitor is None:
        return
    if all(metrics["grad_norm"] == 0.0 for metrics in fetched):
        log.warning(
            "the gradient is exactly 0 up to step %d: the loss does not depend on the trained "
            "parameters",
            done,
        )
    counts: dict[str, float] = defaultdict(float)
    for metrics in fetched[len(fetched) - steps :]:
        for name, value in metrics["counts"].items():
            counts[name] += float(value)
    shown = {
        name: np.asarray(value).tolist()
        for name, value in fetched[-1].items()
        if name not in ("counts", "finite")
    }
    spent = goodput.interval()
    interval = Interval(
        steps=steps,
        counts=counts,
        flops=flops,
        seconds=spent["training"] + spent["data"],
        waited=spent["data"],
    )
    monitor.log(done, shown, interval)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yields a list that receives the first SIGTERM or SIGINT; a second one ends the process."""
    received: list[int] = []
    with first_signal(received.append):
        yield received
