"""TinyBERT's general distillation, which MiniLM is compared with."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm_jax.distill.objective import (
    Batch,
    LossFunction,
    Objective,
    Params,
    batch_counts,
)
from minilm_jax.distill.objectives import check_layers, mean_squared_error, uniform_layers
from minilm_jax.distill.relations_blocked import products_precision
from minilm_jax.encoder.attention import Projections
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import encode
from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Loss, Mean
from minilm_jax.settings import Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyBertObjective(Objective):
    """TinyBERT's general distillation (Jiao et al. 2020, eqs. 7 to 9).

    Mean squared errors of the embeddings' output, of every mapped layer's hidden states (both
    through one learned projection of width) and of its attention scores before the softmax.
    """

    layers: tuple[tuple[Positive, Positive], ...] = ()
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

    def new_params(self, key: Array, teacher: EncoderConfig, student: EncoderConfig) -> Params:
        """Returns the projection of width, [D student, D teacher]."""
        init = jax.nn.initializers.truncated_normal(student.initializer_range)
        shape = (student.hidden_size, teacher.hidden_size)
        return {"width_projection": init(key, shape, jnp.float32)}


def attention_scores(projections: Projections, heads: int) -> Float[Array, "B H L L"]:
    """Returns Q Kᵀ / √K before the softmax, in fp32."""
    B, L, D = projections.query.shape

    def split(x: Array) -> Array:
        return x.astype(jnp.float32).reshape(B, L, heads, D // heads).transpose(0, 2, 1, 3)

    query, key = split(projections.query), split(projections.key)
    # Left to itself an accelerator would multiply fp32 arrays in fewer bits.
    precision = products_precision(projections.query, projections.key)
    return jnp.einsum("bhqk,bhlk->bhql", query, key, precision=precision) * (D // heads) ** -0.5
