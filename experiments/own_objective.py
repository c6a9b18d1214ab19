"""An objective of your own in one file: distil last hidden states instead of relations.

command   minilm-jax distill experiments/own_objective.py
hardware  as for experiments/quickstart.py, whose teacher, text and student it uses

Everything the engine needs is below; docs/distillation.md explains the pieces. The fields of the
class become command-line options (--objective.weight 2).
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from quickstart import config as quickstart

from minilm_jax.distill.objective import Objective
from minilm_jax.distill.objectives import mean_squared_error
from minilm_jax.encoder.encoder import encode
from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Loss
from minilm_jax.settings import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiddenStates(Objective):
    """Mean squared error of the last hidden states, for student and teacher of the same width."""

    weight: Weight = 1.0

    def check(self, teacher, student):
        """Raises ConfigError if the widths differ."""
        if teacher.hidden_size != student.hidden_size:
            raise ConfigError(f"widths differ: {student.hidden_size}, {teacher.hidden_size}")

    def make_loss(self, teacher, student, compute):
        """Returns the loss function."""

        def loss(ours, theirs, batch, key):
            wanted = encode(teacher, theirs["encoder"], batch, compute=compute)
            found = encode(student, ours["encoder"], batch, compute=compute, key=key)
            error = mean_squared_error(
                found.last_hidden_state,
                wanted.last_hidden_state,
                segments=batch["segments"],
                weight=self.weight,
            )
            tokens = jnp.sum(batch["segments"] > 0, dtype=jnp.float32)
            return Loss(terms={"hidden": error}, metrics={}, counts={"tokens": tokens})

        return loss


config = dataclasses.replace(quickstart, objective=HiddenStates(), output=Path("runs/own"))
