"""The relation loss as a Pallas kernel for TPUs: relations live in VMEM only.

Tokens stand along the last axis, `[head, K, L]`: a TPU's vectors are 128 lanes wide, and a relation
head (8 to 64 numbers) would leave most of them empty. So a tile of a relation is `[keys, rows]`,
the sums over keys run down columns, and what belongs to a row is one line of lanes.

A program meets the keys of a block of rows twice, first for both softmaxes and the divergence, then
for p_S - p_T and the gradients; once where one tile holds them all. The blocks of a head run one
after another and add up the gradient of the keys in place.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from minilm_jax.distill.relations_blocked import (
    HeadSums,
    Student,
    Teacher,
    Wanted,
    products_precision,
)
from minilm_jax.kernels import LN_2, MASKED
from minilm_jax.rows import zeros_like_any


class _Inputs(NamedTuple):
    """One thing for each array that the kernels read: the array, its block, or a reference to it.

    G = B · R heads; tokens are padded to whole tiles and heads to whole lines of registers.
    """

    a_teacher: Any  # G Kt L
    b_teacher: Any  # G Kt L
    a_student: Any  # G Ks L
    b_student: Any  # G Ks L
    row_segments: Any  # B 1 L
    key_segments: Any  # B L 1
    weights: Any  # B 1 L


class _Kernel(NamedTuple):
    """What does not change within a call."""

    heads: int
    tile: int
    scale_teacher: float
    """Of logits whose exponentials are powers of two: a TPU has an instruction for those."""
    scale_student: float
    precision: jax.lax.Precision
    interpret: bool


VMEM = 2**24
"""Bytes of a core's fast memory that a kernel can take, where it is smallest: a v4."""


def fits_tpu(*, length: int, head_teacher: int, head_student: int, dtype: DTypeLike) -> bool:
    """Returns whether the kernel suits a length and heads of these widths: all keys are in VMEM."""
    if not 64 <= length <= 8192 or max(head_teacher, head_student) > 128:
        return False
    tile, student = _tile(length), _fill_up_head(head_student)
    both = (_fill_up_head(head_teacher) + student) * jnp.dtype(dtype).itemsize
    # Twice, because the next head's are fetched meanwhile: both models' keys, the fp32 gradient of
    # the student's, and the segments, each in a line of 128 lanes.
    keys = 2 * (length + -length % tile) * (both + 4 * student + 4 * 128)
    # Of a tile. Compiled for a v4, programs took 0.1 MiB more or less than this in all.
    rows = 16 * tile**2 + 8 * tile * both
    return keys + rows <= VMEM


