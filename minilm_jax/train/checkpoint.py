"""Checkpoints of the training state: asynchronous, the latest few, never half a one."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from minilm_jax.errors import CheckpointError
from minilm_jax.train.state import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in one folder, written by Orbax.

    Orbax commits a step by renaming its finished folder, so a killed save leaves only a temporary
    folder, removed at the next start. A step that cannot be read back is set aside with a warning
    and the one before it is used.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        """Opens or creates the folder."""
        self.folder = folder.absolute()  # Orbax fails on relative paths, late and from a thread.
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)

    def save(self, step: int, state: TrainState) -> None:
        """Starts writing the state of `step`; returns once it is copied, not once it is written."""
        saved = self._manager.save(step, args=ocp.args.StandardSave(state))
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
        """
        target = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            state,
            shardings,
        )
        while (step := self._manager.latest_step()) is not None:
            try:
                return self._manager.restore(step, args=ocp.args.StandardRestore(target))
            except Exception as error:
                # Orbax raises bare Exceptions with kilobytes of text: one line is enough.
                first_line = str(error).strip().partition("\n")[0][:200]
                self._set_aside(step, first_line)
        return None

    def wait(self) -> None:
        """Returns once every started save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for running saves and closes the folder."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_aside(self, step: int, reason: str) -> None:
        source, target = self.folder / str(step), self.folder / f"unreadable-{step}"
        log.warning(
            "checkpoint of step %d cannot be read (%s); moved to %s, trying the one before",
            step,
            reason,
            target,
        )
        self._manager.close()
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)


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
        # As numpy: where they go is the caller's business, not the saving run's.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        restored = manager.restore(
            step,
            args=ocp.args.PyTreeRestore(target, restore_args=as_numpy, partial_restore=True),
        )
        return restored["params"]
