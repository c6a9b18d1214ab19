"""The Transformer encoder: embeddings, post-LayerNorm blocks, and stopping where asked."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from minilm_jax.cpu import on_one_cpu
from minilm_jax.encoder.attention import Projections, SelfAttention
from minilm_jax.encoder.config import Attention, Compute, EncoderConfig
from minilm_jax.encoder.dropout import RowDropout
from minilm_jax.encoder.embedding import Embed
from minilm_jax.encoder.feed_forward import FeedForward
from minilm_jax.encoder.norm import LayerNorm
from minilm_jax.errors import DataError
from minilm_jax.rows import divide_rows

INPUTS = ("input_ids", "segments", "token_type_ids", "languages", "positions", "rows")
"""What of a batch the encoder reads."""
CPU_TOKENS = 2**11
"""Of a forward pass on a CPU at a time: what a product takes beside its operands stays small enough
for the allocator to keep, instead of getting it from the system page by page each time."""


class EncoderOutput(NamedTuple):
    """Every intermediate by name. What is not used costs nothing under jit."""

    hidden_states: tuple[Float[Array, "B L D"], ...]
    """The embeddings' output, then each executed block's."""
    projections: tuple[Projections, ...]
    """Queries, keys and values of each layer that was reached."""

    @property
    def last_hidden_state(self) -> Float[Array, "B L D"]:
        """The last executed block's output."""
        return self.hidden_states[-1]


class Encoder(nn.Module):
    """A BERT-style encoder (Devlin et al. 2019), pure in (params, batch).

    Computes in `dtype`; parameters, softmax, LayerNorm statistics stay fp32. `remat` trades a
    second forward pass of each block in the backward pass for its activations' memory.
    """

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: Attention = "auto"

    def setup(self) -> None:
        """Declares embeddings and blocks."""
        self.embeddings = Embeddings(self.config, self.dtype)
        # `deterministic` is Python control flow, so remat must treat it as static.
        block = nn.remat(Block, static_argnums=(4,)) if self.remat else Block
        self.layer = [
            block(self.config, self.dtype, self.attention)
            for _ in range(self.config.num_hidden_layers)
        ]

    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        segments: Int[Array, "B L"],
        token_type_ids: Int[Array, "B L"] | None = None,
        languages: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        rows: Int[Array, "B"] | None = None,
        deterministic: bool = True,
        stop_after: int | None = None,
    ) -> EncoderOutput:
        """Returns hidden states and projections of the layers that were executed.

        Args:
          input_ids: token ids.
          segments: 0 is padding; 1, 2, … number the documents of a row. Attention stays inside a
            segment.
          token_type_ids: sentence A or B; zeros when absent.
          languages: language ids, for checkpoints with language embeddings; None adds none.
          positions: index of each token within its document; derived from `segments` when absent.
          rows: index of each row in the global batch; dropout is a function of it. Required unless
            deterministic.
          deterministic: False applies dropout and needs the `dropout` rng.
          stop_after: run up to this layer's (1-based) projections and no further: that layer's
            attention and feed-forward, and all layers above, are not executed. None runs all.
        """
        if stop_after is not None and not 1 <= stop_after <= self.config.num_hidden_layers:
            raise ValueError(
                f"stop_after={stop_after} is not a layer of 1..{self.config.num_hidden_layers}"
            )
        if rows is None:
            if not deterministic:
                raise ValueError("dropout needs rows: the index of each row in the global batch")
            rows = jnp.zeros(input_ids.shape[0], jnp.int32)
        if positions is None:
            positions = segment_positions(segments)
        hidden = self.embeddings(
            input_ids,
            segments=segments,
            positions=positions,
            token_type_ids=token_type_ids,
            languages=languages,
            rows=rows,
            deterministic=deterministic,
        )
        hidden_states, projections = [hidden], []
        for index, layer in enumerate(self.layer, start=1):
            if index == stop_after:
                projections.append(layer.project(hidden))
                break
            hidden, projected = layer(hidden, segments, rows, deterministic)
            hidden = divide_rows(hidden)
            hidden_states.append(hidden)
            projections.append(projected)
        return EncoderOutput(hidden_states=tuple(hidden_states), projections=tuple(projections))


