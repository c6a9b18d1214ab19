"""Everything a converted model computes, by name: verification compares it, an export holds it."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import encode
from minilm_jax.encoder.heads import (
    MaskedLM,
    NextSentence,
    Pooler,
    SequenceClassifier,
    Span,
    TokenClassifier,
)


def outputs(
    config: EncoderConfig,
    params: Mapping[str, Any],
    **batch: Int[Array, "B L"] | Int[np.ndarray, "B L"],
) -> dict[str, Float[Array, "..."]]:
    """Returns `hidden_0` … `hidden_N` and one output per head in `params`, without dropout.

    Args:
      config: the encoder's shape.
      params: the encoder's and the heads'.
      batch: what `encoder.encode` reads of a batch: `input_ids`, `segments` and what else there is.
    """
    encoded = encode(config, params["encoder"], {name: jnp.asarray(x) for name, x in batch.items()})
    found: dict[str, Any] = {f"hidden_{i}": h for i, h in enumerate(encoded.hidden_states)}
    last = encoded.last_hidden_state

    def apply(head: Any, part: str, *args: Any, **kwargs: Any) -> Any:
        return head.apply({"params": params[part]}, *args, **kwargs)

    def classes(part: str) -> int:
        return params[part]["output"]["bias"].shape[0]

    if "pooler" in params:
        found["pooler"] = apply(Pooler(config), "pooler", last)
    if "mlm" in params:
        table = params["encoder"]["embeddings"]["word"]["embedding"]
        found["mlm"] = apply(MaskedLM(config), "mlm", last, word_embeddings=table)
    if "next_sentence" in params:
        found["next_sentence"] = apply(NextSentence(config), "next_sentence", found["pooler"])
    if "sequence_classifier" in params:
        head: Any = SequenceClassifier(config, classes("sequence_classifier"))
        found["sequence_classifier"] = apply(head, "sequence_classifier", last)
    if "token_classifier" in params:
        head = TokenClassifier(config, classes("token_classifier"))
        found["token_classifier"] = apply(head, "token_classifier", last)
    if "span" in params:
        logits = apply(Span(config), "span", last)
        found["span_start"], found["span_end"] = logits.start, logits.end
    return found