def _tile(length: int) -> int:
    """Returns the tokens of a tile: many, or a matrix unit changes its weights all the time."""
    most = 512 if length <= 1024 else 256
    return -(-length // (128 * -(-length // most))) * 128


def _fill_up_head(head: int) -> int:
    """Returns the width that the kernel gives a head: whole lines of registers, of 8 or 16."""
    return -(-head // 16) * 16


def tpu_sums(
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
    tile = _tile(length)
    padding = -length % tile
    segments = jnp.pad(segments, ((0, 0), (0, padding)))
    weights = jnp.pad(weights, ((0, 0), (0, padding)))
    lay_out = partial(_tokens_last, heads=heads, segments=segments)
    arrays = _Inputs(
        a_teacher=lay_out(teacher[0]),
        b_teacher=lay_out(teacher[1]),
        a_student=lay_out(student[0]),
        b_student=lay_out(student[1]),
        row_segments=segments[:, None, :],
        key_segments=segments[:, :, None],
        weights=weights[:, None, :],
    )
    kernel = _Kernel(
        heads=heads,
        tile=tile,
        scale_teacher=1 / math.sqrt(teacher[0].shape[-1] // heads) / LN_2,
        scale_student=1 / math.sqrt(width // heads) / LN_2,
        precision=products_precision(*teacher, *student),
        interpret=interpret,
    )
    found = _run(arrays, kernel, wanted=wanted)
    divergence = found.divergence[:, 0].reshape(batch, heads, -1)
    per_head = jnp.einsum("brl,bl->r", divergence, weights, precision=jax.lax.Precision.HIGHEST)
    if wanted == "loss":
        return HeadSums(per_head)

    def merge(x: Float[Array, "G K L"]) -> Float[Array, "B l D"]:
        x = x[:, : width // heads, :length].reshape(batch, heads, -1, length)
        return x.transpose(0, 3, 1, 2).reshape(batch, length, width)

    return HeadSums(per_head, a=merge(found.a), b=merge(found.b))


def _tokens_last(
    x: Float[Array, "B l D"], *, heads: int, segments: Int[Array, "B L"]
) -> Float[Array, "G K L"]:
    """Returns the heads of every row with tokens last; padding, of tokens and of heads, is zero."""
    batch, length, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, segments.shape[1] - length), (0, 0)))
    x = jnp.where(segments[..., None] > 0, x, 0)
    x = x.reshape(batch, -1, heads, width // heads).transpose(0, 2, 3, 1)
    head = width // heads
    x = jnp.pad(x, ((0, 0), (0, 0), (0, _fill_up_head(head) - head), (0, 0)))
    return x.reshape(batch * heads, _fill_up_head(head), -1)


class _Results(NamedTuple):
    """What the kernel writes; gradients None where only the loss is wanted."""

    divergence: Any  # G 1 L
    a: Any = None  # G Ks L
    """Gradient of the rows' array."""
    b: Any = None  # G Ks L
    """Gradient of the keys' array."""


def _run(arrays: _Inputs, kernel: _Kernel, *, wanted: Wanted) -> _Results:
    """Returns divergences and gradients, one block of rows of one head a program."""
    (folded, head_teacher, length), head = arrays.a_teacher.shape, arrays.a_student.shape[1]
    tile, heads = kernel.tile, kernel.heads

    def rows(lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, lines, tile), lambda g, i: (g, 0, i))

    def keys(lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, lines, length), lambda g, i: (g, 0, 0))

    of_rows = pl.BlockSpec((1, 1, tile), lambda g, i: (jax.lax.div(g, heads), 0, i))
    shape = partial(_output, like=arrays)
    outputs = [(shape((folded, 1, length)), rows(1))]
    if wanted == "loss and gradients":
        gradient = shape((folded, head, length))
        outputs += [(gradient, rows(head)), (gradient, keys(head))]

    def body(*references: Any) -> None:
        inputs = len(_Inputs._fields)
        _rows(_Inputs(*references[:inputs]), _Results(*references[inputs:]), kernel)

    call = pl.pallas_call(
        body,
        grid=(folded, length // tile),
        in_specs=list(
            _Inputs(
                a_teacher=rows(head_teacher),
                b_teacher=keys(head_teacher),
                a_student=rows(head),
                b_student=keys(head),
                row_segments=of_rows,
                key_segments=pl.BlockSpec(
                    (1, length, 1), lambda g, i: (jax.lax.div(g, heads), 0, 0)
                ),
                weights=of_rows,
            )
        ),
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        interpret=kernel.interpret,
        # The blocks of a head add to one gradient of the keys.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        # The logits of both models, twice, and two products for the gradients.
        cost_estimate=pl.CostEstimate(
            flops=(4 * head_teacher + 8 * head) * folded * length**2,
            transcendentals=4 * folded * length**2,
            bytes_accessed=sum(
                x.size * x.dtype.itemsize for x in (*arrays, *(shape for shape, _ in outputs))
            ),
        ),
        name="relation_rows",
    )
    return _Results(*call(*arrays))


def _rows(arrays: _Inputs, results: _Results, kernel: _Kernel) -> None:
    """Writes what one block of rows of one head gives."""
    tile, product = kernel.tile, partial(_product, kernel=kernel)
    a_teacher, a_student = arrays.a_teacher[0], arrays.a_student[0]
    row_segments = arrays.row_segments[0]
    tiles = arrays.b_teacher.shape[-1] // tile

    def logits(index: Any) -> tuple[Array, Array]:
        at = pl.ds(pl.multiple_of(index * tile, tile), tile)
        return _logits(
            (arrays.b_teacher[0, :, at], a_teacher),
            (arrays.b_student[0, :, at], a_student),
            arrays.key_segments[0, at, :] == row_segments,
            kernel,
        )

    def measure(
        index: Any, state: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        """Adds a tile of keys to the running maxima, sums and Σ 2^t (t - s), all shifted.

        Returns the exponentials beside them.
        """
        maximum_teacher, maximum_student, sum_teacher, sum_student, cross = state
        teacher, student = logits(index)
        new_teacher = jnp.maximum(maximum_teacher, jnp.max(teacher, axis=0, keepdims=True))
        new_student = jnp.maximum(maximum_student, jnp.max(student, axis=0, keepdims=True))
        moved_teacher, moved_student = maximum_teacher - new_teacher, maximum_student - new_student
        teacher, student = teacher - new_teacher, student - new_student
        exp_teacher, exp_student = jnp.exp2(teacher), jnp.exp2(student)
        cross = (cross + sum_teacher * (moved_teacher - moved_student)) * jnp.exp2(moved_teacher)
        new = (
            new_teacher,
            new_student,
            sum_teacher * jnp.exp2(moved_teacher) + jnp.sum(exp_teacher, axis=0, keepdims=True),
            sum_student * jnp.exp2(moved_student) + jnp.sum(exp_student, axis=0, keepdims=True),
            cross + jnp.sum(exp_teacher * (teacher - student), axis=0, keepdims=True),
        )
        return new, (exp_teacher, exp_student)

    nothing = jnp.zeros(row_segments.shape, jnp.float32)
    lowest = jnp.full(row_segments.shape, MASKED, jnp.float32)
    state: tuple[Array, ...] = (lowest, lowest, nothing, nothing, nothing)
    exponentials = None
    if tiles == 1:
        state, exponentials = measure(0, state)
    else:
        state = jax.lax.fori_loop(0, tiles, lambda index, state: measure(index, state)[0], state)
    maximum_teacher, maximum_student, sum_teacher, sum_student, cross = state
    log_ratio = jnp.log2(sum_student) - jnp.log2(sum_teacher)
    results.divergence[0] = (cross / sum_teacher + log_ratio) * LN_2
    if results.a is None:
        return

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        results.b[...] = jnp.zeros(results.b.shape, jnp.float32)

    weight = arrays.weights[0] * (kernel.scale_student * LN_2)
    weight_teacher, weight_student = weight / sum_teacher, weight / sum_student

    def add(index: Any, gradient: Array) -> Array:
        at = pl.ds(pl.multiple_of(index * tile, tile), tile)
        if exponentials is None:
            teacher, student = logits(index)
            exp_teacher = jnp.exp2(teacher - maximum_teacher)
            exp_student = jnp.exp2(student - maximum_student)
        else:
            exp_teacher, exp_student = exponentials
        slope = exp_student * weight_student - exp_teacher * weight_teacher
        results.b[0, :, at] += product("kq,lq->kl", a_student, slope)
        return gradient + product("kl,lq->kq", arrays.b_student[0, :, at], slope)

    start = jnp.zeros(a_student.shape, jnp.float32)
    results.a[0] = add(0, start) if tiles == 1 else jax.lax.fori_loop(0, tiles, add, start)


def _logits(
    teacher: tuple[Float[Array, "Kt l"], Float[Array, "Kt q"]],
    student: tuple[Float[Array, "Ks l"], Float[Array, "Ks q"]],
    allowed: Bool[Array, "l q"],
    kernel: _Kernel,
) -> tuple[Float[Array, "l q"], Float[Array, "l q"]]:
    """Returns the masked logits of a tile of both models, from (keys, rows) of each."""
    logits = _product("kl,kq->lq", *teacher, kernel=kernel) * kernel.scale_teacher
    logits_student = _product("kl,kq->lq", *student, kernel=kernel) * kernel.scale_student
    return jnp.where(allowed, logits, MASKED), jnp.where(allowed, logits_student, MASKED)


def _product(equation: str, x: Array, y: Array, *, kernel: _Kernel) -> Array:
    """Returns the matrix product in fp32."""
    if x.dtype != y.dtype:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    left, right = equation.split("->")[0].split(",")
    shared = (set(left) & set(right)).pop()
    return jax.lax.dot_general(
        x,
        y,
        (((left.index(shared),), (right.index(shared),)), ((), ())),
        precision=kernel.precision if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _output(shape: tuple[int, ...], *, like: _Inputs) -> jax.ShapeDtypeStruct:
    """Returns the type of an fp32 output that varies over the mapped axes of the inputs."""
    return jax.eval_shape(lambda arrays: zeros_like_any(shape, like=arrays), like)
