"""The MiniLM objectives: which relations of which layers are compared.

MiniLM and MiniLMv2 are one objective with other settings, so there is one class and two
constructors; the paper's ablations are settings of it too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minilm_jax.distill.objective import (
    Batch,
    LossFunction,
    Objective,
    Params,
    batch_counts,
)
from minilm_jax.distill.relations import Implementation, relation_kl
from minilm_jax.encoder.attention import Projections
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import encode
from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Loss, Mean
from minilm_jax.settings import FINITE, Positive, Weight, above

Relation = Literal["qq", "qk", "qv", "kq", "kk", "kv", "vq", "vk", "vv"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationObjective(Objective):
    """Deep self-attention distillation: the relations of chosen layers.

    The loss is the weighted sum over layer pairs and relations of `relations.relation_kl`
    (MiniLM eq. 10, MiniLMv2 eq. 8).
    """

    relations: tuple[tuple[Relation, Annotated[float, above(0), FINITE]], ...] = (
        ("qk", 1.0),
        ("vv", 1.0),
    )
    """Pairs of projections and their weights: qk is MiniLM's attention
    distribution, vv its value relation; MiniLMv2 takes qq, kk, vv."""
    heads: Positive | None = None
    """Relation heads. None keeps the attention heads, which must then be equal (MiniLM v1)."""
    layers: tuple[tuple[Positive, Positive], ...] = ()
    """Pairs of (teacher layer, student layer), from 1. Empty is (last, last)."""
    value_mse: Weight = 0.0
    """Weight of the mean squared error between values, the student's through
    a learned projection: the ablation of MiniLM's Table 6, which replaces
    the value relation. 0 leaves it out."""
    implementation: Implementation = "auto"
    """Of the relation loss."""

    def check(self, teacher: EncoderConfig, student: EncoderConfig) -> None:
        """Raises ConfigError where heads, widths or layers do not fit, or no weight is left."""
        if not self.relations and not self.value_mse:
            raise ConfigError("objective.relations is empty: there is nothing to distil")
        if self.heads is None and teacher.num_attention_heads != student.num_attention_heads:
            raise ConfigError(
                f"the teacher has {teacher.num_attention_heads} attention heads, the student "
                f"{student.num_attention_heads}: MiniLM v1 needs equal numbers; change "
                "student.num_attention_heads, or set objective.heads (relation heads, MiniLMv2)"
            )
        for role, config in (("teacher", teacher), ("student", student)):
            if self.heads is not None and config.hidden_size % self.heads:
                raise ConfigError(
                    f"objective.heads={self.heads} relation heads do not divide the {role}'s "
                    f"hidden_size={config.hidden_size}"
                )
        _refuse_repeated("objective.relations", [relation for relation, _ in self.relations])
        check_layers(self.layers, teacher, student)

    def make_loss(
        self, teacher: EncoderConfig, student: EncoderConfig, compute: Compute
    ) -> LossFunction:
        """Returns the loss; each relation is a term, its heads are a metric."""
        pairs = self._pairs(teacher, student)
        heads = self.heads or student.num_attention_heads
        teacher_stop = max(layer for layer, _ in pairs)
        student_stop = max(layer for _, layer in pairs)

        def loss(
            student_params: Params, teacher_params: Params, batch: Batch, key: Array | None
        ) -> Loss:
            teacher_layers = encode(
                teacher,
                teacher_params["encoder"],
                batch,
                # The teacher is deterministic and never differentiated: nothing to rematerialise.
                compute=dataclasses.replace(compute, remat=False),
                stop_after=teacher_stop,
            ).projections
            student_layers = encode(
                student,
                student_params["encoder"],
                batch,
                compute=compute,
                key=key,
                stop_after=student_stop,
            ).projections
            terms, metrics = {}, {}
            for teacher_layer, student_layer in pairs:
                suffix = f"_{teacher_layer}_{student_layer}" if len(pairs) > 1 else ""
                for relation, weight in self.relations:
                    found = relation_kl(
                        select(teacher_layers[teacher_layer - 1], relation),
                        select(student_layers[student_layer - 1], relation),
                        segments=batch["segments"],
                        heads=heads,
                        implementation=self.implementation,
                    )
                    name = relation + suffix
                    terms[name] = Mean(total=weight * found.total, count=found.count)
                    metrics[f"{name}_heads"] = Mean(
                        total=weight * found.per_head, count=found.count
                    )
                if self.value_mse:
                    projected = (
                        student_layers[student_layer - 1].value
                        @ student_params["value_projection"][f"{teacher_layer}_{student_layer}"]
                    )
                    terms[f"value_mse{suffix}"] = mean_squared_error(
                        projected,
                        teacher_layers[teacher_layer - 1].value,
                        segments=batch["segments"],
                        weight=self.value_mse,
                    )
            return Loss(terms=terms, metrics=metrics, counts=batch_counts(batch))

        return loss

    def heldout_name(self) -> str:
        """Returns the paper's name of it, where it is nothing else."""
        return "loss" if self.value_mse else "relation KL, mean over documents"

    def for_flop_count(self) -> "RelationObjective":
        """Returns the loss with its relations materialised: blocks go as far as rows are long."""
        return dataclasses.replace(self, implementation="reference")

    def new_params(self, key: Array, teacher: EncoderConfig, student: EncoderConfig) -> Params:
        """Returns the projections of the value MSE, `[D student, D teacher]` a layer pair."""
        if not self.value_mse:
            return {}
        init = jax.nn.initializers.truncated_normal(student.initializer_range)
        shape = (student.hidden_size, teacher.hidden_size)
        pairs = self._pairs(teacher, student)
        keys = jax.random.split(key, len(pairs))
        names = [f"{teacher_layer}_{student_layer}" for teacher_layer, student_layer in pairs]
        projections = {
            name: init(k, shape, jnp.float32) for name, k in zip(names, keys, strict=True)
        }
        return {"value_projection": projections}

    def _pairs(self, teacher: EncoderConfig, student: EncoderConfig) -> tuple[tuple[int, int], ...]:
        return self.layers or ((teacher.num_hidden_layers, student.num_hidden_layers),)


