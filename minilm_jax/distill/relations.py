"""The relation loss: the divergence between two self-relations, whatever they are made of.

MiniLM's attention distribution is the relation of queries with keys, its value relation that of
values with values; MiniLMv2 uses queries, keys and values each with themselves under any number of
relation heads. All of them are `relation_kl` with another choice of arrays. This module knows
arrays only: no encoder, no batch, no devices.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from minilm_jax import native
from minilm_jax.distill.relations_blocked import (
    ELEMENTS,
    HeadSums,
    Student,
    Teacher,
    Wanted,
    blocked_sums,
    choose_block,
)
from minilm_jax.distill.relations_cpu import cpu_sums
from minilm_jax.distill.relations_gpu import gpu_sums
from minilm_jax.distill.relations_tpu import fits_tpu, tpu_sums
from minilm_jax.errors import ConfigError
from minilm_jax.kernels import fits_gpu, kernels_can_run
from minilm_jax.rows import sum_over_rows

Implementation = Literal["auto", "reference", "blocked", "pallas"]


class RelationLoss(NamedTuple):
    """A relation loss summed over sequences; divide by `count` once, after summing over devices."""

    total: Float[Array, ""]
    """Sum over sequences of the loss of one sequence: its mean over relation heads and tokens."""
    count: Float[Array, ""]  # type: ignore[assignment]  # tuples have a method of this name
    """Number of sequences: each document of a packed row is one."""
    per_head: Float[Array, " R"]
    """The total of each relation head alone; `total` is their mean."""


def relation_kl(
    teacher: tuple[Float[Array, "B L Dt"], Float[Array, "B L Dt"]],
    student: tuple[Float[Array, "B L Ds"], Float[Array, "B L Ds"]],
    *,
    segments: Int[Array, "B L"],
    heads: int,
    implementation: Implementation = "auto",
) -> RelationLoss:
    r"""Returns the divergence of the student's self-relation from the teacher's.

    For one relation head of one sequence x (MiniLM, arXiv 2002.10957, equations 6 to 9):

        L(x) = 1/|x| Σ_i KL( softmax(a_i^T b^T_T / √d_T)  ‖  softmax(a_i^S b^T_S / √d_S) )

    with (a, b) = (queries, keys) for the attention distribution and (values, values) for the value
    relation; MiniLMv2 (arXiv 2012.15828) takes each of queries, keys and values with itself. The
    heads of each model are already concatenated along the last axis, which is split again into
    `heads` relation heads of widths d_T = Dt / heads and d_S = Ds / heads, so that teacher and
    student may differ in width and in attention heads. `total` is the mean over relation heads,
    summed over sequences.

    Args:
        teacher: The arrays (a, b) of the teacher, any floating dtype. No gradient reaches them.
        student: The arrays (a, b) of the student, any floating dtype; they may be one array.
        segments: 0 for padding, a positive number for each document of a row. Tokens relate to
            tokens of the same number only, and a document is one sequence wherever it stands.
        heads: Number of relation heads R.
        implementation: `reference` materialises every relation, R·L² numbers a row of the
            batch, and lets JAX differentiate it; the others compute loss and gradients together.
            `blocked` runs anywhere; `pallas` has kernels for TPUs and NVIDIA GPUs, and elsewhere
            interprets them, slowly, to test them. `auto` takes the kernels where they exist (those
            in C++ for fp32 on a CPU too), suit the shape and run on one device's part of the batch
            (under pmap, shard_map, with a mesh in context, or with one device), else blocks.

    Returns:
        The loss in fp32, computed in fp32 for inputs of any dtype. JAX differentiates it in reverse
        mode, and twice with `reference` and `blocked`.

    Raises:
        ConfigError: `heads` does not divide a width, or the implementation is unknown.
    """
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ConfigError(f"implementation is {implementation!r}; take one of {known}.")
    for model, (a, _) in (("teacher", teacher), ("student", student)):
        if heads < 1 or a.shape[-1] % heads:
            raise ConfigError(
                f"heads is {heads}, which does not divide the {model}'s width {a.shape[-1]}; "
                "take a number of relation heads that divides both models' widths."
            )
    teacher = jax.lax.stop_gradient(teacher)
    weights = row_weights(segments)
    if implementation == "reference":
        per_head = reference_per_head(
            teacher, student, segments=segments, weights=weights, heads=heads
        )
    else:
        per_head = sum_over_rows(
            lambda _, rows: _one_pass(*rows, heads, implementation),
            None,
            (teacher, student, segments, weights),
        )
    return RelationLoss(total=jnp.mean(per_head), count=count_segments(segments), per_head=per_head)


def row_weights(segments: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """Returns 1 / (tokens of the row's segment), 0 for padding: a segment's rows sum to 1."""

    def tokens(row: Int[Array, " L"]) -> Int[Array, " L"]:
        ordered = jnp.sort(row)
        return jnp.searchsorted(ordered, row, side="right") - jnp.searchsorted(ordered, row)

    return jnp.where(segments > 0, 1 / jax.vmap(tokens)(segments).astype(jnp.float32), 0.0)


def count_segments(segments: Int[Array, "B L"]) -> Float[Array, ""]:
    """Returns the number of segments in the batch, an exact whole number."""
    ordered = jnp.sort(segments, axis=-1)
    first = jnp.diff(ordered, axis=-1, prepend=0) > 0
    return jnp.sum(first & (ordered > 0), dtype=jnp.float32)


def reference_per_head(
    teacher: tuple[Float[Array, "B L Dt"], Float[Array, "B L Dt"]],
    student: tuple[Float[Array, "B L Ds"], Float[Array, "B L Ds"]],
    *,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    heads: int,
) -> Float[Array, " R"]:
    """Returns the loss of each head, the plain way: what the other implementations are held to."""
    # Whatever stands in the padding, a NaN too, must reach neither the loss nor the gradient.
    valid = (segments > 0)[:, :, None]
    teacher, student = jax.tree.map(lambda x: jnp.where(valid, x, 0), (teacher, student))
    allowed = (segments[:, :, None] == segments[:, None, :])[:, None]
    log_teacher = _log_relation(*teacher, allowed=allowed, heads=heads)
    log_student = _log_relation(*student, allowed=allowed, heads=heads)
    rows = jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)
    return jnp.einsum("brl,bl->r", rows, weights, precision=jax.lax.Precision.HIGHEST)


class _Residuals(NamedTuple):
    """The gradients of each head's own loss, which wait for the head's cotangent."""

    a: Float[Array, "B L Ds"]
    b: Float[Array, "B L Ds"]
    like: tuple[Array, Array]
    """Empty arrays of the student's dtypes, in which the gradients are returned."""


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _one_pass(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    heads: int,
    implementation: Implementation,
) -> Float[Array, " R"]:
    """Returns the loss of each head; a gradient that is asked for is computed along with it."""
    return _sums(teacher, student, segments, weights, heads, implementation, wanted="loss").per_head


def _forward(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    heads: int,
    implementation: Implementation,
) -> tuple[Float[Array, " R"], _Residuals]:
    sums = _sums(
        teacher, student, segments, weights, heads, implementation, wanted="loss and gradients"
    )
    assert sums.a is not None and sums.b is not None
    like = (jnp.zeros(0, student[0].dtype), jnp.zeros(0, student[1].dtype))
    return sums.per_head, _Residuals(a=sums.a, b=sums.b, like=like)


def _backward(
    heads: int,
    implementation: Implementation,
    residuals: _Residuals,
    cotangent: Float[Array, " R"],
) -> tuple[None, Student, None, None]:
    by_column = jnp.repeat(cotangent, residuals.a.shape[-1] // heads)
    a = (by_column * residuals.a).astype(residuals.like[0].dtype)
    b = (by_column * residuals.b).astype(residuals.like[1].dtype)
    return None, (a, b), None, None


_one_pass.defvjp(_forward, _backward)


def _sums(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    heads: int,
    implementation: Implementation,
    *,
    wanted: Wanted,
) -> HeadSums:
    """Returns what the implementation computes, on the platform that the program is lowered for."""
    arrays = (teacher, student, segments, weights)
    batch, length = segments.shape

    def in_blocks(elements: int) -> Callable[..., HeadSums]:
        block = choose_block(batch=batch, length=length, heads=heads, elements=elements)
        return partial(blocked_sums, heads=heads, block=block, wanted=wanted)

    if implementation == "blocked":
        return in_blocks(ELEMENTS)(*arrays)
    on_tpu = partial(tpu_sums, heads=heads, wanted=wanted)
    on_gpu = partial(gpu_sums, heads=heads, wanted=wanted)
    if implementation == "pallas":
        elsewhere = partial(on_tpu, interpret=True)
        return jax.lax.platform_dependent(*arrays, tpu=on_tpu, cuda=on_gpu, default=elsewhere)
    of_teacher, of_student = (model[0].shape[-1] // heads for model in (teacher, student))
    dtype = jnp.result_type(*teacher, *student)
    on_cpu = in_blocks(ELEMENTS)
    if dtype == jnp.float32 and kernels_can_run("cpu") and native.load("relations"):
        on_cpu = partial(cpu_sums, heads=heads, wanted=wanted)
    kernels: dict[str, Callable[..., HeadSums]] = {}
    fits = fits_tpu(length=length, head_teacher=of_teacher, head_student=of_student, dtype=dtype)
    if fits and kernels_can_run("tpu"):
        kernels["tpu"] = on_tpu
    widest = max(of_teacher, of_student)
    if fits_gpu(length=length, head=widest, dtype=dtype) and kernels_can_run("gpu"):
        kernels["cuda"] = on_gpu
    # An accelerator has no cache to stay within and wants enough to do at a time.
    large = in_blocks(2**24)
    return jax.lax.platform_dependent(*arrays, cpu=on_cpu, default=large, **kernels)


def split_heads(x: Float[Array, "B L D"], heads: int) -> Float[Array, "B R L K"]:
    """Returns the array in fp32, split into relation heads, which stand before the tokens."""
    batch, length, width = x.shape
    split = x.astype(jnp.float32).reshape(batch, length, heads, width // heads)
    return split.transpose(0, 2, 1, 3)


def _log_relation(
    a: Float[Array, "B L D"],
    b: Float[Array, "B L D"],
    *,
    allowed: Bool[Array, "B 1 L L"],
    heads: int,
) -> Float[Array, "B R L L"]:
    """Returns the logarithm of one model's self-relation."""
    scale = 1 / math.sqrt(a.shape[-1] // heads)
    logits = jnp.einsum(
        "brqk,brlk->brql",
        split_heads(a, heads) * scale,
        split_heads(b, heads),
        precision=jax.lax.Precision.HIGHEST,
    )
    # Finite, because 0 · (-inf - (-inf)) is not a number.
    return jax.nn.log_softmax(jnp.where(allowed, logits, -1e30), axis=-1)
