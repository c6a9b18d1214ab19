"""Self-attention over segments, and the dropout that does not depend on the device count.

Several layouts meet here, so arrays carry their shape: B batch, L tokens, D width,
H heads, K head width.
"""

import math
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from minilm_jax.encoder.config import EncoderConfig


class Projections(NamedTuple):
    """Queries, keys and values of one layer, heads merged: what MiniLM compares."""

    query: Float[Array, "B L D"]
    key: Float[Array, "B L D"]
    value: Float[Array, "B L D"]


class RowDropout(nn.Module):
    """Dropout whose mask is a function of (key, module path, global row), not of the batch's split.

    The same global batch is dropped the same way on one device and on 256, which is what makes runs
    comparable across device counts.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ..."], *, rows: Int[Array, "B"], deterministic: bool
    ) -> Float[Array, "B ..."]:
        """Returns `x` with elements dropped at `rate` and the rest scaled by 1 / (1 - rate)."""
        if deterministic or self.rate == 0.0:
            return x
        return drop(x, row_words(self.make_rng("dropout"), rows), self.rate)


def row_words(key: Array, rows: Int[Array, "B"]) -> UInt32[Array, "B 2"]:
    """Returns two random words for each row of the global batch, which seed its dropout."""
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (2,)))(rows)


def kept(
    words: UInt32[Array, "B 2"], shape: tuple[int, ...], rate: float, *, first: Array | int = 0
) -> Bool[Array, "B ..."]:
    """Returns which elements of rows of this shape dropout keeps.

    The bits of element i are those of SplitMix (Steele, Lea and Flood, OOPSLA 2014) in 32 bits: a
    Weyl sequence start + i · step, whose start and odd step are the row's words, through the mixing
    function of MurmurHash3. That is a sixth of the arithmetic of Threefry, of which dropout needs
    neither the period nor the strength, and it fuses with what uses it: no bits are ever stored.

    Args:
      words: of each row.
      shape: of one row.
      rate: share that is dropped, exact to 2^-32.
      first: index of the first element, where this is a part of a row.
    """
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) + jnp.uint32(first)
    start, step = (words[:, i].reshape(-1, *[1] * len(shape)) for i in (0, 1))
    bits = start + index * (step | 1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    return bits >= jnp.uint32(round(rate * 2**32))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(
    x: Float[Array, "B ..."], words: UInt32[Array, "B 2"], rate: float
) -> Float[Array, "B ..."]:
    """Returns `x` with elements dropped; the gradient draws the mask again rather than keep it."""
    scale = jnp.asarray(1 / (1 - rate), x.dtype)
    return jnp.where(kept(words, x.shape[1:], rate), x * scale, jnp.zeros_like(x))


def _drop_forward(x: Array, words: Array, rate: float) -> tuple[Array, Array]:
    return drop(x, words, rate), words


def _drop_backward(rate: float, words: Array, cotangent: Array) -> tuple[Array, None]:
    return drop(cotangent, words, rate), None


drop.defvjp(_drop_forward, _drop_backward)


def segment_mask(segments: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Returns which key (last axis) each query may see: those of its own segment.

    Padding (segment 0) sees padding, so that no row is empty and nothing becomes NaN; its outputs
    are never used.
    """
    return segments[:, :, None] == segments[:, None, :]


class SelfAttention(nn.Module):
    """Multi-head self-attention in two steps: `project`, then `attend`.

    They are apart because distillation stops the last needed layer after the first.
    """

    config: EncoderConfig
    dtype: DTypeLike

    def setup(self) -> None:
        """Declares the four dense layers."""
        self.query, self.key, self.value = (Affine(self.config) for _ in range(3))
        self.output = dense(self.config.hidden_size, self.config, self.dtype)
        self.dropout = RowDropout(self.config.attention_probs_dropout_prob)

    def project(self, hidden: Float[Array, "B L D"]) -> Projections:
        """Returns queries, keys and values with heads merged."""
        layers = [layer(hidden.shape[-1]) for layer in (self.query, self.key, self.value)]
        # One product three times as wide keeps matrix units and caches busier than three.
        kernel, bias = (jnp.concatenate(part, axis=-1) for part in zip(*layers, strict=True))
        projected = hidden.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return Projections(*jnp.split(projected, 3, axis=-1))

    def attend(
        self,
        projections: Projections,
        *,
        mask: Bool[Array, "B L L"],
        rows: Int[Array, "B"],
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        """Returns softmax(Q Kᵀ / √K) V over the allowed keys, through the output projection."""
        H, K = self.config.num_attention_heads, self.config.head_size
        q_BxHxLxK = _split_heads(projections.query, H) * jnp.asarray(K**-0.5, self.dtype)
        k_BxHxLxK = _split_heads(projections.key, H)
        v_BxHxLxK = _split_heads(projections.value, H)
        logits_BxHxLxL = jnp.einsum(
            "bhqk,bhlk->bhql", q_BxHxLxK, k_BxHxLxK, preferred_element_type=jnp.float32
        )
        logits_BxHxLxL = jnp.where(mask[:, None], logits_BxHxLxL, -jnp.inf)
        # The maximum cancels in the quotient: it only keeps exp in range.
        peak = jax.lax.stop_gradient(logits_BxHxLxL.max(axis=-1, keepdims=True))
        weights_BxHxLxL = jnp.exp(logits_BxHxLxL - peak)
        # Normalising after the value product divides L x K numbers instead of L x L.
        total_BxHxLx1 = weights_BxHxLxL.sum(axis=-1, keepdims=True)
        weights_BxHxLxL = self.dropout(weights_BxHxLxL, rows=rows, deterministic=deterministic)
        mixed_BxHxLxK = jnp.einsum(
            "bhql,bhlk->bhqk",
            weights_BxHxLxL.astype(self.dtype),
            v_BxHxLxK,
            preferred_element_type=jnp.float32,
        )
        mixed_BxHxLxK = (mixed_BxHxLxK / total_BxHxLx1).astype(self.dtype)
        return self.output(_merge_heads(mixed_BxHxLxK))


class Affine(nn.Module):
    """The parameters of a square dense layer, for a caller that multiplies several at once."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, width: int) -> tuple[Float[Array, "D D"], Float[Array, " D"]]:
        """Returns (kernel, bias), initialised as `dense` does."""
        init = nn.initializers.truncated_normal(self.config.initializer_range)
        kernel = self.param("kernel", init, (width, width), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, (width,), jnp.float32)


def dense(
    features: int, config: EncoderConfig, dtype: DTypeLike, name: str | None = None
) -> nn.Dense:
    """Returns a dense layer as BERT initialises it: truncated normal kernel, zero bias."""
    init = nn.initializers.truncated_normal(config.initializer_range)
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def _split_heads(x_BxLxD: Float[Array, "B L D"], heads: int) -> Float[Array, "B H L K"]:
    B, L, D = x_BxLxD.shape
    return x_BxLxD.reshape(B, L, heads, D // heads).transpose(0, 2, 1, 3)


def _merge_heads(x_BxHxLxK: Float[Array, "B H L K"]) -> Float[Array, "B L D"]:
    B, H, L, K = x_BxHxLxK.shape
    return x_BxHxLxK.transpose(0, 2, 1, 3).reshape(B, L, H * K)
