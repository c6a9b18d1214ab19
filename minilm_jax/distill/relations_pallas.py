"""The relation loss as Pallas kernels for TPUs and GPUs: relations live in registers and VMEM only.

Every kernel keeps tokens along the last axis, `[head, K, L]`: a TPU's vectors are 128 lanes wide,
and a relation head (8 to 64 numbers) would leave most of them empty. So a tile of a relation is
`[keys, rows]`, the sums over keys run down columns, and what belongs to a row is one line of lanes.

`rows` meets the keys of a block of rows twice, first for both softmaxes and the divergence, then
for p_S - p_T and the gradients. On a TPU the blocks of a head run one after another and add up the
gradient of the keys in place. On a GPU they run at once, so `keys` forms p_S - p_T a second time.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Bool, Float, Int

from minilm_jax.distill.relations_blocked import (
    HeadSums,
    Student,
    Teacher,
    Wanted,
    products_precision,
    zeros_like_any,
)

Device = Literal["tpu", "gpu", "interpreted tpu", "interpreted gpu"]

# Finite, because 0 · (-inf - (-inf)) is not a number.
_MASKED = -1e30


class _Inputs(NamedTuple):
    """One thing for each array that the kernels read: the array, its block, or a reference to it.

    G = B · R heads; tokens are padded to whole tiles and heads to what the device wants.
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
    scale_student: float
    precision: jax.lax.Precision
    device: Device

    @property
    def is_tpu(self) -> bool:
        return self.device.endswith("tpu")


def fits_pallas(*, teacher_width: int, student_width: int, length: int, heads: int) -> bool:
    """Returns whether the kernels suit a shape: a tile of tokens, and heads that fit registers."""
    return length >= 64 and max(teacher_width, student_width) // heads <= 128 and length <= 8192


def pallas_sums(
    teacher: Teacher,
    student: Student,
    segments: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    heads: int,
    device: Device,
    wanted: Wanted,
) -> HeadSums:
    """Returns the loss of every head and, where wanted, its gradients, by the device's kernels."""
    batch, length, width = student[0].shape
    # Registers hold a GPU's tile, VMEM a TPU's.
    tile = 64 if device.endswith("gpu") else 128 if length <= 128 else 256
    padding = -length % tile
    segments = jnp.pad(segments, ((0, 0), (0, padding)))
    weights = jnp.pad(weights, ((0, 0), (0, padding)))
    lay_out = partial(_tokens_last, heads=heads, segments=segments, device=device)
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
        scale_teacher=1 / math.sqrt(teacher[0].shape[-1] // heads),
        scale_student=1 / math.sqrt(width // heads),
        precision=products_precision(student[0]),
        device=device,
    )
    found = _call_rows(arrays, kernel, wanted=wanted)
    divergence = found.divergence[:, 0].reshape(batch, heads, -1)
    per_head = jnp.einsum("brl,bl->r", divergence, weights, precision=jax.lax.Precision.HIGHEST)
    if wanted == "loss":
        return HeadSums(per_head)
    b = found.b if kernel.is_tpu else _call_keys(arrays, found, kernel)

    def merge(x: Float[Array, "G K L"]) -> Float[Array, "B l D"]:
        x = x[:, : width // heads, :length].reshape(batch, heads, -1, length)
        return x.transpose(0, 3, 1, 2).reshape(batch, length, width)

    return HeadSums(per_head, a=merge(found.a), b=merge(b))


def _tokens_last(
    x: Float[Array, "B l D"], *, heads: int, segments: Int[Array, "B L"], device: Device
) -> Float[Array, "G K L"]:
    """Returns the heads of every row with tokens last; padding, of tokens and of heads, is zero.

    Eight or sixteen numbers are one line of registers on a TPU, sixteen the least that a GPU's
    matrix unit takes, which also wants a power of two.
    """
    batch, length, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, segments.shape[1] - length), (0, 0)))
    x = jnp.where(segments[..., None] > 0, x, 0)
    x = x.reshape(batch, -1, heads, width // heads).transpose(0, 2, 3, 1)
    head = width // heads
    padded = -(-head // 16) * 16
    if device.endswith("gpu"):
        padded = max(16, 2 ** math.ceil(math.log2(head)))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padded - head), (0, 0)))
    return x.reshape(batch * heads, padded, -1)


class _RowsResult(NamedTuple):
    """What the kernel over rows writes; None what is not wanted."""

    divergence: Float[Array, "G 1 L"]
    a: Any = None
    """Gradient "G Ks L" of the rows' array."""
    b: Any = None
    """Gradient "G Ks L" of the keys' array, on a TPU."""
    maximum_teacher: Any = None
    """On a GPU, "G 1 L": of each row's logits the maximum, and below the logarithm of the sum."""
    maximum_student: Any = None
    log_teacher: Any = None
    log_student: Any = None


