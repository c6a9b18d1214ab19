"""A block's feed-forward network, whose gradient keeps the activation's input alone."""

from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minilm_jax.cpu import not_before
from minilm_jax.encoder.activations import ACTIVATIONS
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.dense import Dense, affine, affine_gradients
from minilm_jax.rows import vary_like


class FeedForward(nn.Module):
    """Two dense layers around the activation."""

    config: EncoderConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Declares the two dense layers."""
        self.up = Dense(self.config.intermediate_size, self.config, self.dtype)
        self.down = Dense(self.config.hidden_size, self.config, self.dtype)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns down(act(up(hidden)))."""
        inner, down = self.up(hidden), self.down.parameters(self.config.intermediate_size)
        down = vary_like(down, like=inner)
        return _activated_affine(self.config.hidden_act, self.dtype, inner, *down)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _activated_affine(
    activation: str, dtype: DTypeLike, x: Array, kernel: Array, bias: Array
) -> Float[Array, "B L D"]:
    return affine(ACTIVATIONS[activation](x), kernel, bias, dtype=dtype)


def _forward(activation: str, dtype: DTypeLike, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _activated_affine(activation, dtype, *arrays), arrays


def _backward(
    activation: str, dtype: DTypeLike, arrays: tuple[Array, ...], cotangent: Array
) -> tuple[Array, ...]:
    x, kernel, bias = arrays
    y, differentiate = jax.vjp(ACTIVATIONS[activation], not_before(cotangent, x))
    # By its formula, not by JAX: that would trace the product of the forward pass once more.
    of_y, of_kernel, of_bias = affine_gradients(y, kernel, bias, cotangent=cotangent, dtype=dtype)
    return *differentiate(of_y), of_kernel, of_bias


_activated_affine.defvjp(_forward, _backward)
