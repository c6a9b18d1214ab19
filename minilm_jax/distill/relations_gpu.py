"""The relation loss as Pallas kernels for NVIDIA GPUs: no relation leaves a multiprocessor.

A program has one block of rows of one relation head and meets the keys twice, tile by tile: first
for both softmaxes and the divergence, then for p_S - p_T and the gradient of the rows. A second
kernel has a block of keys and meets the rows, for the gradient of the keys. Heads stay side by side
in the last axis; a narrow one is filled up to what the matrix unit takes.

B batch, L tokens, R relation heads, K width of one (Kt, Ks); q rows and l keys that a program sees
at a time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float, Int

from minilm_jax.distill.relations_blocked import (
    HeadSums,
    Student,
    Teacher,
    Wanted,
    products_precision,
)
from minilm_jax.kernels import (
    LN_2,
    MASKED,
    TILE,
    Output,
    Side,
    fill_up_head,
    pad_tokens,
    run_on_gpu,
)


class _Problem(NamedTuple):
    """What does not change within a call."""

    scale_teacher: float
    """Of logits whose exponentials are powers of two: a GPU has an instruction for those."""
    scale_student: float
    tiles: int
    precision: jax.lax.Precision


class _References(NamedTuple):
    """What both kernels read, of one relation head of one row of the batch.

    One side has the program's own block of tokens, the other all tokens.
    """

    a_teacher: Any  # q Kt
    b_teacher: Any  # l Kt
    a_student: Any  # q Ks
    b_student: Any  # l Ks
    row_segments: Any  # q
    key_segments: Any  # l
    weights: Any  # q


class _OfRows(NamedTuple):
    """What the kernel over rows writes, the gradient last; none of it but the first for a loss."""

    divergence: Any  # q
    log_teacher: Any = None  # q
    """Logarithm to base 2 of a row's sum of exponentials."""
    log_student: Any = None  # q
    of_a: Any = None  # q Ks


