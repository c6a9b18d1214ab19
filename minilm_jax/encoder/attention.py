"""Self-attention over segments: projections first, then attention.

B batch, L tokens, D width, H heads, K head width.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minilm_jax.encoder.config import Attention, EncoderConfig
from minilm_jax.encoder.dense import Dense, affine
from minilm_jax.encoder.dot_product import dot_product_attention
from minilm_jax.encoder.dropout import row_words
from minilm_jax.rows import traced_platform


class Projections(NamedTuple):
    """Queries, keys and values of one layer, heads merged: what MiniLM compares."""

    query: Float[Array, "B L D"]
    key: Float[Array, "B L D"]
    value: Float[Array, "B L D"]


class SelfAttention(nn.Module):
    """Multi-head self-attention in two steps: `project`, then `attend`.

    They are apart because distillation stops the last needed layer after the first.
    """

    config: EncoderConfig
    dtype: DTypeLike
    implementation: Attention = "auto"

    def setup(self) -> None:
        """Declares the four dense layers."""
        width = self.config.hidden_size
        self.query, self.key, self.value, self.output = (
            Dense(width, self.config, self.dtype) for _ in range(4)
        )

    def project(self, hidden: Float[Array, "B L D"]) -> Projections:
        """Returns queries, keys and values with heads merged."""
        width, layers = hidden.shape[-1], (self.query, self.key, self.value)
        parameters = [layer.parameters(width) for layer in layers]
        if traced_platform() != "gpu":
            return Projections(*(affine(hidden, *part, dtype=self.dtype) for part in parameters))
        # One product three times as wide reads its input once. A CPU gains less by it than it takes
        # to put the kernels side by side, a TPU less than to cut what attention's kernels read.
        kernel, bias = (jnp.concatenate(part, axis=-1) for part in zip(*parameters, strict=True))
        projected = affine(hidden, kernel, bias, dtype=self.dtype)
        return Projections(*jnp.split(projected, 3, axis=-1))

    def attend(
        self,
        projections: Projections,
        *,
        segments: Int[Array, "B L"],
        rows: Int[Array, "B"],
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        """Returns softmax(Q Kᵀ / √K) V over the allowed keys, through the output projection."""
        rate = self.config.attention_probs_dropout_prob
        drops = rate > 0.0 and not deterministic
        mixed = dot_product_attention(
            *projections,
            segments=segments,
            heads=self.config.num_attention_heads,
            dropout_rate=rate,
            words=row_words(self.make_rng("dropout"), rows) if drops else None,
            implementation=self.implementation,
        )
        return self.output(mixed)
