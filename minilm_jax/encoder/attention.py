"""Self-attention over segments, and the dropout that does not depend on the device count.

Several layouts meet here, so arrays carry their shape: B batch, L tokens, D width,
H heads, K head width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minilm_jax.encoder.config import EncoderConfig


class Projections(NamedTuple):
    """Queries, keys and values of one layer, heads merged: what MiniLM compares."""

    query: Float[Array, "B L D"]
    key: Float[Array, "B L D"]
    value: Float[Array, "B L D"]


class RowDropout(nn.Module):
    """Dropout whose mask is a function of (key, module path, global row), not of the batch's split.

    The same global batch is dropped the same way on one device and on 256, which is what makes runs
    comparable across device counts. 16 random bits an element halve the cost of 32; the rate is
    then exact to 1.5e-5.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ..."], *, rows: Int[Array, "B"], deterministic: bool
    ) -> Float[Array, "B ..."]:
        """Returns `x` with elements dropped at `rate` and the rest scaled by 1 / (1 - rate)."""
        if deterministic or self.rate == 0.0:
            return x
        key = self.make_rng("dropout")
        row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
        bits = jax.vmap(lambda k: jax.random.bits(k, x.shape[1:], jnp.uint16))(row_keys)
        keep = bits >= jnp.uint16(round(self.rate * 65536))
        return jnp.where(keep, x / jnp.asarray(1.0 - self.rate, x.dtype), jnp.zeros_like(x))


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
        self.query = dense(self.config.hidden_size, self.config, self.dtype)
        self.key = dense(self.config.hidden_size, self.config, self.dtype)
        self.value = dense(self.config.hidden_size, self.config, self.dtype)
        self.output = dense(self.config.hidden_size, self.config, self.dtype)
        self.dropout = RowDropout(self.config.attention_probs_dropout_prob)

    def project(self, hidden: Float[Array, "B L D"]) -> Projections:
        """Returns queries, keys and values with heads merged."""
        return Projections(query=self.query(hidden), key=self.key(hidden), value=self.value(hidden))

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
