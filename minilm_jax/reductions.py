"""Means that survive being split: every reduction in the project is a (total, count) pair."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Mean(NamedTuple):
    """A mean not yet divided, so that parts of a batch can be summed before they are.

    The mean of means is wrong as soon as the parts have different counts, and with ragged padding
    they always have.
    """

    total: Float[Array, "*shape"]
    """A vector where several things are counted alike, such as relation heads."""
    count: Float[Array, ""]  # type: ignore[assignment]  # tuples have a method of this name

    def value(self) -> Float[Array, "*shape"]:
        """Returns total / count, and 0 where nothing was counted."""
        # A count may be a sum of weights, and below 1.
        return self.total / jnp.where(self.count == 0, 1.0, self.count)


class Loss(NamedTuple):
    """What a loss function returns for its part of a batch."""

    terms: dict[str, Mean]
    """The loss is the sum of these means, each over the whole global batch."""
    metrics: dict[str, Mean]
    """Reported, not trained on."""
    counts: dict[str, Float[Array, ""]]
    """Summed over the global batch and reported per second, such as tokens."""

    def value(self) -> Float[Array, ""]:
        """Returns the sum of the terms' means."""
        return jnp.sum(jnp.stack([mean.value() for mean in self.terms.values()]))
