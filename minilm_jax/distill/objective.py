"""What the distillation job asks of an objective; docs/distillation.md adds one in one file."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm_jax.data.masking import MaskingConfig
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.reductions import Loss

Params = Mapping[str, Any]
"""By module: `{"encoder": …}`, and heads or projections beside it."""
Batch = Mapping[str, Array]
ParamPath = tuple[str, ...]
"""The names on the way to a parameter, or to a module of them: `("encoder", "layer_0", "ffn")`."""
LossFunction = Callable[[Params, Params, Batch, Array | None], Loss]
"""loss(student params, teacher params, batch, key) of a part of a batch; key None: no dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A way to compare student and teacher; only `make_loss` has no default.

    A frozen dataclass without fields, so that a subclass's fields become command line options.
    """

    def make_loss(
        self, teacher: EncoderConfig, student: EncoderConfig, compute: Compute
    ) -> LossFunction:
        """Returns the loss function of a pair of shapes."""
        raise NotImplementedError

    def check(self, teacher: EncoderConfig, student: EncoderConfig) -> None:
        """Raises ConfigError where the two do not fit the objective."""

    def unreached(self, student: EncoderConfig) -> tuple[ParamPath, ...]:
        """Returns path prefixes of the student's parameters that get no gradient."""
        return ()

    def teacher_layers(self, teacher: EncoderConfig) -> int:
        """Returns how many of the teacher's layers are run; the others are never loaded."""
        return teacher.num_hidden_layers

    def teacher_heads(self) -> tuple[str, ...]:
        """Returns the heads the teacher must have, such as "mlm"."""
        return ()

    def masking(self) -> MaskingConfig | None:
        """Returns how tokens are masked; None where the text is read as it is."""
        return None

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
