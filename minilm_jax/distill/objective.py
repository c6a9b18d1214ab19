"""What the distillation job asks of an objective; docs/distillation.md adds one in one file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm_jax.data.masking import MaskingConfig
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Loss, Mean
from minilm_jax.settings import Settings

_ENGINES_NAMES = frozenset(
    {"step", "loss", "grad_norm", "finite", "counts", "learning_rate", "heldout"}
)
Params = Mapping[str, Any]
"""By module: `{"encoder": …}`, and heads or projections beside it."""
Batch = Mapping[str, Array]
LossFunction = Callable[[Params, Params, Batch, Array | None], Loss]
"""loss(student params, teacher params, batch, key) of a part of a batch; key None: no dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(Settings, name="objective"):
    """A way to compare student and teacher; only `make_loss` has no default.

    A frozen dataclass without fields, so that a subclass's fields become command line options.
    """

    def make_loss(
        self, teacher: EncoderConfig, student: EncoderConfig, compute: Compute
    ) -> LossFunction:
        """Returns the loss function of a pair of shapes."""
        raise ConfigError(f"objective {type(self).__name__} has no make_loss: docs/distillation.md")

    def check(self, teacher: EncoderConfig, student: EncoderConfig) -> None:
        """Raises ConfigError where the two do not fit the objective."""

    def teacher_heads(self) -> tuple[str, ...]:
        """Returns the heads the teacher must have, such as "mlm"."""
        return ()

    def masking(self) -> MaskingConfig | None:
        """Returns how tokens are masked; None where the text is read as it is."""
        return None

    def heldout_name(self) -> str:
        """Returns what a run calls its held-out loss."""
        return "loss"

    def for_flop_count(self) -> "Objective":
        """Returns the same loss without loops of unknown length, whose FLOPs can be counted."""
        return self

    def new_params(self, key: Array, teacher: EncoderConfig, student: EncoderConfig) -> Params:
        """Returns fresh parameters trained beside the encoder: heads, learned projections."""
        return {}


def batch_counts(batch: Batch) -> dict[str, Float[Array, ""]]:
    """Returns what a batch holds, for `Loss.counts`: tokens, and documents or pieces of them."""
    segments = batch["segments"]
    return {
        "tokens": jnp.sum(segments > 0, dtype=jnp.float32),
        # A row's segments are numbered from 1.
        "documents": jnp.sum(segments.max(-1), dtype=jnp.float32),
    }


def check_loss(loss: Any) -> None:
    """Raises ConfigError where what a loss function returned is no `Loss` of means and counts.

    For functions that others write, while they are traced.
    """
    if not isinstance(loss, Loss) or not all(isinstance(part, dict) for part in loss):
        raise ConfigError(
            f"the objective's loss returns {_describe(loss)}: give "
            "Loss(terms={name: Mean(total, count)}, metrics={…}, counts={…}), each a dict"
        )
    if not loss.terms:
        raise ConfigError("the objective's loss has no term: there is nothing to train on")
    for name, mean in [*loss.terms.items(), *loss.metrics.items()]:
        if not isinstance(mean, Mean):
            raise ConfigError(
                f"the objective's {name!r} is {_describe(mean)}: give Mean(total, count), a sum "
                "and what it is divided by"
            )
        if jnp.shape(mean.count):
            raise ConfigError(
                f"the count of the objective's {name!r} is {_describe(mean.count)}: give a number"
            )
    for name, mean in loss.terms.items():
        if jnp.shape(mean.total) or not jnp.issubdtype(jnp.result_type(mean.total), jnp.floating):
            raise ConfigError(
                f"the total of the objective's term {name!r} is {_describe(mean.total)}: give "
                "the sum, a floating-point number"
            )
    for name, count in loss.counts.items():
        if jnp.shape(count):
            raise ConfigError(
                f"the objective's count {name!r} is {_describe(count)}: give the sum, a number"
            )
    twice = loss.terms.keys() & loss.metrics.keys()
    taken = (loss.terms.keys() | loss.metrics.keys()) & _ENGINES_NAMES
    if twice or taken:
        why = "stands for a term and a metric" if twice else "is one of the engine's own"
        raise ConfigError(
            f"the objective's name {min(twice or taken)!r} {why}: choose another, metrics.jsonl "
            "has one place for each"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Loss):
        return "a Loss of " + ", ".join(
            f"{name}: {type(part).__name__}" for name, part in value._asdict().items()
        )
    shape = getattr(value, "shape", None)
    if shape is None:
        return "None" if value is None else f"a {type(value).__name__}"
    return f"{value.dtype}{list(shape)}"
