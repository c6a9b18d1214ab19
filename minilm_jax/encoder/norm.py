"""LayerNorm whose gradient keeps the input and two numbers a token."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minilm_jax.cpu import not_before
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.rows import vary_like


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al., arXiv 1607.06450) of the last axis, in fp32 inside."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """Returns (x - mean) / √(variance + ε) · scale + bias in its dtype."""
        width = (x.shape[-1],)
        scale = jnp.asarray(self.param("scale", nn.initializers.ones, width, jnp.float32))
        bias = jnp.asarray(self.param("bias", nn.initializers.zeros, width, jnp.float32))
        scale, bias = vary_like((scale, bias), like=x)
        return _layer_norm(self.config.layer_norm_eps, jnp.dtype(self.dtype), x, scale, bias)


class _Residuals(NamedTuple):
    x: Float[Array, "*n D"]
    mean: Float[Array, "*n 1"]
    inverse: Float[Array, "*n 1"]
    """1 / √(variance + ε)."""
    scale: Float[Array, " D"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _layer_norm(
    epsilon: float, dtype: jnp.dtype, x: Array, scale: Array, bias: Array
) -> Float[Array, "*n D"]:
    return _forward(epsilon, dtype, x, scale, bias)[0]


def _forward(
    epsilon: float, dtype: jnp.dtype, x: Array, scale: Array, bias: Array
) -> tuple[Array, _Residuals]:
    exact = x.astype(jnp.float32)
    mean = exact.mean(axis=-1, keepdims=True)
    # E[x²] - E[x]², one pass less, loses digits that parity with PyTorch needs.
    variance = jnp.square(exact - mean).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    y = (exact - mean) * (inverse * scale) + bias
    return y.astype(dtype), _Residuals(x, mean, inverse, scale)


def _backward(
    epsilon: float, dtype: jnp.dtype, residuals: _Residuals, cotangent: Array
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = not_before(cotangent, residuals)
    slope = cotangent.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    tokens = tuple(range(slope.ndim - 1))
    of_scale, of_bias = (slope * normal).sum(tokens), slope.sum(tokens)
    slope = slope * scale
    along = (slope * normal).mean(axis=-1, keepdims=True)
    of_x = (slope - slope.mean(axis=-1, keepdims=True) - normal * along) * inverse
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(scale.dtype)


_layer_norm.defvjp(_forward, _backward)