def minilm() -> RelationObjective:
    """Returns MiniLM's objective (arXiv 2002.10957, eq. 10): last layers, Q·K and V·V."""
    return RelationObjective()


def minilmv2(*, heads: int, teacher_layer: int, student_layer: int) -> RelationObjective:
    """Returns MiniLMv2's objective (arXiv 2012.15828, eq. 8): Q·Q, K·K and V·V.

    Args:
      heads: relation heads; 48 for base-size teachers, 64 for large ones.
      teacher_layer: from 1; the last of a base teacher, 21 of BERT-large, 19 of RoBERTa-large and
        XLM-R large.
      student_layer: from 1; the student's last.
    """
    return RelationObjective(
        relations=(("qq", 1.0), ("kk", 1.0), ("vv", 1.0)),
        heads=heads,
        layers=((teacher_layer, student_layer),),
    )


def uniform_layers(*, teacher: int, student: int) -> tuple[tuple[int, int], ...]:
    """Returns pairs (teacher layer, student layer), every student layer with an evenly spread one.

    The mapping of MiniLM's Table 7 and of TinyBERT, rounded up; the last layers are a pair.
    """
    return tuple((-(-m * teacher // student), m) for m in range(1, student + 1))


def check_layers(
    layers: Sequence[tuple[int, int]], teacher: EncoderConfig, student: EncoderConfig
) -> None:
    """Raises ConfigError where a pair (teacher layer, student layer) is no pair or comes twice."""
    _refuse_repeated("objective.layers", layers)
    for teacher_layer, student_layer in layers:
        for role, layer, config in (
            ("teacher", teacher_layer, teacher),
            ("student", student_layer, student),
        ):
            if not 1 <= layer <= config.num_hidden_layers:
                raise ConfigError(
                    f"objective.layers names {role} layer {layer}; it has layers 1 to "
                    f"{config.num_hidden_layers}"
                )


def _refuse_repeated(setting: str, names: Sequence[object]) -> None:
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise ConfigError(f"{setting} names {repeated[0]} twice: give it once")


def mean_squared_error(
    student: Float[Array, "B L D"],
    teacher: Float[Array, "B L D"],
    *,
    segments: Int[Array, "B L"],
    weight: float = 1.0,
) -> Mean:
    """Returns the weighted mean over real tokens of the squared error, itself a mean over units."""
    valid = segments > 0
    error = (student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)) ** 2
    per_token = jnp.where(valid, error.mean(axis=-1), 0.0)
    return Mean(total=weight * per_token.sum(), count=jnp.sum(valid, dtype=jnp.float32))


def select(projections: Projections, relation: Relation) -> tuple[Array, Array]:
    """Returns the two arrays a relation is made of; "qk" is (query, key)."""
    by_letter = {"q": projections.query, "k": projections.key, "v": projections.value}
    return by_letter[relation[0]], by_letter[relation[1]]
