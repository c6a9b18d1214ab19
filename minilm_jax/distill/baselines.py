"""The objectives MiniLM is compared with, so that its comparison can be rerun.

MLM pre-training, soft-label distillation (both need masked tokens), DistilBERT and TinyBERT's
general distillation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minilm_jax.data.masking import NOT_PREDICTED, MaskingConfig
from minilm_jax.distill.objective import (
    Batch,
    LossFunction,
    Objective,
    ParamPath,
    Params,
    batch_counts,
)
from minilm_jax.distill.objectives import check_layers, mean_squared_error, uniform_layers
from minilm_jax.distill.relations_blocked import Wanted, products_precision
from minilm_jax.encoder.attention import Projections
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import EncoderOutput, encode
from minilm_jax.encoder.heads import MaskedLM
from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Loss, Mean
from minilm_jax.rows import sum_over_rows

TOKENS_A_BLOCK = 512
"""Tokens whose vocabulary scores exist at a time: 60 MB in fp32 at BERT's vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabularyObjective(Objective):
    """Losses over the vocabulary, on masked text: soft labels, masked LM, and a cosine beside them.

    A weight of 0 leaves a part out. `mlm()`, `soft_labels()` and `distilbert()` are the published
    combinations.
    """

    soft_weight: float = 1.0
    """Of T² KL(teacher ‖ student) between vocabulary distributions (Hinton et al. 2015)."""
    soft_tokens: Literal["masked", "all"] = "masked"
    """Tokens whose distributions are compared."""
    temperature: float = 1.0
    hard_weight: float = 0.0
    """Of the masked language modelling loss (Devlin et al. 2019)."""
    cosine_weight: float = 0.0
    """Of 1 - cos between last hidden states (Sanh et al. 2019)."""
    mask: MaskingConfig = dataclasses.field(default_factory=MaskingConfig)

    def check(self, teacher: EncoderConfig, student: EncoderConfig) -> None:
        """Raises ConfigError where a weight is off, or vocabularies or widths must be equal."""
        weights = (self.soft_weight, self.hard_weight, self.cosine_weight)
        if not all(weight >= 0 for weight in weights) or not any(weights):
            raise ConfigError(f"objective weights are {weights}: none below 0, not all 0")
        if not self.temperature > 0:
            raise ConfigError(f"objective.temperature must be above 0, got {self.temperature}")
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
                hard = masked_cross_entropy(student, student_params, ours, batch, compute)
                parts["mlm"] = (self.hard_weight, hard)
            if self.soft_weight or self.cosine_weight:
                plain = dataclasses.replace(compute, remat=False)
                theirs = encode(teacher, teacher_params["encoder"], batch, compute=plain)
            valid = batch["segments"] > 0
            if self.soft_weight:
                masked = batch["labels"] != NOT_PREDICTED
                soft = soft_label_divergence(
                    (teacher, teacher_params, theirs),
                    (student, student_params, ours),
                    selected=masked if self.soft_tokens == "masked" else valid,
                    temperature=self.temperature,
                    compute=compute,
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

    def unreached(self, student: EncoderConfig) -> tuple[ParamPath, ...]:
        """Returns the masked LM head where nothing but hidden states is compared."""
        return () if self.soft_weight or self.hard_weight else (("mlm",),)

    def teacher_layers(self, teacher: EncoderConfig) -> int:
        """Returns all of them, or 0 where the teacher has no say (plain MLM)."""
        return teacher.num_hidden_layers if self.soft_weight or self.cosine_weight else 0

    def teacher_heads(self) -> tuple[str, ...]:
        """Returns the masked LM head where its scores are the labels."""
        return ("mlm",) if self.soft_weight else ()

    def masking(self) -> MaskingConfig | None:
        """Returns the objective's masking."""
        return self.mask

    def new_params(self, key: Array, teacher: EncoderConfig, student: EncoderConfig) -> Params:
        """Returns a fresh masked LM head."""
        return {"mlm": init_mlm(key, student)}


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyBertObjective(Objective):
    """TinyBERT's general distillation (Jiao et al. 2020, eqs. 7 to 9).

    Mean squared errors of the embeddings' output, of every mapped layer's hidden states (both
    through one learned projection of width) and of its attention scores before the softmax.
    """

    layers: tuple[tuple[int, int], ...] = ()
    """Pairs of (teacher layer, student layer), from 1; empty spreads them evenly."""

    def check(self, teacher: EncoderConfig, student: EncoderConfig) -> None:
        """Raises ConfigError where attention heads differ or a layer does not exist."""
        if teacher.num_attention_heads != student.num_attention_heads:
            raise ConfigError(
                f"TinyBERT compares attention matrices: student.num_attention_heads="
                f"{student.num_attention_heads} must be the teacher's {teacher.num_attention_heads}"
            )
        check_layers(self.layers, teacher, student)

    def make_loss(
        self, teacher: EncoderConfig, student: EncoderConfig, compute: Compute
    ) -> LossFunction:
        """Returns the sum of the errors over the mapped layers."""
        pairs = self.layers or uniform_layers(
            teacher=teacher.num_hidden_layers, student=student.num_hidden_layers
        )

        def loss(
            student_params: Params, teacher_params: Params, batch: Batch, key: Array | None
        ) -> Loss:
            plain = dataclasses.replace(compute, remat=False)
            theirs = encode(teacher, teacher_params["encoder"], batch, compute=plain)
            ours = encode(student, student_params["encoder"], batch, compute=compute, key=key)
            segments, project = batch["segments"], student_params["width_projection"]
            allowed = segments[:, :, None] == segments[:, None, :]
            allowed &= (segments > 0)[:, :, None]
            pairs_of_tokens = jnp.sum(allowed, dtype=jnp.float32)
            terms = {
                "embeddings": mean_squared_error(
                    ours.hidden_states[0] @ project,
                    theirs.hidden_states[0],
                    segments=segments,
                )
            }
            for teacher_layer, student_layer in pairs:
                terms[f"hidden_{teacher_layer}_{student_layer}"] = mean_squared_error(
                    ours.hidden_states[student_layer] @ project,
                    theirs.hidden_states[teacher_layer],
                    segments=segments,
                )
                scores = attention_scores(
                    theirs.projections[teacher_layer - 1], teacher.num_attention_heads
                )
                error = attention_scores(
                    ours.projections[student_layer - 1], student.num_attention_heads
                ) - jax.lax.stop_gradient(scores)
                squared = jnp.where(allowed[:, None], error**2, 0.0).mean(axis=1).sum()
                terms[f"attention_{teacher_layer}_{student_layer}"] = Mean(
                    total=squared, count=pairs_of_tokens
                )
            return Loss(terms=terms, metrics={}, counts=batch_counts(batch))

        return loss

    def unreached(self, student: EncoderConfig) -> tuple[ParamPath, ...]:
        """Returns the layers above the last one compared."""
        last = max((layer for _, layer in self.layers), default=student.num_hidden_layers)
        return tuple(("encoder", f"layer_{i}") for i in range(last, student.num_hidden_layers))

    def new_params(self, key: Array, teacher: EncoderConfig, student: EncoderConfig) -> Params:
        """Returns the projection of width, [D student, D teacher]."""
        init = jax.nn.initializers.truncated_normal(student.initializer_range)
        return {"width_projection": init(key, (student.hidden_size, teacher.hidden_size))}


Model = tuple[EncoderConfig, Params, EncoderOutput]


def soft_label_divergence(
    teacher: Model,
    student: Model,
    *,
    selected: Bool[Array, "B L"],
    temperature: float,
    compute: Compute,
) -> Mean:
    """Returns T² KL(softmax(t / T) ‖ softmax(s / T)) of the selected tokens' vocabulary scores."""

    def divergence(ours: Inputs, theirs: Inputs) -> Float[Array, "N"]:
        wanted = mlm_logits(teacher[0], *theirs, compute) / temperature
        found = mlm_logits(student[0], *ours, compute) / temperature
        log_wanted, log_found = jax.nn.log_softmax(wanted), jax.nn.log_softmax(found)
        return temperature**2 * jnp.sum(jnp.exp(log_wanted) * (log_wanted - log_found), axis=-1)

    ours = Inputs(mlm_params(student[1]), student[2].last_hidden_state)
    theirs = Inputs(mlm_params(teacher[1]), teacher[2].last_hidden_state)
    return over_selected(divergence, ours, theirs, selected=selected)


def masked_cross_entropy(
    config: EncoderConfig, params: Params, output: EncoderOutput, batch: Batch, compute: Compute
) -> Mean:
    """Returns the cross entropy of the labels, mean over the tokens that have one."""

    def cross_entropy(ours: Inputs, labels: Inputs) -> Float[Array, "N"]:
        log_scores = jax.nn.log_softmax(mlm_logits(config, *ours, compute))
        chosen = jnp.maximum(labels.tokens, 0)[:, None]
        return -jnp.take_along_axis(log_scores, chosen, axis=-1)[:, 0]

    ours = Inputs(mlm_params(params), output.last_hidden_state)
    labels = Inputs({}, batch["labels"])
    selected = labels.tokens != NOT_PREDICTED
    return over_selected(cross_entropy, ours, labels, selected=selected)


class Inputs(NamedTuple):
    """What a function of single tokens is computed from."""

    params: Params
    tokens: Array
    """`[B, L, …]`; the function sees those of some tokens, `[N, …]`."""


OfTokens = Callable[[Inputs, Inputs], Float[Array, "N"]]
"""From what is learned and what is given to a value a token."""


def over_selected(
    function: OfTokens,
    learned: Inputs,
    given: Inputs,
    *,
    selected: Bool[Array, "B L"],
) -> Mean:
    """Returns the mean of a function of single tokens over the selected ones.

    Vocabulary scores of a whole batch are too large to exist at once, and most tokens are not
    masked. So each device brings the selected ones of its tokens to the front and takes them in
    blocks; a block without any costs nothing. A gradient that is asked for is computed along with
    the value, block by block. Exact for any number of selected tokens.

    Args:
      function: of these arguments alone; no array may reach it by closure.
      learned: what a gradient is returned for.
      given: the teacher's, labels: no gradient reaches it.
      selected: which tokens count.
    """

    def of_rows(
        params: tuple[Params, Params], rows: tuple[Array, Array, Bool[Array, "B L"]]
    ) -> Mean:
        learned, given = (Inputs(*x) for x in zip(params, rows[:2], strict=True))
        total = _total(function, learned, given, rows[2])
        return Mean(total=total, count=jnp.sum(rows[2], dtype=jnp.float32))

    params = (learned.params, given.params)
    return sum_over_rows(of_rows, params, (learned.tokens, given.tokens, selected))


class _Sums(NamedTuple):
    """A function's sum over the selected tokens, and its gradient where wanted."""

    total: Float[Array, ""]
    gradient: Inputs | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(
    function: OfTokens,
    learned: Inputs,
    given: Inputs,
    selected: Bool[Array, "B L"],
) -> Float[Array, ""]:
    """Returns the function's sum over the selected tokens."""
    return _sums(function, learned, given, selected, wanted="loss").total


def _forward(
    function: OfTokens, learned: Inputs, given: Inputs, selected: Bool[Array, "B L"]
) -> tuple[Float[Array, ""], Inputs | None]:
    sums = _sums(function, learned, given, selected, wanted="loss and gradients")
    return sums.total, sums.gradient


def _backward(
    function: OfTokens,
    gradient: Inputs,
    cotangent: Float[Array, ""],
) -> tuple[Inputs, None, None]:
    return jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradient), None, None