def _call_rows(arrays: _Inputs, kernel: _Kernel, *, wanted: Wanted) -> _RowsResult:
    """Returns divergences and gradients, one block of rows of one head a program."""
    (folded, head_teacher, length), head = arrays.a_teacher.shape, arrays.a_student.shape[1]
    tile, heads = kernel.tile, kernel.heads

    def rows(lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, lines, tile), lambda g, i: (g, 0, i))

    def keys(lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, lines, length), lambda g, i: (g, 0, 0))

    of_rows = pl.BlockSpec((1, 1, tile), lambda g, i: (jax.lax.div(g, heads), 0, i))
    shape = partial(_output, like=arrays)
    line = (shape((folded, 1, length)), rows(1))
    outputs: dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]] = {"divergence": line}
    if wanted == "loss and gradients":
        outputs["a"] = (shape((folded, head, length)), rows(head))
        if kernel.is_tpu:
            outputs["b"] = (shape((folded, head, length)), keys(head))
        else:
            for name in ("maximum_teacher", "maximum_student", "log_teacher", "log_student"):
                outputs[name] = line

    def body(*references: Any) -> None:
        inputs = _Inputs(*references[: len(_Inputs._fields)])
        results = references[len(_Inputs._fields) :]
        _rows(inputs, _RowsResult(**dict(zip(outputs, results, strict=True))), kernel)

    found = _pallas_call(
        body,
        kernel,
        grid=(folded, length // tile),
        in_specs=_Inputs(
            a_teacher=rows(head_teacher),
            b_teacher=keys(head_teacher),
            a_student=rows(head),
            b_student=keys(head),
            row_segments=of_rows,
            key_segments=pl.BlockSpec((1, length, 1), lambda g, i: (jax.lax.div(g, heads), 0, 0)),
            weights=of_rows,
        ),
        outputs=list(outputs.values()),
        name="relation_rows",
    )(*arrays)
    return _RowsResult(**dict(zip(outputs, found, strict=True)))


def _rows(arrays: _Inputs, results: _RowsResult, kernel: _Kernel) -> None:
    """Writes what one block of rows of one head gives."""
    tile, product = kernel.tile, partial(_product, kernel=kernel)
    a_teacher, a_student = arrays.a_teacher[0], arrays.a_student[0]
    row_segments = arrays.row_segments[0]
    tiles = arrays.b_teacher.shape[-1] // tile

    def logits(index: Array) -> tuple[Array, Array]:
        at = pl.ds(pl.multiple_of(index * tile, tile), tile)
        return _logits(
            (arrays.b_teacher[0, :, at], a_teacher),
            (arrays.b_student[0, :, at], a_student),
            arrays.key_segments[0, at, :] == row_segments,
            kernel,
        )

    def measure(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds a tile of keys to the running maxima, sums and Σ exp(t) (t - s), all shifted."""
        maximum_teacher, maximum_student, sum_teacher, sum_student, cross = state
        teacher, student = logits(index)
        new_teacher = jnp.maximum(maximum_teacher, jnp.max(teacher, axis=0, keepdims=True))
        new_student = jnp.maximum(maximum_student, jnp.max(student, axis=0, keepdims=True))
        moved_teacher, moved_student = maximum_teacher - new_teacher, maximum_student - new_student
        teacher, student = teacher - new_teacher, student - new_student
        exp_teacher = jnp.exp(teacher)
        cross = (cross + sum_teacher * (moved_teacher - moved_student)) * jnp.exp(moved_teacher)
        return (
            new_teacher,
            new_student,
            sum_teacher * jnp.exp(moved_teacher) + jnp.sum(exp_teacher, axis=0, keepdims=True),
            sum_student * jnp.exp(moved_student) + jnp.sum(jnp.exp(student), axis=0, keepdims=True),
            cross + jnp.sum(exp_teacher * (teacher - student), axis=0, keepdims=True),
        )

    nothing = jnp.zeros(row_segments.shape, jnp.float32)
    lowest = jnp.full(row_segments.shape, _MASKED, jnp.float32)
    maximum_teacher, maximum_student, sum_teacher, sum_student, cross = jax.lax.fori_loop(
        0, tiles, measure, (lowest, lowest, nothing, nothing, nothing)
    )
    log_teacher, log_student = jnp.log(sum_teacher), jnp.log(sum_student)
    results.divergence[0] = cross / sum_teacher - log_teacher + log_student
    if results.a is None:
        return
    if results.b is not None:

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            results.b[...] = jnp.zeros(results.b.shape, jnp.float32)

    else:
        results.maximum_teacher[0], results.log_teacher[0] = maximum_teacher, log_teacher
        results.maximum_student[0], results.log_student[0] = maximum_student, log_student
    weight = arrays.weights[0] * kernel.scale_student

    def add(index: Array, gradient: Array) -> Array:
        at = pl.ds(pl.multiple_of(index * tile, tile), tile)
        teacher, student = logits(index)
        slope = jnp.exp(student - maximum_student) * (weight / sum_student)
        slope -= jnp.exp(teacher - maximum_teacher) * (weight / sum_teacher)
        if results.b is not None:
            results.b[0, :, at] += product("kq,lq->kl", a_student, slope)
        return gradient + product("kl,lq->kq", arrays.b_student[0, :, at], slope)

    results.a[0] = jax.lax.fori_loop(0, tiles, add, jnp.zeros(a_student.shape, jnp.float32))


def _call_keys(arrays: _Inputs, rows: _RowsResult, kernel: _Kernel) -> Float[Array, "G Ks L"]:
    """Returns the gradient of the keys' array, one block of keys of one head a program."""
    (folded, head_teacher, length), head = arrays.a_teacher.shape, arrays.a_student.shape[1]
    tile, heads = kernel.tile, kernel.heads

    def whole(lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, lines, length), lambda g, i: (g, 0, 0))

    def keys(lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, lines, tile), lambda g, i: (g, 0, i))

    of_rows = pl.BlockSpec((1, 1, length), lambda g, i: (jax.lax.div(g, heads), 0, 0))
    statistics = (
        rows.maximum_teacher,
        rows.maximum_student,
        rows.log_teacher,
        rows.log_student,
    )

    def body(*references: Any) -> None:
        inputs = _Inputs(*references[: len(_Inputs._fields)])
        _keys(inputs, references[len(_Inputs._fields) : -1], references[-1], kernel)

    (found,) = _pallas_call(
        body,
        kernel,
        grid=(folded, length // tile),
        in_specs=(
            *_Inputs(
                a_teacher=whole(head_teacher),
                b_teacher=keys(head_teacher),
                a_student=whole(head),
                b_student=keys(head),
                row_segments=of_rows,
                key_segments=pl.BlockSpec((1, tile, 1), lambda g, i: (jax.lax.div(g, heads), i, 0)),
                weights=of_rows,
            ),
            *(whole(1) for _ in statistics),
        ),
        outputs=[(_output((folded, head, length), like=arrays), keys(head))],
        name="relation_keys",
    )(*arrays, *statistics)
    return found


def _keys(arrays: _Inputs, statistics: tuple[Any, ...], result: Any, kernel: _Kernel) -> None:
    """Writes the gradient of one block of keys of one head."""
    tile = kernel.tile
    b_teacher, b_student = arrays.b_teacher[0], arrays.b_student[0]
    key_segments = arrays.key_segments[0]

    def add(index: Array, gradient: Array) -> Array:
        at = pl.ds(pl.multiple_of(index * tile, tile), tile)
        maximum_teacher, maximum_student, log_teacher, log_student = (
            x[0, :, at] for x in statistics
        )
        a_student = arrays.a_student[0, :, at]
        teacher, student = _logits(
            (b_teacher, arrays.a_teacher[0, :, at]),
            (b_student, a_student),
            key_segments == arrays.row_segments[0, :, at],
            kernel,
        )
        slope = jnp.exp(student - maximum_student - log_student)
        slope -= jnp.exp(teacher - maximum_teacher - log_teacher)
        slope *= arrays.weights[0, :, at] * kernel.scale_student
        return gradient + _product("kq,lq->kl", a_student, slope, kernel=kernel)

    tiles = arrays.a_teacher.shape[-1] // tile
    result[0] = jax.lax.fori_loop(0, tiles, add, jnp.zeros(b_student.shape, jnp.float32))


def _logits(
    teacher: tuple[Float[Array, "Kt l"], Float[Array, "Kt q"]],
    student: tuple[Float[Array, "Ks l"], Float[Array, "Ks q"]],
    allowed: Bool[Array, "l q"],
    kernel: _Kernel,
) -> tuple[Float[Array, "l q"], Float[Array, "l q"]]:
    """Returns the masked logits of a tile of both models, from (keys, rows) of each."""
    logits = _product("kl,kq->lq", *teacher, kernel=kernel) * kernel.scale_teacher
    logits_student = _product("kl,kq->lq", *student, kernel=kernel) * kernel.scale_student
    return jnp.where(allowed, logits, _MASKED), jnp.where(allowed, logits_student, _MASKED)


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


def _pallas_call(
    body: Callable[..., None],
    kernel: _Kernel,
    *,
    grid: tuple[int, ...],
    in_specs: Any,
    outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    name: str,
) -> Callable[..., list[Array]]:
    """Returns the kernel for its device; the second axis of the grid is the blocks of a head."""
    parameters: Any = None
    if kernel.device == "tpu":
        parameters = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))
    elif kernel.device == "gpu":
        parameters = plgpu.CompilerParams(num_warps=4, num_stages=2)
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=list(in_specs),
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        interpret=kernel.device.startswith("interpreted"),
        compiler_params=parameters,
        name=name,
    )
