"""Embedding tables."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minilm_jax.cpu import zeros_not_before
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.rows import vary_like


class Embed(nn.Module):
    """A table of vectors, initialised as BERT is (Devlin et al. 2019): truncated normal."""

    rows: int
    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Int[Array, "*n"]) -> Float[Array, "*n D"]:
        """Returns the vectors of the ids in fp32; NaN beyond the table."""
        init = nn.initializers.truncated_normal(self.config.initializer_range)
        shape = self.rows, self.config.hidden_size
        table = jnp.asarray(self.param("embedding", init, shape, jnp.float32))
        if self.rows == 1:
            return jnp.broadcast_to(table, (*ids.shape, shape[1]))
        return _look_up(self.rows, vary_like(table.astype(jnp.float32), like=ids), ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(rows: int, table: Float[Array, "V D"], ids: Int[Array, "*n"]) -> Float[Array, "*n D"]:
    return jnp.take(table, ids, axis=0)


def _forward(rows: int, table: Array, ids: Array) -> tuple[Array, Array]:
    return _look_up(rows, table, ids), ids


def _backward(rows: int, ids: Array, cotangent: Array) -> tuple[Array, None]:
    # Zeros of a whole table are much to have around through the backward pass.
    zeros = zeros_not_before(cotangent, (rows, cotangent.shape[-1]))
    return zeros.at[ids].add(cotangent), None


_look_up.defvjp(_forward, _backward)
