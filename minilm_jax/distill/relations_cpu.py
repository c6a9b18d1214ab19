"""The relation loss by the kernels for CPUs (native/relations.cc)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minilm_jax import native
from minilm_jax.distill.relations_blocked import HeadSums, Student, Teacher, Wanted


def cpu_sums(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    heads: int,
    wanted: Wanted,
) -> HeadSums:
    """Returns the loss of every head and, where wanted, its gradients."""
    batch = segments.shape[0]
    arrays = (x.astype(jnp.float32) for x in (*teacher, *student))
    gradients = wanted == "loss and gradients"
    per_head, *of_student = native.call(
        "RelationLossAndGradients" if gradients else "RelationLoss",
        *arrays,
        segments.astype(jnp.int32),
        weights,
        outputs=[(batch, heads), *([x.shape for x in student] if gradients else [])],
    )
    return HeadSums(per_head.sum(axis=0), *of_student)
