"""The relation loss in blocks of query rows: loss and gradients in one pass, O(L·D) memory.

The gradient of KL(p_T ‖ p_S) with respect to the student's logits is p_S - p_T, which is at hand
when the loss is. So a block of rows is met once: its logits against all keys, both softmaxes, the
divergence, and what it adds to the gradients of both student arrays. No relation is ever whole.
"""

import math
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from minilm_jax.rows import zeros_like_any

Teacher = tuple[Float[Array, "B L Dt"], Float[Array, "B L Dt"]]
Student = tuple[Float[Array, "B L Ds"], Float[Array, "B L Ds"]]
Wanted = Literal["loss", "loss and gradients"]


class Block(NamedTuple):
    """How much is computed at a time, for every row of the batch."""

    heads: int
    """Relation heads; divides R."""
    rows: int
    """Query rows; the last block overlaps the one before where L is not a multiple."""


class HeadSums(NamedTuple):
    """The loss of each relation head summed over sequences, and its gradients where wanted."""

    per_head: Float[Array, " R"]
    a: Array | None = None
    """Gradient "B L Ds" for the student's first array: of the heads' own losses, side by side."""
    b: Array | None = None
    """The same for the student's second array."""


# Elements of one block of logits. Half a million fp32 numbers, and the five arrays of their size
# that are alive with them, stay within a CPU's last cache level.
ELEMENTS = 2**19


