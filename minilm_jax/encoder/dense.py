"""The dense layer of every encoder and head."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minilm_jax.encoder.config import EncoderConfig


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
    """Returns x W + b, computed in `dtype`; the bias's gradient is summed over tokens in fp32."""
    product = multiply(x, kernel, dtype)
    # Broadcast first, then cast: transposed, the cotangent is cast before it is summed.
    return product + jnp.broadcast_to(bias, product.shape).astype(dtype)


def multiply(
    x: Float[Array, "*n D"], kernel: Float[Array, "D F"], dtype: DTypeLike
) -> Float[Array, "*n F"]:
    """Returns x W, computed in `dtype`."""
    # One matrix of all tokens. From [B, L, D] XLA's CPU backend would make the kernel's gradient by
    # transposing the output's, which takes up to 2.5 times as long.
    product = x.astype(dtype).reshape(-1, x.shape[-1]) @ kernel.astype(dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])
