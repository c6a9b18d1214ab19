"""Checkpoints of the training state: asynchronous, the latest and the best, never half a one."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from minilm_jax.errors import CheckpointError, RestoreError, first_line
from minilm_jax.train.checksums import find_damage, write_checksums
from minilm_jax.train.hosts import any_process, wait_for_all, writes
from minilm_jax.train.state import TrainState

HELDOUT = "heldout"
_ITEM = "default"
"""What Orbax calls the only thing a step holds, and the folder it is in."""
Result = TypeVar("Result")
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in one folder, written by Orbax.

    Orbax commits a step by renaming its finished folder, so a killed save leaves only a temporary
    folder, removed at the next start. Each holds checksums of its files beside them. A step whose
    files are not as they were written is set aside with a warning and the one before it is used; an
    intact one that cannot be taken up is an error, and stays.

    Where the run has several processes, all of them call each method, and share the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        keep_best: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens or creates the folder.

        Args:
          folder: of the checkpoints alone.
          keep: the latest so many are kept.
          keep_best: keep the one of the lowest held-out loss beside them.
          metadata: what the states are computed from and with, JSON-able; written into each.
        """
        self.folder = folder.absolute()  # Orbax fails on relative paths, late and from a thread.
        self._keep, self._keep_best = keep, keep_best
        self._metadata = json.loads(json.dumps(metadata or {}))
        kept: list[preservation_policy.PreservationPolicy] = [
            preservation_policy.LatestN(self._keep)
        ]
        if self._keep_best:
            kept.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: -_heldout(metrics),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            best_fn=_heldout if self._keep_best else None,
            best_mode="min",
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add(_ITEM, ocp.args.StandardSave, _Sealed())
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, handler_registry=handlers
        )

    def check_space(self, state: TrainState) -> None:
        """Raises CheckpointError unless the disk has room for all states the run will keep.

        One more than is kept, because the oldest goes only when the newest is complete.
        """
        each = sum(x.nbytes for x in jax.tree.leaves(state))
        most = self._keep + self._keep_best + 1
        needed = each * max(most - len(self._manager.all_steps()), 0)
        free = shutil.disk_usage(self.folder).free
        if any_process(needed > free):
            raise CheckpointError(
                f"{self.folder}: checkpoints of this run need {needed / 1e9:.3g} GB and the disk "
                f"has {free / 1e9:.3g} GB free; make room, or keep fewer with train.keep"
            )

    def save(self, step: int, state: TrainState, *, heldout: float | None = None) -> None:
        """Starts writing the state of `step`; returns once it is copied, not once it is written.

        Args:
          step: steps taken.
          state: after them.
          heldout: its held-out loss, where it was evaluated; what the best is chosen by.

        Raises:
          CheckpointError: this save cannot begin, or the one before has failed.
        """
        with self._explained():
            saved = self._manager.save(
                step,
                args=ocp.args.StandardSave(state._asdict()),
                metrics=None if heldout is None else {HELDOUT: heldout},
                custom_metadata=self._metadata,
            )
        if not saved:
            # Orbax returns False, silently, for a step at or before the latest.
            raise CheckpointError(
                f"{self.folder}: step {step} was not saved; latest is {self._manager.latest_step()}"
            )

    def latest(self) -> int | None:
        """Returns the last complete step, None where there is none."""
        return self._manager.latest_step()

    def restore(self, state: TrainState, shardings: TrainState) -> TrainState | None:
        """Returns the latest undamaged state placed as `shardings` say, None where there is none.

        Args:
          state: a state of the right structure, shapes and dtypes; its values are not read.
          shardings: a tree of shardings like `state`.

        Raises:
          CheckpointError: there are checkpoints and all of them are damaged; or the latest that is
            not holds another state than `state`, or cannot be read now.
        """
        begun = self._manager.latest_step() is not None
        while (step := self._manager.latest_step()) is not None:
            damage = self._damage(step)
            if not damage:
                return self._read(step, state, shardings)
            self._set_aside(step, damage)
        if begun:
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged, see the warnings above; they were "
                "moved to unreadable-STEP, and the next start begins from step 0"
            )
        return None

    def restore_best(self, state: TrainState, shardings: TrainState) -> tuple[int, TrainState]:
        """Returns the step of the lowest held-out loss and its state; arguments as of `restore`.

        The folder was opened with `keep_best`.

        Raises:
          CheckpointError: no step was evaluated, or the best one cannot be read.
        """
        self.wait()
        step = self._manager.best_step()
        if step is None:
            raise CheckpointError(
                f"{self.folder} holds no checkpoint with a held-out loss; "
                "--train.export last --override train.export exports the last one"
            )
        damage = self._damage(step)
        if damage:
            raise CheckpointError(
                f"{self.folder}: the best checkpoint, of step {step}, is damaged ({damage}); "
                "--train.export last --override train.export exports the last one"
            )
        return step, self._read(step, state, shardings)

    def _damage(self, step: int) -> str:
        """Returns what of the step is not as it was written, "" where all is."""
        # A share, because what one process finds counts for all.
        share = {"part": jax.process_index(), "parts": jax.process_count()}
        item = self.folder / str(step) / _ITEM
        mine = self._agreed(step, lambda: find_damage(item, **share))
        return (mine or "found by another process") if any_process(bool(mine)) else ""

    def _read(self, step: int, state: TrainState, shardings: TrainState) -> TrainState:
        """Returns the state that the undamaged step holds."""
        return self._agreed(step, lambda: self._read_alone(step, state, shardings))

    def _read_alone(self, step: int, state: TrainState, shardings: TrainState) -> TrainState:
        mine = jax.process_index()
        # Alone: a process that fails must not leave the others waiting for it inside Orbax.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
        )
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
        with ocp.CheckpointManager(self.folder, options=options, item_handlers=handler) as manager:
            target = _target(state, shardings)._asdict()
            _refuse_another_state(manager.item_metadata(step), target)
            return TrainState(**manager.restore(step, args=ocp.args.StandardRestore(target)))

    def _agreed(self, step: int, work: Callable[[], Result]) -> Result:
        """Returns what `work` returns here; RestoreError where it fails in any process."""
        failure = None
        try:
            result = work()
        except Exception as error:
            failure = error
        if any_process(failure is not None):
            reason = first_line(failure) if failure else "it failed in another process"
            raise RestoreError(
                f"checkpoint {self.folder / str(step)} cannot be restored: {reason}; it was "
                "not changed. Fix the cause and run the same command, or choose another --output"
            ) from failure
        return result

    def check(self) -> None:
        """Raises CheckpointError where the last save has failed; waits for none that runs."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns once every started save is complete; CheckpointError where one has failed."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for running saves and closes the folder."""
        with self._explained():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            log.warning("%s", failed)  # what ended the run is on its way, and says more

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({first_line(error)}); those "
                "before it are intact: check that the disk is writable and has space, and run the "
                "same command to continue"
            ) from error

    def _set_aside(self, step: int, reason: str) -> None:
        """Moves a step out of the way; one process does, the others wait for it."""
        source, target = self.folder / str(step), self.folder / f"unreadable-{step}"
        log.warning(
            "checkpoint of step %d is damaged (%s); moved to %s, trying the one before",
            step,
            reason,
            target,
        )
        if writes():
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
        wait_for_all(f"set aside {step}")
        self._manager.reload()


class _Sealed(ocp.StandardCheckpointHandler):
    """Adds the checksums of the files, once all processes have written theirs.

    Orbax calls this in the thread that saves, on one process, before it renames the folder: the
    step is not complete without them, and training does not wait for them.
    """

    def finalize(self, directory: Any) -> None:
        """Completes the files beneath `directory`, then sums them."""
        super().finalize(directory)
        write_checksums(Path(directory))


def _heldout(metrics: Mapping[str, float]) -> float:
    value = metrics[HELDOUT]
    return value if math.isfinite(value) else math.inf


def _refuse_another_state(stored: Any, target: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless arrays of the same names, shapes and dtypes are stored."""
    found, wanted = _arrays(stored), _arrays(target)
    changed = [
        f"{name} is {found.get(name, 'absent')} in it and {wanted.get(name, 'absent')} in this run"
        for name in sorted({*found, *wanted})
        if found.get(name) != wanted.get(name)
    ]
    if changed:
        raise CheckpointError(
            f"its arrays differ from this run's ({len(changed)}: {', '.join(changed[:2])})"
        )


def _arrays(tree: Any) -> dict[str, str]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _target(state: TrainState, shardings: TrainState) -> TrainState:
    """Returns the shapes to read, and where to."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )
