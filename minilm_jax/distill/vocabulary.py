"""Objectives over the vocabulary that MiniLM is compared with: masked LM, soft labels, DistilBERT.

All of them need masked tokens.
"""

import copy
import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minilm_jax.data.masking import NOT_PREDICTED, MaskingConfig
from minilm_jax.distill.objective import (
    Batch,
    LossFunction,
    Objective,
    Params,
    batch_counts,
)
from minilm_jax.distill.selected_tokens import Inputs, over_selected
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import EncoderOutput, encode
from minilm_jax.encoder.heads import MaskedLM
from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Loss, Mean
from minilm_jax.settings import FINITE, Weight, above


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyObjective(Objective):
    """Losses over the vocabulary, on masked text: soft labels, masked LM, and a cosine beside them.

    A weight of 0 leaves a part out. `mlm()`, `soft_labels()` and `distilbert()` are the published
    combinations.
    """

    soft_weight: Weight = 1.0
    """Of T² KL(teacher ‖ student) between vocabulary distributions (Hinton et al. 2015)."""
    soft_tokens: Literal["masked", "all"] = "masked"
    """Tokens whose distributions are compared."""
    temperature: Annotated[float, above(0), FINITE] = 1.0
    hard_weight: Weight = 0.0
    """Of the masked language modelling loss (Devlin et al. 2019)."""
    cosine_weight: Weight = 0.0
    """Of 1 - cos between last hidden states (Sanh et al. 2019)."""
    mask: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)
    _expected_in_one_block: ClassVar[bool] = False

    def check(self, teacher: EncoderConfig, student: EncoderConfig) -> None:
        """Raises ConfigError where a weight is off, or vocabularies or widths must be equal."""
        if not (self.soft_weight or self.hard_weight or self.cosine_weight):
            raise ConfigError("objective's weights are all 0: there is nothing to train on")
        if self.soft_weight and teacher.vocab_size != student.vocab_size:
            raise ConfigError(
                f"soft labels need one vocabulary: the student has {student.vocab_size} entries, "
                f"the teacher {teacher.vocab_size}"
            )
        if self.cosine_weight and teacher.hidden_size != student.hidden_size:
            raise ConfigError(
                f"the cosine loss compares hidden states: student.hidden_size="
                f"{student.hidden_size} must be the teacher's {teacher.hidden_size}, or "
                "objective.cosine_weight 0"
            )

    def make_loss(
        self, teacher: EncoderConfig, student: EncoderConfig, compute: Compute
    ) -> LossFunction:
        """Returns the weighted sum of the parts, each a mean over the tokens it is about."""

        def loss(
            student_params: Params, teacher_params: Params, batch: Batch, key: Array | None
        ) -> Loss:
            ours = encode(student, student_params["encoder"], batch, compute=compute, key=key)
            parts: dict[str, tuple[float, Mean]] = {}
            if self.hard_weight:
                hard = masked_cross_entropy(
                    student,
                    student_params,
                    ours,
                    batch,
                    compute=compute,
                    block=self.tokens_a_block(batch, share=self.mask.probability),
                )
                parts["mlm"] = (self.hard_weight, hard)
            if self.soft_weight or self.cosine_weight:
                plain = dataclasses.replace(compute, remat=False)
                theirs = encode(teacher, teacher_params["encoder"], batch, compute=plain)
            valid = batch["segments"] > 0
            if self.soft_weight:
                selected, share = valid, 1.0
                if self.soft_tokens == "masked":
                    selected, share = batch["labels"] != NOT_PREDICTED, self.mask.probability
                soft = soft_label_divergence(
                    (teacher, teacher_params, theirs),
                    (student, student_params, ours),
                    selected=selected,
                    temperature=self.temperature,
                    compute=compute,
                    block=self.tokens_a_block(batch, share=share),
                )
                parts["soft_labels"] = (self.soft_weight, soft)
            if self.cosine_weight:
                similarity = cosine(theirs.last_hidden_state, ours.last_hidden_state)
                distance = jnp.where(valid, 1.0 - similarity, 0.0).sum()
                count = jnp.sum(valid, dtype=jnp.float32)
                parts["cosine"] = (self.cosine_weight, Mean(total=distance, count=count))
            terms = {
                name: Mean(total=weight * mean.total, count=mean.count)
                for name, (weight, mean) in parts.items()
            }
            return Loss(terms=terms, metrics={}, counts=batch_counts(batch))

        return loss

    def teacher_heads(self) -> tuple[str, ...]:
        """Returns the masked LM head where its scores are the labels."""
        return ("mlm",) if self.soft_weight else ()

    def masking(self) -> MaskingConfig | None:
        """Returns the objective's masking."""
        return self.mask

    def for_flop_count(self) -> "VocabularyObjective":
        """Returns the loss with one block in the place of as many as there happen to be."""
        counted = copy.copy(self)  # of the same class, whatever fields of its own it has
        object.__setattr__(counted, "_expected_in_one_block", True)
        return counted

    def tokens_a_block(self, batch: Batch, *, share: float) -> int | None:
        """Returns how many of the tokens that count, a share of all, are taken at a time."""
        if not self._expected_in_one_block:
            return None
        return max(1, round(share * batch["segments"].size))

    def new_params(self, key: Array, teacher: EncoderConfig, student: EncoderConfig) -> Params:
        """Returns a fresh masked LM head, unless nothing but hidden states is compared.

        The student would be written with it, never trained, as one that predicts tokens.
        """
        return {"mlm": init_mlm(key, student)} if self.soft_weight or self.hard_weight else {}


