"""Checkpoints of the training state: asynchronous, the latest and the best, never half a one."""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from minilm_jax.errors import CheckpointError
from minilm_jax.train.hosts import any_process, wait_for_all, writes
from minilm_jax.train.state import TrainState

CHECKSUMS, HELDOUT = "checksums", "heldout"
FOLDS = 12
"""Slices of an array that are summed at once; from 16 on XLA no longer makes one loop of them."""
log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in one folder, written by Orbax.

    Orbax commits a step by renaming its finished folder, so a killed save leaves only a temporary
    folder, removed at the next start. Each holds checksums of its arrays beside them. A step that
    cannot be read back as it was written is set aside with a warning and the one before it is used.

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
        self._manager = ocp.CheckpointManager(self.folder, options=options)

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
                args=ocp.args.StandardSave(_sealed(state)),
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
        """Returns the latest readable state placed as `shardings` say, None where there is none.

        Args:
          state: a state of the right structure, shapes and dtypes; its values are not read.
          shardings: a tree of shardings like `state`.

        Raises:
          CheckpointError: there are checkpoints and none of them is readable.
        """
        target = _target(state, shardings)
        begun = self._manager.latest_step() is not None
        while (step := self._manager.latest_step()) is not None:
            read, damage = self._read(step, target)
            if not any_process(read is None):
                damage = _difference(read)
                if not damage:
                    return TrainState(**{name: read[name] for name in TrainState._fields})
            self._set_aside(step, damage or "by another process")
        if begun:
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read, see the warnings above; they were kept "
                "there as unreadable-STEP, and the next start begins anew"
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
            raise CheckpointError(f"{self.folder} holds no checkpoint with a held-out loss")
        read, damage = self._read(step, _target(state, shardings))
        if not any_process(read is None):
            damage = _difference(read)
        if any_process(bool(damage)):
            raise CheckpointError(
                f"{self.folder}: the best checkpoint, of step {step}, cannot be read ({damage}); "
                "--train.export last --override train.export exports the last one"
            )
        return step, TrainState(**{name: read[name] for name in TrainState._fields})

    def _read(self, step: int, target: TrainState) -> tuple[Any, str]:
        """Returns what the step holds, or None and why it cannot be read."""
        mine = jax.process_index()
        # Alone: a process that fails must not leave the others waiting for it inside Orbax.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
        )
        options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
        sums = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target.step.sharding),
            jax.eval_shape(_checksums, target._asdict()),
        )
        try:
            with ocp.CheckpointManager(self.folder, options=options) as manager:
                return manager.restore(
                    step, args=ocp.args.StandardRestore({**target._asdict(), CHECKSUMS: sums})
                ), ""
        except Exception as error:
            return None, _first_line(error)

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

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({_first_line(error)}); those "
                "before it are intact: make sure that the disk has room and can be written to, "
                "and run the same command to continue"
            ) from error

    def _set_aside(self, step: int, reason: str) -> None:
        """Moves a step out of the way; one process does, the others wait for it."""
        source, target = self.folder / str(step), self.folder / f"unreadable-{step}"
        log.warning(
            "checkpoint of step %d cannot be read (%s); moved to %s, trying the one before",
            step,
            reason,
            target,
        )
        if writes():
            shutil.rmtree(target, ignore_errors=True)
            source.rename(target)
        wait_for_all(f"set aside {step}")
        self._manager.reload()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _heldout(metrics: Mapping[str, float]) -> float:
    value = metrics[HELDOUT]
    return value if math.isfinite(value) else math.inf


def _target(state: TrainState, shardings: TrainState) -> TrainState:
    """Returns the shapes to read, and where to."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        shardings,
    )


def _sealed(state: TrainState) -> dict[str, Any]:
    """Returns what is written: the state, and beside it the checksum of each array."""
    return {**state._asdict(), CHECKSUMS: _checksums(state._asdict())}


def _difference(read: dict[str, Any]) -> str:
    """Returns which array is not what was written, "" where all are."""
    arrays = {name: value for name, value in read.items() if name != CHECKSUMS}
    found, written = jax.device_get((_checksums(arrays), read[CHECKSUMS]))
    for name, sums in found.items():
        paths = [path for path, _ in jax.tree.leaves_with_path({name: arrays[name]})]
        for path, now, then in zip(paths, sums, written[name], strict=True):
            if now != then:
                return f"{jax.tree_util.keystr(path)} has a wrong checksum"
    return ""


@jax.jit
def _checksums(trees: dict[str, Any]) -> dict[str, jax.Array]:
    """Returns for each array of each tree a sum modulo 2³² of its bits, the same on any devices.

    Orbax's files of arrays have none of their own: a flipped bit would pass for a parameter. The
    weights are odd, so that no change of a single element leaves the sum as it was. One vector a
    tree, because every array more is more for training to wait for.
    """

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
        position = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            position = position * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        weighted = bits.astype(jnp.uint32) * (2 * position + 1)
        # XLA's CPU backend adds slices far faster than it reduces an axis, and training waits.
        rows = x.shape[0] // FOLDS if x.ndim else 0
        folded = [weighted[i * rows : (i + 1) * rows] for i in range(FOLDS)] if rows else []
        parts = [sum(folded[1:], folded[0]), weighted[FOLDS * rows :]] if folded else [weighted]
        return sum((jnp.sum(x, dtype=jnp.uint32) for x in parts), jnp.uint32(0))

    return {
        name: jnp.stack([checksum(x) for x in jax.tree.leaves(tree)])
        for name, tree in trees.items()
        if jax.tree.leaves(tree)  # plain SGD carries nothing
    }


def read_params(folder: Path, params: Any) -> Any:
    """Returns only the parameters of the latest checkpoint, for fine-tuning and export.

    Args:
      folder: a run's `checkpoints` folder.
      params: a tree of the right structure (arrays or ShapeDtypeStructs).
    """
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{folder} holds no complete checkpoint")
        target = {"params": params}
        target[CHECKSUMS] = jax.eval_shape(_checksums, target)
        # As numpy: where they go is the caller's business, not the saving run's.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        read = manager.restore(
            step,
            args=ocp.args.PyTreeRestore(target, restore_args=as_numpy, partial_restore=True),
        )
    damage = _difference(read)
    if damage:
        raise CheckpointError(f"{folder}, step {step}: {damage}")
    return read["params"]
