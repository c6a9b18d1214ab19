"""The dense layer of every encoder and head."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.rows import vary_like


class Dense(nn.Module):
    """x W + b, initialised as BERT is (Devlin et al. 2019): truncated normal kernel, zero bias."""

    features: int
    config: EncoderConfig
    dtype: DTypeLike

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n F"]:
        """Returns the layer's output in its dtype."""
        return affine(x, *self.parameters(x.shape[-1]), dtype=self.dtype)

    @nn.compact
    def parameters(self, width: int) -> tuple[Float[Array, "D F"], Float[Array, " F"]]:
        """Returns (kernel, bias) in fp32, for a caller that multiplies several layers at once."""
        init = nn.initializers.truncated_normal(self.config.initializer_range)
        kernel = self.param("kernel", init, (width, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return jnp.asarray(kernel), jnp.asarray(bias)  # numpy, where they were just read


def affine(
    x: Float[Array, "*n D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"], dtype: DTypeLike
) -> Float[Array, "*n F"]:
    """Returns x W + b, computed in `dtype`; gradients of W and b are summed over tokens in fp32.

    Left to itself JAX would give W's the dtype of the product: XLA would add up what the devices of
    a mesh found in bf16, which no longer grows by what is 256 times smaller.
    """
    kernel, bias = vary_like((kernel, bias), like=x)
    return _affine(jnp.dtype(dtype), x, kernel, bias)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _affine(dtype: jnp.dtype, x: Array, kernel: Array, bias: Array) -> Float[Array, "*n F"]:
    product = _one_matrix(x).astype(dtype) @ kernel.astype(dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1]) + bias.astype(dtype)


def _forward(
    dtype: jnp.dtype, x: Array, kernel: Array, bias: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _affine(dtype, x, kernel, bias), (x, kernel, bias)


def _backward(
    dtype: jnp.dtype, arrays: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    return affine_gradients(*arrays, cotangent=cotangent, dtype=dtype)


_affine.defvjp(_forward, _backward)


def affine_gradients(
    x: Float[Array, "*n D"],
    kernel: Float[Array, "D F"],
    bias: Float[Array, " F"],
    *,
    cotangent: Float[Array, "*n F"],
    dtype: DTypeLike,
) -> tuple[Float[Array, "*n D"], Float[Array, "D F"], Float[Array, " F"]]:
    """Returns the gradients of x, W and b, each in the dtype of what it is of."""
    slope = _one_matrix(cotangent)
    of_x = jnp.einsum("nf,df->nd", slope, kernel.astype(dtype)).reshape(x.shape)
    # In this order, as JAX would: XLA's CPU backend takes longer for x's transpose.
    of_kernel = jnp.einsum(
        "nf,nd->fd", slope, _one_matrix(x).astype(dtype), preferred_element_type=kernel.dtype
    ).T
    of_bias = cotangent.astype(bias.dtype).sum(tuple(range(cotangent.ndim - 1)))
    return of_x.astype(x.dtype), of_kernel, of_bias


def _one_matrix(x: Float[Array, "*n D"]) -> Float[Array, "N D"]:
    """Returns one matrix of all tokens.

    From [B, L, D] XLA's CPU backend would make the kernel's gradient by transposing the output's,
    which takes up to 2.5 times as long.
    """
    return x.reshape(-1, x.shape[-1])
