"""The shape of an encoder, in Hugging Face's words, checked before anything is built."""

import dataclasses
from typing import Annotated, Literal

from minilm_jax.errors import ConfigError
from minilm_jax.settings import Rate, Settings, above, at_least, at_most, below

Family = Literal["bert", "roberta", "xlm-roberta", "distilbert", "xlm"]
Activation = Literal["gelu", "gelu_tanh", "relu"]
Attention = Literal["auto", "plain"]

# The upper bounds keep a corrupt config.json from asking for terabytes.
_Size = Annotated[int, at_least(1), at_most(10_000_000)]
_Rows = Annotated[int, at_least(0), at_most(10_000_000)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings):
    """Shape and constants of one encoder; field names are those of Hugging Face's config.json.

    Every family here is the same post-LayerNorm Transformer. They differ in what is added up in
    the embeddings, and those differences are the fields below. No part of the encoder looks at
    `model_type`: it is for heads, tokenizers and names in files.
    """

    model_type: Family = "bert"
    vocab_size: _Size = 30522
    hidden_size: _Size = 768
    num_hidden_layers: Annotated[int, at_least(1), at_most(1000)] = 12
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 3072
    max_position_embeddings: _Size = 512
    """Rows of the position table (514 for 512 tokens of RoBERTa and XLM-R)."""
    type_vocab_size: _Rows = 2
    """Rows of the token type table; 0 where the family has none (DistilBERT, XLM)."""
    position_offset: _Rows = 0
    """Position of a document's first token: 0, or pad_token_id + 1 in RoBERTa and XLM-R."""
    n_langs: _Rows = 0
    """Rows of the language table; 0 where there is none. XLM only."""
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Rate = 0.1
    attention_probs_dropout_prob: Rate = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: Annotated[float, above(0), below(1)] = 1e-12
    pad_token_id: _Rows = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}"
            )
        if self.position_offset >= self.max_position_embeddings:
            raise ConfigError(
                f"position_offset={self.position_offset} leaves no position of "
                f"max_position_embeddings={self.max_position_embeddings}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """Tokens of the longest document the position table holds."""
        return self.max_position_embeddings - self.position_offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute(Settings, name="compute"):
    """How an encoder computes; parameters, softmax, norms and reductions are fp32 throughout."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; bfloat16 on accelerators. Left to itself JAX
    multiplies float32 in fewer bits there (TPU: bfloat16, GPU: TF32);
    JAX_DEFAULT_MATMUL_PRECISION=highest does not."""
    remat: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    attention: Attention = "auto"
    """plain: XLA's operations alone. auto: kernels on TPUs in bfloat16, on
    NVIDIA GPUs (Ampere and later), and on CPUs in float32."""