def gpu_sums(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    heads: int,
    wanted: Wanted,
    interpret: bool = False,
) -> HeadSums:
    """Returns the loss of every head and, where wanted, its gradients."""
    batch, length, width = student[0].shape
    head = width // heads
    fill_up = partial(_fill_up, heads=heads, segments=segments)
    arrays = [fill_up(x) for pair in zip(teacher, student, strict=True) for x in pair]
    a_teacher, a_student, b_teacher, b_student = arrays
    wide_teacher, wide_student = (x.shape[-1] // heads for x in (a_teacher, a_student))
    segments, weights = pad_tokens(segments), pad_tokens(weights)
    padded = segments.shape[1]
    own, every = Side(padded, TILE), Side(padded)
    problem = _Problem(
        scale_teacher=(teacher[0].shape[-1] // heads) ** -0.5 / LN_2,
        scale_student=head**-0.5 / LN_2,
        tiles=padded // TILE,
        precision=products_precision(*teacher, *student),
    )
    run = partial(run_on_gpu, grid=(problem.tiles, heads, batch), interpret=interpret)

    def inputs(rows: Side, keys: Side) -> list[tuple[Array, pl.BlockSpec]]:
        return [
            (a_teacher, rows.heads(wide_teacher)),
            (b_teacher, keys.heads(wide_teacher)),
            (a_student, rows.heads(wide_student)),
            (b_student, keys.heads(wide_student)),
            (segments, rows.tokens()),
            (segments, keys.tokens()),
            (weights, rows.tokens()),
        ]

    line = Output((batch, heads, padded), jnp.float32, own.line())
    gradient = Output(a_student.shape, jnp.float32, own.heads(wide_student))
    gradients = wanted == "loss and gradients"
    found = _OfRows(
        *run(
            partial(_rows, problem),
            inputs(own, every),
            [line, line, line, gradient] if gradients else [line],
            name="relation_rows",
        )
    )
    exact = jax.lax.Precision.HIGHEST
    per_head = jnp.einsum("brl,bl->r", found.divergence, weights, precision=exact)
    if not gradients:
        return HeadSums(per_head)
    (of_b,) = run(
        partial(_keys, problem),
        [
            *inputs(every, own),
            (found.log_teacher, every.line()),
            (found.log_student, every.line()),
        ],
        [gradient],
        name="relation_keys",
    )

    def cut(x: Float[Array, "B l W"]) -> Float[Array, "B L D"]:
        return x.reshape(batch, padded, heads, -1)[:, :length, :, :head].reshape(student[0].shape)

    return HeadSums(per_head, a=cut(found.of_a), b=cut(of_b))


def _fill_up(
    x: Float[Array, "B L D"], *, heads: int, segments: Int[Array, "B L"]
) -> Float[Array, "B l W"]:
    """Returns whole tiles of tokens, and heads of 16, 32, 64 or 128 numbers; padding is zero.

    What stands in the padding, a NaN too, must reach neither the loss nor the gradient.
    """
    batch, length, width = x.shape
    x = jnp.where(segments[..., None] > 0, x, 0).reshape(batch, length, heads, width // heads)
    missing = fill_up_head(width // heads) - width // heads
    x = jnp.pad(x, ((0, 0), (0, -length % TILE), (0, 0), (0, missing)))
    return x.reshape(batch, x.shape[1], -1)


def _rows(problem: _Problem, *references: Any) -> None:
    """Writes what one block of rows of one head gives."""
    inputs, results = _References(*references[:7]), _OfRows(*references[7:])
    a_teacher, a_student = inputs.a_teacher[...], inputs.a_student[...]
    segments = inputs.row_segments[...]

    def logits(index: Array) -> tuple[Array, Array]:
        at = pl.ds(index * TILE, TILE)
        return _logits(
            problem,
            (a_teacher, inputs.b_teacher[at, :]),
            (a_student, inputs.b_student[at, :]),
            segments[:, None] == inputs.key_segments[at][None, :],
        )

    def measure(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds a tile of keys to the running maxima, sums and Σ exp(t) (t - s), all shifted."""
        peak_teacher, peak_student, sum_teacher, sum_student, cross = state
        teacher, student = logits(index)
        new_teacher = jnp.maximum(peak_teacher, teacher.max(axis=1))
        new_student = jnp.maximum(peak_student, student.max(axis=1))
        moved_teacher, moved_student = peak_teacher - new_teacher, peak_student - new_student
        teacher, student = teacher - new_teacher[:, None], student - new_student[:, None]
        exp_teacher, shrink = jnp.exp2(teacher), jnp.exp2(moved_teacher)
        return (
            new_teacher,
            new_student,
            sum_teacher * shrink + exp_teacher.sum(axis=1),
            sum_student * jnp.exp2(moved_student) + jnp.exp2(student).sum(axis=1),
            (cross + sum_teacher * (moved_teacher - moved_student)) * shrink
            + (exp_teacher * (teacher - student)).sum(axis=1),
        )

    nothing = jnp.zeros(segments.shape, jnp.float32)
    lowest = nothing + MASKED
    start = (lowest, lowest, nothing, nothing, nothing)
    state = jax.lax.fori_loop(0, problem.tiles, measure, start)
    peak_teacher, peak_student, sum_teacher, sum_student, cross = state
    log_teacher, log_student = jnp.log2(sum_teacher), jnp.log2(sum_student)
    results.divergence[...] = (cross / sum_teacher - log_teacher + log_student) * LN_2
    if results.of_a is None:
        return
    log_teacher, log_student = peak_teacher + log_teacher, peak_student + log_student
    results.log_teacher[...], results.log_student[...] = log_teacher, log_student

    def add(index: Array, gradient: Array) -> Array:
        teacher, student = logits(index)
        slope = jnp.exp2(student - log_student[:, None]) - jnp.exp2(teacher - log_teacher[:, None])
        b_student = inputs.b_student[pl.ds(index * TILE, TILE), :]
        return gradient + _product(problem, slope, b_student)

    gradient = jax.lax.fori_loop(0, problem.tiles, add, jnp.zeros(a_student.shape, jnp.float32))
    step = inputs.weights[...] * (problem.scale_student * LN_2)
    results.of_a[...] = gradient * step[:, None]


def _keys(problem: _Problem, *references: Any) -> None:
    """Writes the gradient of one block of keys of one head; logits are [l, q] here."""
    inputs, (log_teacher, log_student, result) = _References(*references[:7]), references[7:]
    b_teacher, b_student = inputs.b_teacher[...], inputs.b_student[...]
    segments = inputs.key_segments[...]

    def add(index: Array, gradient: Array) -> Array:
        at = pl.ds(index * TILE, TILE)
        a_student = inputs.a_student[at, :]
        teacher, student = _logits(
            problem,
            (b_teacher, inputs.a_teacher[at, :]),
            (b_student, a_student),
            segments[:, None] == inputs.row_segments[at][None, :],
        )
        slope = jnp.exp2(student - log_student[at][None, :])
        slope -= jnp.exp2(teacher - log_teacher[at][None, :])
        return gradient + _product(problem, slope * inputs.weights[at][None, :], a_student)

    gradient = jax.lax.fori_loop(0, problem.tiles, add, jnp.zeros(b_student.shape, jnp.float32))
    result[...] = gradient * (problem.scale_student * LN_2)


def _logits(
    problem: _Problem,
    teacher: tuple[Float[Array, "m Kt"], Float[Array, "n Kt"]],
    student: tuple[Float[Array, "m Ks"], Float[Array, "n Ks"]],
    allowed: Bool[Array, "m n"],
) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
    """Returns the masked logits of a tile of both models, to base 2."""
    (x, y), (z, w) = teacher, student
    logits = _product(problem, x, y.T) * problem.scale_teacher
    logits_student = _product(problem, z, w.T) * problem.scale_student
    return jnp.where(allowed, logits, MASKED), jnp.where(allowed, logits_student, MASKED)


def _product(problem: _Problem, x: Array, y: Array) -> Float[Array, "m n"]:
    """Returns the matrix product in fp32."""
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    precision = problem.precision if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)
