"""What stands on an encoder: masked LM, classifiers, spans, pooler, and sentence embeddings.

Logits are computed in fp32: bf16 numbers from 4 to 8 are 1/32 apart, and scores that lie closer
would be ties, which the first class or token wins.

Each head is applied to hidden states with its own parameters; the families' differences (which
layers, which activation) are decided here by `config.model_type`, so callers see one interface.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minilm_jax.encoder.activations import ACTIVATIONS
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.dense import Dense
from minilm_jax.encoder.dropout import RowDropout
from minilm_jax.encoder.norm import LayerNorm

Pooling = Literal["mean", "cls"]


class Pooler(nn.Module):
    """BERT's pooler: tanh(W h₁ + b) of the first token."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        """Returns one vector per row."""
        return jnp.tanh(
            Dense(self.config.hidden_size, self.config, self.dtype, name="dense")(hidden[:, 0])
        )


class MaskedLM(nn.Module):
    """Scores of every vocabulary entry; the decoder is the word embedding table (tied)."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*n D"], *, word_embeddings: Float[Array, "V D"]
    ) -> Float[Array, "*n V"]:
        """Returns fp32 logits: E norm(act(W h + b)) + c; XLM has the decoder alone.

        Args:
          hidden: states of any tokens; gather the masked ones first, the logits are large.
          word_embeddings: the encoder's table, `embeddings/word/embedding`.
        """
        config = self.config
        if config.model_type != "xlm":
            # RoBERTa's head has its own GELU whatever hidden_act says.
            fixed = config.model_type in ("roberta", "xlm-roberta")
            activation = ACTIVATIONS["gelu" if fixed else config.hidden_act]
            hidden = activation(Dense(config.hidden_size, config, self.dtype, name="dense")(hidden))
            hidden = LayerNorm(config, self.dtype, name="norm")(hidden)
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), jnp.float32)
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden.astype(self.dtype),
            word_embeddings.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits + bias


class NextSentence(nn.Module):
    """BERT's next-sentence scores, from the pooler's output."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, pooled: Float[Array, "B D"]) -> Float[Array, "B 2"]:
        """Returns the logits of "B follows A" and "B is random"."""
        return Dense(2, self.config, jnp.float32, name="output")(pooled)


class SequenceClassifier(nn.Module):
    """Class scores of a row, from its first token.

    BERT: output(drop(tanh(dense(h₁)))), the dense layer being its pooler. RoBERTa and XLM-R:
    output(drop(tanh(dense(drop(h₁))))). DistilBERT: output(drop(relu(dense(h₁)))). XLM:
    output(drop(h₁)).
    """

    config: EncoderConfig
    classes: int
    dropout: float | None = None
    """Rate; None takes hidden_dropout_prob."""
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        *,
        rows: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B C"]:
        """Returns logits; `rows` is needed unless deterministic, as in the encoder."""
        config, family = self.config, self.config.model_type
        drop = _Drop(self.dropout, config)
        first = hidden[:, 0]
        if family in ("roberta", "xlm-roberta", "xlm"):
            first = drop(first, rows=rows, deterministic=deterministic)
        if family != "xlm":
            squash = jax.nn.relu if family == "distilbert" else jnp.tanh
            first = squash(Dense(config.hidden_size, config, self.dtype, name="dense")(first))
            first = drop(first, rows=rows, deterministic=deterministic)
        return Dense(self.classes, config, jnp.float32, name="output")(first)


class TokenClassifier(nn.Module):
    """Class scores of every token: output(drop(h))."""

    config: EncoderConfig
    classes: int
    dropout: float | None = None
    """Rate; None takes hidden_dropout_prob."""

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        *,
        rows: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B L C"]:
        """Returns logits; `rows` is needed unless deterministic, as in the encoder."""
        hidden = _Drop(self.dropout, self.config)(hidden, rows=rows, deterministic=deterministic)
        return Dense(self.classes, self.config, jnp.float32, name="output")(hidden)


class SpanLogits(NamedTuple):
    """Scores of each token being the answer's first and last."""

    start: Float[Array, "B L"]
    end: Float[Array, "B L"]


class Span(nn.Module):
    """Extractive question answering: output(drop(h))."""

    config: EncoderConfig
    dropout: float = 0.0
    """Rate; DistilBERT alone drops anything here."""

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        *,
        rows: Int[Array, "B"] | None = None,
        deterministic: bool = True,
    ) -> SpanLogits:
        """Returns start and end logits; padding is the caller's to mask.

        `rows` is needed unless deterministic, as in the encoder.
        """
        hidden = _Drop(self.dropout, self.config)(hidden, rows=rows, deterministic=deterministic)
        logits = Dense(2, self.config, jnp.float32, name="output")(hidden)
        return SpanLogits(start=logits[..., 0], end=logits[..., 1])


class _Drop(nn.Module):
    rate: float | None
    config: EncoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ..."], *, rows: Int[Array, "B"] | None, deterministic: bool
    ) -> Float[Array, "B ..."]:
        if deterministic:
            return x
        if rows is None:
            raise ValueError("dropout needs rows: the index of each row in the global batch")
        rate = self.config.hidden_dropout_prob if self.rate is None else self.rate
        return RowDropout(rate)(x, rows=rows, deterministic=False)


def pool(
    hidden: Float[Array, "B L D"],
    *,
    segments: Int[Array, "B L"],
    pooling: Pooling,
    normalize: bool = False,
) -> Float[Array, "B D"]:
    """Returns one fp32 sentence embedding per row.

    Args:
      hidden: states of the tokens.
      segments: 0 is padding; a row of padding alone gives zeros.
      pooling: "cls" is the first token's state, "mean" the mean over the row's tokens.
      normalize: whether embeddings are scaled to length 1.
    """
    hidden = hidden.astype(jnp.float32)
    if pooling == "cls":
        found = hidden[:, 0]
    elif pooling == "mean":
        weights = (segments > 0).astype(jnp.float32)
        total = jnp.einsum("bld,bl->bd", hidden, weights)
        found = total / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    else:
        raise ValueError(f"pooling must be 'mean' or 'cls', got {pooling!r}")
    if not normalize:
        return found
    # The square root of 0 has no gradient, and a row of padding is to have that of a constant.
    squared = jnp.sum(found**2, axis=1, keepdims=True)
    return found / jnp.maximum(jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 1e-12)