def mlm() -> VocabularyObjective:
    """Returns plain MLM pre-training: no teacher, only its vocabulary."""
    return VocabularyObjective(soft_weight=0.0, hard_weight=1.0)


def soft_labels(*, temperature: float = 1.0) -> VocabularyObjective:
    """Returns soft-label distillation of the masked tokens: "MLM-KD" in MiniLM's Table 3."""
    return VocabularyObjective(temperature=temperature)


def distilbert() -> VocabularyObjective:
    """Returns DistilBERT's triple loss (Sanh et al. 2019), weights of its published command."""
    return VocabularyObjective(
        soft_weight=5.0, soft_tokens="all", temperature=2.0, hard_weight=2.0, cosine_weight=1.0
    )


Model = tuple[EncoderConfig, Params, EncoderOutput]


def soft_label_divergence(
    teacher: Model,
    student: Model,
    *,
    selected: Bool[Array, "B L"],
    temperature: float,
    compute: Compute,
    block: int | None = None,
) -> Mean:
    """Returns T² KL(softmax(t / T) ‖ softmax(s / T)) of the selected tokens' vocabulary scores."""

    def divergence(ours: Inputs, theirs: Inputs) -> Float[Array, "N"]:
        wanted = mlm_logits(teacher[0], *theirs, compute) / temperature
        found = mlm_logits(student[0], *ours, compute) / temperature
        log_wanted, log_found = jax.nn.log_softmax(wanted), jax.nn.log_softmax(found)
        return temperature**2 * jnp.sum(jnp.exp(log_wanted) * (log_wanted - log_found), axis=-1)

    ours = Inputs(mlm_params(student[1]), student[2].last_hidden_state)
    theirs = Inputs(mlm_params(teacher[1]), teacher[2].last_hidden_state)
    return over_selected(divergence, ours, theirs, selected=selected, block=block)


def masked_cross_entropy(
    config: EncoderConfig,
    params: Params,
    output: EncoderOutput,
    batch: Batch,
    compute: Compute,
    block: int | None = None,
) -> Mean:
    """Returns the cross entropy of the labels, mean over the tokens that have one."""

    def cross_entropy(ours: Inputs, labels: Inputs) -> Float[Array, "N"]:
        log_scores = jax.nn.log_softmax(mlm_logits(config, *ours, compute))
        chosen = jnp.maximum(labels.tokens, 0)[:, None]
        return -jnp.take_along_axis(log_scores, chosen, axis=-1)[:, 0]

    ours = Inputs(mlm_params(params), output.last_hidden_state)
    labels = Inputs({}, batch["labels"])
    selected = labels.tokens != NOT_PREDICTED
    return over_selected(cross_entropy, ours, labels, selected=selected, block=block)


def mlm_params(params: Params) -> Params:
    """Returns those of a model's parameters that `mlm_logits` needs."""
    embeddings = {"word": params["encoder"]["embeddings"]["word"]}
    return {"encoder": {"embeddings": embeddings}, "mlm": params["mlm"]}


def mlm_logits(
    config: EncoderConfig, params: Params, hidden: Float[Array, "N D"], compute: Compute
) -> Float[Array, "N V"]:
    """Returns the vocabulary scores of tokens; the decoder is the word embedding table."""
    head = MaskedLM(config, jnp.dtype(compute.dtype))
    table = params["encoder"]["embeddings"]["word"]["embedding"]
    logits: Any = head.apply({"params": params["mlm"]}, hidden, word_embeddings=table)
    return logits


def init_mlm(key: Array, config: EncoderConfig) -> Params:
    """Returns fresh parameters of a masked LM head."""
    hidden = jnp.zeros((1, config.hidden_size))
    table = jnp.zeros((config.vocab_size, config.hidden_size))
    init = jax.jit(lambda key: MaskedLM(config).init(key, hidden, word_embeddings=table))
    params: Params = init(key)["params"]
    return params


def cosine(a: Float[Array, "*n D"], b: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """Returns the cosine between vectors, in fp32; no gradient to the first."""
    a, b = jax.lax.stop_gradient(a).astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-8)