class Embeddings(nn.Module):
    """Word + position (+ token type) (+ language) embeddings, LayerNorm, dropout."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "B L"],
        *,
        segments: Int[Array, "B L"],
        positions: Int[Array, "B L"],
        token_type_ids: Int[Array, "B L"] | None,
        languages: Int[Array, "B L"] | None,
        rows: Int[Array, "B"],
        deterministic: bool,
    ) -> Float[Array, "B L D"]:
        """Returns the input of the first block."""
        config = self.config

        def table(rows: int, name: str) -> Embed:
            return Embed(rows, config, name=name)

        embedded = table(config.vocab_size, "word")(input_ids)
        # RoBERTa numbers real tokens from pad + 1 and gives padding the pad row; with offset 0 any
        # row of the table will do for padding.
        padding = max(config.position_offset - 1, 0)
        positions = jnp.where(segments > 0, positions + config.position_offset, padding)
        embedded += table(config.max_position_embeddings, "position")(positions)
        if config.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            embedded += table(config.type_vocab_size, "token_type")(types)
        if config.n_langs:
            spoken = jnp.zeros_like(input_ids) if languages is None else languages
            language = table(config.n_langs, "language")(spoken)
            # As in Hugging Face: no languages is not language 0. The table exists all the same.
            if languages is not None:
                embedded += language
        hidden = LayerNorm(config, self.dtype, name="norm")(embedded)
        return RowDropout(config.hidden_dropout_prob)(
            hidden, rows=rows, deterministic=deterministic
        )


class Block(nn.Module):
    """One post-LayerNorm Transformer block (Vaswani et al. 2017)."""

    config: EncoderConfig
    dtype: DTypeLike
    implementation: Attention
    """Of the attention."""

    def setup(self) -> None:
        """Declares attention, feed-forward and their norms."""
        self.attention = SelfAttention(self.config, self.dtype, self.implementation)
        self.attention_norm = LayerNorm(self.config, self.dtype)
        self.ffn = FeedForward(self.config, self.dtype)
        self.ffn_norm = LayerNorm(self.config, self.dtype)
        self.dropout = RowDropout(self.config.hidden_dropout_prob)

    def project(self, hidden: Float[Array, "B L D"]) -> Projections:
        """Returns this layer's queries, keys and values, and executes nothing else."""
        return self.attention.project(hidden)

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        segments: Int[Array, "B L"],
        rows: Int[Array, "B"],
        deterministic: bool,
    ) -> tuple[Float[Array, "B L D"], Projections]:
        """Returns the block's output and its projections."""

        def drop(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
            return self.dropout(x, rows=rows, deterministic=deterministic)

        projections = self.attention.project(hidden)
        attended = self.attention.attend(
            projections, segments=segments, rows=rows, deterministic=deterministic
        )
        hidden = self.attention_norm(hidden + drop(attended))
        hidden = self.ffn_norm(hidden + drop(self.ffn(hidden)))
        return hidden, projections


def segment_positions(segments: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Returns each token's index within its segment, restarting where the segment changes."""
    index = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    start = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return index - start


def init_params(key: Array, config: EncoderConfig) -> dict[str, Any]:
    """Returns fresh fp32 parameters: truncated normal kernels, zero biases, unit scales."""
    tokens = jnp.ones((1, 8), jnp.int32)
    init: Any = jax.jit(lambda key: Encoder(config).init(key, tokens, segments=tokens))
    return init(key)["params"]


def encode(
    config: EncoderConfig,
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    compute: Compute | None = None,
    key: Array | None = None,
    stop_after: int | None = None,
) -> EncoderOutput:
    """Returns what the encoder with these parameters makes of a batch; the one way to call it.

    JAX differentiates it in reverse mode, and twice with `compute.attention` plain: a kernel's
    gradient has none. Forward mode (`jax.jvp`, `jax.hessian`) is refused by JAX.

    Args:
      config: the encoder's shape.
      params: its parameters.
      batch: `input_ids`, `segments` and what else of `INPUTS` there is; other entries are ignored.
        An id beyond its table gives NaN, and so does a document's token beyond
        `config.max_length`.
      compute: dtype, rematerialisation, attention; the defaults where absent.
      key: of the dropout; None is deterministic, and on a CPU takes a few rows at a time.
      stop_after: see `Encoder.__call__`.

    Raises:
      DataError: the batch has no `input_ids` or no `segments`.
    """
    for name in ("input_ids", "segments"):
        if name not in batch:
            raise DataError(
                f"the batch has no {name}, only {', '.join(batch) or 'nothing'}; segments are 0 "
                "for padding and 1 for tokens, as an attention_mask is"
            )
    compute = compute or Compute()
    encoder = Encoder(config, jnp.dtype(compute.dtype), compute.remat, compute.attention)
    rngs: Any = None if key is None else {"dropout": key}

    def run(inputs: dict[str, Any]) -> EncoderOutput:
        output: Any = encoder.apply(
            {"params": params},
            **inputs,
            deterministic=key is None,
            stop_after=stop_after,
            rngs=rngs,
        )
        return output

    inputs = {name: batch[name] for name in INPUTS if name in batch}
    parts = 1 if key is not None or compute.remat else _cpu_parts(inputs["input_ids"])
    if parts == 1:
        return run(inputs)
    divided = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), inputs)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(run, divided))


def _cpu_parts(input_ids: Int[Array, "B L"]) -> int:
    """Returns in how many parts a CPU should take the rows of a forward pass, one after another."""
    rows, length = input_ids.shape
    if not on_one_cpu(input_ids) or rows * length <= CPU_TOKENS:
        return 1
    divisors = (n for n in range(2, rows + 1) if rows % n == 0)
    parts = next((n for n in divisors if rows * length <= n * CPU_TOKENS), rows)
    # Rows that hardly divide, 31 say: each part reads all parameters.
    return parts if rows * length >= parts * CPU_TOKENS // 4 else 1