def choose_block(*, batch: int, length: int, heads: int, elements: int = ELEMENTS) -> Block:
    """Returns the block whose logits hold about `elements` numbers.

    Rows are worth more than heads, up to 256: the keys of a head are laid out once for all rows.
    Two heads at least where the batch is one row, because XLA's CPU backend divides the work among
    cores along the leading axis.
    """
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    enough = [n for n in divisors if batch * n >= 2] or divisors
    most = min(256, max(8, elements // (batch * enough[0] * length)))
    # Blocks of one size, in whole vectors, with as little overlap as can be.
    rows = min(length, 8 * math.ceil(length / math.ceil(length / most) / 8))
    fitting = [n for n in enough if batch * n * rows * length <= elements]
    return Block(heads=max(fitting, default=enough[0]), rows=rows)


def blocked_sums(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    heads: int,
    block: Block,
    wanted: Wanted,
) -> HeadSums:
    """Returns the loss of every head and, where wanted, its gradients, block by block."""
    batch, length, width = student[0].shape
    # Rows after the last token add nothing: with right padding, whole blocks are never computed.
    last = jnp.max(jnp.where(segments > 0, jnp.arange(1, length + 1), 0))
    row_blocks = (last + block.rows - 1) // block.rows

    def add_heads(index: Array, sums: HeadSums) -> HeadSums:
        first = index * block.heads
        take = partial(_take_heads, first=first, count=block.heads, heads=heads, segments=segments)
        found = _sums_of_heads(
            (take(teacher[0]), take(teacher[1])),
            (take(student[0]), take(student[1])),
            jnp.repeat(segments, block.heads, axis=0),
            jnp.repeat(weights, block.heads, axis=0),
            rows=block.rows,
            row_blocks=row_blocks,
            precision=products_precision(*teacher, *student),
            wanted=wanted,
        )
        per_head = found.per_head.reshape(batch, block.heads).sum(axis=0)
        put = jax.lax.dynamic_update_slice_in_dim
        per_head = put(sums.per_head, per_head, first, axis=0)
        if sums.a is None or sums.b is None or found.a is None or found.b is None:
            return sums._replace(per_head=per_head)
        column = first * (width // heads)
        return HeadSums(
            per_head=per_head,
            a=put(sums.a, _merge_heads(found.a, batch), column, axis=2),
            b=put(sums.b, _merge_heads(jnp.swapaxes(found.b, 1, 2), batch), column, axis=2),
        )

    zeros = partial(zeros_like_any, like=(teacher, student, segments, weights))
    gradient = zeros(student[0].shape) if wanted == "loss and gradients" else None
    start = HeadSums(per_head=zeros((heads,)), a=gradient, b=gradient)
    return jax.lax.fori_loop(0, heads // block.heads, add_heads, start)


def _sums_of_heads(
    teacher: tuple[Float[Array, "G L Kt"], Float[Array, "G L Kt"]],
    student: tuple[Float[Array, "G L Ks"], Float[Array, "G L Ks"]],
    segments: Int[Array, "G L"],
    weights: Float[Array, "G L"],
    *,
    rows: int,
    row_blocks: Int[Array, ""],
    precision: jax.lax.Precision,
    wanted: Wanted,
) -> HeadSums:
    """Returns the loss of each of G heads and, where wanted, gradients: a "G L Ks", b "G Ks L"."""
    length = segments.shape[1]
    a_teacher, a_student = teacher[0], student[0]
    # Keys stand along the last axis, as in the logits: no product transposes inside the loop.
    b_teacher, b_student = jnp.swapaxes(teacher[1], 1, 2), jnp.swapaxes(student[1], 1, 2)
    product = partial(jnp.einsum, precision=precision)
    scale = 1 / math.sqrt(a_student.shape[-1])

    def add_rows(index: Array, sums: HeadSums) -> HeadSums:
        # The last block is moved up to end with the array; the rows it shares weigh nothing.
        first = jnp.minimum(index * rows, length - rows)
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=rows, axis=1)
        fresh = first + jnp.arange(rows) >= index * rows
        weight = jnp.where(fresh, take(weights), 0.0)[..., None]
        allowed = take(segments)[:, :, None] == segments[:, None, :]
        a = take(a_student)
        logits = product("gqk,gkl->gql", take(a_teacher), b_teacher)
        exp_teacher, shifted_teacher, sum_teacher = _softmax(
            logits / math.sqrt(a_teacher.shape[-1]), allowed
        )
        logits = product("gqk,gkl->gql", a, b_student)
        exp_student, shifted_student, sum_student = _softmax(logits * scale, allowed)
        # Σ p_T (log p_T - log p_S), its logarithms of the sums taken out of the sum over keys.
        cross = jnp.sum(exp_teacher * (shifted_teacher - shifted_student), axis=-1, keepdims=True)
        divergence = cross / sum_teacher - jnp.log(sum_teacher) + jnp.log(sum_student)
        per_head = sums.per_head + jnp.sum(divergence * weight, axis=(1, 2))
        if sums.a is None or sums.b is None:
            return sums._replace(per_head=per_head)
        step = weight * scale
        slope = exp_student * (step / sum_student) - exp_teacher * (step / sum_teacher)
        of_rows = take(sums.a) + product("gql,gkl->gqk", slope, b_student)
        return HeadSums(
            per_head=per_head,
            a=jax.lax.dynamic_update_slice_in_dim(sums.a, of_rows, first, axis=1),
            b=sums.b + product("gqk,gql->gkl", a, slope),
        )

    zeros = partial(zeros_like_any, like=(teacher, student, segments, weights))
    gradients = wanted == "loss and gradients"
    start = HeadSums(
        per_head=zeros(a_student.shape[:1]),
        a=zeros(a_student.shape) if gradients else None,
        b=zeros(b_student.shape) if gradients else None,
    )
    return jax.lax.fori_loop(0, row_blocks, add_rows, start)


def _softmax(
    logits: Float[Array, "G Q L"], allowed: Bool[Array, "G Q L"]
) -> tuple[Float[Array, "G Q L"], Float[Array, "G Q L"], Float[Array, "G Q 1"]]:
    """Returns exp(logits - maximum), logits - maximum, and the sum of the exponentials."""
    # Finite, because 0 · (-inf - (-inf)) is not a number.
    logits = jnp.where(allowed, logits, -1e30)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    exponential = jnp.exp(shifted)
    return exponential, shifted, jnp.sum(exponential, axis=-1, keepdims=True)


def _take_heads(
    x: Float[Array, "B L D"],
    *,
    first: Int[Array, ""],
    count: int,
    heads: int,
    segments: Int[Array, "B L"],
) -> Float[Array, "G L K"]:
    """Returns `count` relation heads in fp32, padding zeroed, batch and heads folded.

    What stands in the padding, a NaN too, must reach neither the loss nor the gradient.
    """
    batch, length, width = x.shape
    head = width // heads
    x = jax.lax.dynamic_slice_in_dim(x, first * head, count * head, axis=2)
    x = jnp.where(segments[..., None] > 0, x.astype(jnp.float32), 0.0)
    x = x.reshape(batch, length, count, head).transpose(0, 2, 1, 3)
    return x.reshape(batch * count, length, head)


def _merge_heads(x: Float[Array, "G L K"], batch: int) -> Float[Array, "B L D"]:
    """Returns the folded heads side by side again."""
    folded, length, head = x.shape
    x = x.reshape(batch, folded // batch, length, head).transpose(0, 2, 1, 3)
    return x.reshape(batch, length, -1)


def products_precision(*arrays: Array) -> jax.lax.Precision:
    """Returns the precision in which products of upcast inputs lose nothing.

    A product of two bf16 or fp16 numbers is exact in one pass of a matrix unit; fp32 needs more.
    """
    full = any(x.dtype == jnp.float32 for x in arrays)
    return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT
