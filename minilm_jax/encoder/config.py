"""The shape of an encoder, in Hugging Face's words, checked before anything is built."""

import dataclasses
from typing import Literal

from minilm_jax.errors import ConfigError

Family = Literal["bert", "roberta", "xlm-roberta", "distilbert", "xlm"]
Activation = Literal["gelu", "gelu_tanh", "relu"]
Attention = Literal["auto", "plain"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape and constants of one encoder; field names are those of Hugging Face's config.json.

    Every family here is the same post-LayerNorm Transformer. They differ in what is added up in
    the embeddings, and those differences are the fields below. No part of the encoder looks at
    `model_type`: it is for heads, tokenizers and names in files.
    """

    model_type: Family = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    """Rows of the position table (514 for 512 tokens of RoBERTa and XLM-R)."""
    type_vocab_size: int = 2
    """Rows of the token type table; 0 where the family has none (DistilBERT, XLM)."""
    position_offset: int = 0
    """Position of a document's first token: 0, or pad_token_id + 1 in RoBERTa and XLM-R."""
    n_langs: int = 0
    """Rows of the language table; 0 where there is none. XLM only."""
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            # The bound keeps a corrupt config.json from asking for terabytes.
            if not 1 <= value <= 10_000_000:
                raise ConfigError(f"{name} must be between 1 and 10,000,000, got {value}")
        if self.num_hidden_layers > 1000:
            raise ConfigError(f"num_hidden_layers={self.num_hidden_layers:,} is more than 1,000")
        for name in ("type_vocab_size", "position_offset", "n_langs", "pad_token_id"):
            value = getattr(self, name)
            if not 0 <= value <= 10_000_000:
                raise ConfigError(f"{name} must be between 0 and 10,000,000, got {value}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}"
            )
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise ConfigError(f"layer_norm_eps must be between 0 and 1, got {self.layer_norm_eps}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name} must be in [0, 1), got {value}")
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
class Compute:
    """How an encoder computes; parameters, softmax, norms and reductions are fp32 throughout."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; bfloat16 on accelerators. Left to itself JAX multiplies float32 in
    fewer bits there (TPU: bfloat16, GPU: TF32); JAX_DEFAULT_MATMUL_PRECISION=highest does not."""
    remat: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    attention: Attention = "auto"
    """plain: XLA's operations alone. auto: kernels on NVIDIA GPUs (Ampere and later) and, in fp32,
    on CPUs."""
