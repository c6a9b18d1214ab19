"""What is trained: class scores, a similarity score, or the ends of an answer, on an encoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import encode
from minilm_jax.encoder.heads import SequenceClassifier, Span
from minilm_jax.reductions import Loss, Mean
from minilm_jax.tasks.catalog import Kind

Params = Mapping[str, Any]


def init_head(
    key: Array,
    config: EncoderConfig,
    kind: Kind,
    *,
    classes: int,
    params: Params,
) -> dict[str, Any]:
    """Returns the parameters of a model for a task: the encoder's, and its head's.

    1. A head that fits is kept: fine-tuning goes on.
    2. A classifier of another number of classes keeps its first layer and gets a new last one.
    3. A pooler becomes a BERT classifier's first layer, as in Hugging Face's class.
    4. Everything else is drawn as BERT draws it.

    Args:
      key: of what is drawn.
      config: the encoder's.
      kind: of the task.
      classes: outputs of a classifier; 1 for a score.
      params: of the checkpoint.
    """
    hidden = jnp.zeros((1, 2, config.hidden_size))
    if kind == "span":
        if "span" in params:
            return {"encoder": params["encoder"], "span": params["span"]}
        span = Span(config).init(key, hidden)["params"]
        return {"encoder": params["encoder"], "span": span}
    head = dict(SequenceClassifier(config, classes).init(key, hidden)["params"])
    known = params.get("sequence_classifier", {})
    if not known and config.model_type == "bert":
        known = params.get("pooler", {})
    for name, layer in known.items():
        if jnp.shape(layer["kernel"]) == jnp.shape(head[name]["kernel"]):
            head[name] = layer
    return {"encoder": params["encoder"], "sequence_classifier": head}


class TaskModel:
    """An encoder with a task's head: logits and loss as functions of (params, batch)."""

    def __init__(
        self,
        config: EncoderConfig,
        kind: Kind,
        *,
        classes: int = 0,
        compute: Compute | None = None,
        head_dropout: float = 0.0,
    ) -> None:
        """Takes what the functions close over; `head_dropout` is the head's rate in training."""
        self._config = config
        self._kind = kind
        self._compute = compute or Compute()
        self._classifier = SequenceClassifier(
            config, classes, head_dropout, jnp.dtype(self._compute.dtype)
        )
        self._span = Span(config, head_dropout)

    def logits(
        self, params: Params, batch: Mapping[str, Array], key: Array | None = None
    ) -> Float[Array, "B ..."]:
        """Returns fp32 logits: `[B, C]` of classes (one for a score), `[B, 2, L]` of spans.

        Start and end of padding are -inf, so that rows mean the same at any padded length.
        """
        encoder_key, head_key = (None, None) if key is None else jax.random.split(key)
        hidden = encode(
            self._config, params["encoder"], batch, compute=self._compute, key=encoder_key
        ).last_hidden_state
        span = self._kind == "span"
        head = self._span if span else self._classifier
        rngs: Any = None if head_key is None else {"dropout": head_key}
        scores: Any = head.apply(
            {"params": params["span" if span else "sequence_classifier"]},
            hidden,
            rows=batch["rows"],
            deterministic=key is None,
            rngs=rngs,
        )
        if not span:
            return scores
        both = jnp.stack([scores.start, scores.end], axis=1)
        return jnp.where(batch["segments"][:, None] > 0, both, -jnp.inf)

    def loss(
        self, params: Params, frozen: Any, batch: Mapping[str, Array], key: Array | None
    ) -> Loss:
        """Returns the mean over examples of cross-entropy, squared error, or both ends' mean.

        Spans: ½ (CE(start) + CE(end)) over the row's tokens.
        """
        del frozen
        logits, labels, weights = self.logits(params, batch, key), batch["labels"], batch["weights"]
        count = weights.sum()
        if self._kind == "score":
            each = jnp.square(logits[:, 0] - labels)
        elif self._kind == "classes":
            each = _cross_entropy(logits, labels)
        else:
            # Rows that only fill the batch have no token at all: log softmax of -inf alone is NaN.
            logits = jnp.where(weights[:, None, None] > 0, logits, 0.0)
            each = 0.5 * _cross_entropy(logits, labels).sum(axis=1)
        terms = {"task": Mean(total=(each * weights).sum(), count=count)}
        tokens = (batch["segments"] > 0).sum().astype(jnp.float32)
        return Loss(terms=terms, metrics={}, counts={"examples": count, "tokens": tokens})


def _cross_entropy(logits: Float[Array, "... C"], labels: Array) -> Float[Array, "..."]:
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(log_probabilities, labels[..., None], axis=-1)[..., 0]