_total.defvjp(_forward, _backward)


def _sums(
    function: OfTokens,
    learned: Inputs,
    given: Inputs,
    selected: Bool[Array, "B L"],
    *,
    wanted: Wanted,
) -> _Sums:
    shape = selected.shape
    selected = selected.reshape(-1)
    learned, given = (
        x._replace(tokens=x.tokens.reshape(-1, *x.tokens.shape[2:])) for x in (learned, given)
    )
    # Places of the selected tokens first; what fills the last block has places behind the end.
    filled = jnp.pad(selected, (0, -selected.size % TOKENS_A_BLOCK))
    order = jnp.argsort(~filled, stable=True)
    blocks = (jnp.sum(selected) + TOKENS_A_BLOCK - 1) // TOKENS_A_BLOCK

    def add(index: Array, sums: _Sums) -> _Sums:
        first = index * TOKENS_A_BLOCK
        places = jax.lax.dynamic_slice_in_dim(order, first, TOKENS_A_BLOCK)

        def take(inputs: Inputs) -> Inputs:
            return inputs._replace(tokens=inputs.tokens.at[places].get(mode="clip"))

        def of_block(block: Inputs) -> Float[Array, ""]:
            return jnp.sum(jnp.where(filled[places], function(block, take(given)), 0.0))

        if sums.gradient is None:
            return _Sums(sums.total + of_block(take(learned)))
        value, found = jax.value_and_grad(of_block)(take(learned))
        put = sums.gradient.tokens.at[places].set
        gradient = Inputs(
            params=jax.tree.map(jnp.add, sums.gradient.params, found.params),
            tokens=put(found.tokens, mode="drop", unique_indices=True),
        )
        return _Sums(sums.total + value, gradient)

    nothing = jax.tree.map(jnp.zeros_like, learned) if wanted == "loss and gradients" else None
    sums = jax.lax.fori_loop(0, blocks, add, _Sums(jnp.zeros((), jnp.float32), nothing))
    if sums.gradient is None:
        return sums
    tokens = sums.gradient.tokens
    tokens = tokens.reshape(*shape, *tokens.shape[1:])
    return sums._replace(gradient=sums.gradient._replace(tokens=tokens))


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


def attention_scores(projections: Projections, heads: int) -> Float[Array, "B H L L"]:
    """Returns Q Kᵀ / √K before the softmax, in fp32."""
    B, L, D = projections.query.shape

    def split(x: Array) -> Array:
        return x.astype(jnp.float32).reshape(B, L, heads, D // heads).transpose(0, 2, 1, 3)

    query, key = split(projections.query), split(projections.key)
    # Left to itself an accelerator would multiply fp32 arrays in fewer bits.
    precision = products_precision(projections.query, projections.key)
    return jnp.einsum("bhqk,bhlk->bhql", query, key, precision=precision) * (D // heads) ** -0.5


def cosine(a: Float[Array, "*n D"], b: Float[Array, "*n D"]) -> Float[Array, "*n"]:
    """Returns the cosine between vectors, in fp32; no gradient to the first."""
    a, b = jax.lax.stop_gradient(a).astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-8)
