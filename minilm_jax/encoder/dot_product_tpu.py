"""Dot-product attention as Pallas kernels for TPUs: logits live in VMEM only.

A program has all tokens of some rows, of as many heads as fill the 128 lanes of a TPU's vectors.
For one head the lanes of the others are zero in queries and cotangent, which costs no product: a
matrix unit is 128 wide whatever a head's width. Logits stand as [keys, rows], so that sums over
keys run down columns, and what belongs to a row is one line of lanes. The gradient computes the
probabilities again from the logarithm of each row's total. Segments mask, and dropout draws the
masks of dropout.py where they are used.

B batch, L tokens, D width, H heads, K head width; in a program W lanes of h heads, q rows at once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from minilm_jax.encoder.dropout import kept_of_sequence, odd
from minilm_jax.kernels import LN_2, MASKED, row_deltas
from minilm_jax.rows import zeros_like_any

LANES = 128
LONGEST = 1024
"""Tokens of a row whose arrays still fit the smallest VMEM, the 16 MiB of a v4."""
_TOKENS = 512
"""Of a program, where rows are shorter than that: starting one costs as much as many products; and
queries met at a time: the more there are, the less often a matrix unit changes its weights."""


class _Problem(NamedTuple):
    """What does not change within a problem."""

    length: int
    head: int
    """K."""
    group: int
    """Heads of a program."""
    rows: int
    """Rows of the batch of a program."""
    tile: int
    """Queries met at a time."""
    rate: float
    """Share of the probabilities that is dropped."""

    @property
    def scale(self) -> float:
        """Of logits whose exponentials are powers of two: a TPU has an instruction for those."""
        return float(self.head**-0.5 / LN_2)


class _Inputs(NamedTuple):
    """What every kernel reads: arrays, their blocks, or references to them."""

    words: Any  # 2B
    line: Any  # B 1 L
    """Segments of the queries, along the lanes."""
    column: Any  # B L 1
    """Segments of the keys."""
    query: Any  # B L D
    key: Any  # B L D
    value: Any  # B L D


class _OfRows(NamedTuple):
    """What the gradient reads beside it."""

    cotangent: Any  # B L D
    logsumexp: Any  # B H/h h L
    delta: Any  # B H/h h L


def fits_tpu(*, length: int, heads: int, head: int, dtype: DTypeLike) -> bool:
    """Returns whether the kernels suit rows of this length and heads of this width."""
    width = heads * head
    fills = width <= LANES or (LANES % head == 0 and width % LANES == 0)
    return length <= LONGEST and head <= LANES and fills and dtype == jnp.bfloat16


def tpu_forward(
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    segments: Int[Array, "B L"],
    words: UInt32[Array, "B 2"],
    *,
    heads: int,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B H L"]]:
    """Returns the mixed values and the logarithm of each row's total of exponentials."""
    batch, length, _ = query.shape
    problem = _problem(query, heads=heads, rate=rate)
    inputs = _inputs(query, key, value, segments, words)
    mixed, logsumexp = _run(
        _forward, problem, inputs, outputs=("mixed", "logsumexp"), interpret=interpret
    )
    return mixed[:, :length], logsumexp.reshape(batch, heads, -1)[:, :, :length]


def tpu_backward(
    cotangent: Float[Array, "B L D"],
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    mixed: Float[Array, "B L D"],
    logsumexp: Float[Array, "B H L"],
    segments: Int[Array, "B L"],
    words: UInt32[Array, "B 2"],
    *,
    heads: int,
    rate: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Returns the gradients of queries, keys and values."""
    batch, length, _ = query.shape
    problem = _problem(query, heads=heads, rate=rate)
    delta = row_deltas(cotangent, mixed, heads=heads).swapaxes(1, 2)

    def lines(x: Float[Array, "B H L"]) -> Float[Array, "B G h l"]:
        return _pad_tokens(x, axis=2).reshape(batch, -1, problem.group, _padded(length))

    of_rows = _OfRows(_pad_tokens(cotangent), lines(logsumexp), lines(delta))
    inputs = _inputs(query, key, value, segments, words)
    gradients = _run(
        _backward,
        problem,
        (*inputs, *of_rows),
        outputs=("query", "key", "value"),
        interpret=interpret,
    )
    of_query, of_key, of_value = (x[:, :length] for x in gradients)
    return of_query, of_key, of_value


def _forward(problem: _Problem, *references: Any) -> None:
    """Writes the mixed values of a program's rows and heads, and the logarithms of their totals."""
    inputs, (mixed, logsumexp) = _Inputs(*references[:-2]), references[-2:]
    keeper = _keeper(problem, inputs.words)

    def of_row(row: Any) -> None:
        key, values, keep = inputs.key[row], inputs.value[row].T, keeper(row)

        def of_tile(index: Any) -> None:
            at = _tile(problem, index)
            query, allowed = inputs.query[row, at, :], _allowed(inputs, row, at)
            found = jnp.zeros((values.shape[0], problem.tile), jnp.float32)
            for head in range(problem.group):
                logits = _across(key, _only(query, head, problem)) * problem.scale
                logits = jnp.where(allowed, logits, MASKED)
                peak = logits.max(axis=0, keepdims=True)
                weights = jnp.exp2(logits - peak)
                total = weights.sum(axis=0, keepdims=True)
                logsumexp[row, 0, pl.ds(head, 1), at] = (peak + jnp.log2(total)) * LN_2
                if problem.rate:
                    weights = jnp.where(keep(index, weights.shape, head), weights, 0.0)
                sums = _product(values, weights.astype(values.dtype))
                sums = sums / (total * (1 - problem.rate))
                found = _put(found, sums, head, problem)
            mixed[row, at, :] = found.T.astype(mixed.dtype)

        _each(key.shape[0] // problem.tile, of_tile)

    _each(problem.rows, of_row)


def _backward(problem: _Problem, *references: Any) -> None:
    """Writes the gradients of a program's rows and heads."""
    inputs, of_rows = _Inputs(*references[:6]), _OfRows(*references[6:9])
    of_query, of_key, of_value, key_sums, value_sums = references[9:]
    keeper = _keeper(problem, inputs.words)

    def of_row(row: Any) -> None:
        key, value = inputs.key[row], inputs.value[row]
        keys, keep = key.T, keeper(row)
        key_sums[...] = jnp.zeros(key_sums.shape, jnp.float32)
        value_sums[...] = jnp.zeros(value_sums.shape, jnp.float32)

        def of_tile(index: Any) -> None:
            at = _tile(problem, index)
            query, allowed = inputs.query[row, at, :], _allowed(inputs, row, at)
            cotangent = of_rows.cotangent[row, at, :]
            found = jnp.zeros((keys.shape[0], problem.tile), jnp.float32)
            for head in range(problem.group):
                own_query, own_cotangent = (_only(x, head, problem) for x in (query, cotangent))
                line = row, 0, pl.ds(head, 1), at
                logits = _across(key, own_query) * problem.scale
                logits = jnp.where(allowed, logits, MASKED)
                probabilities = jnp.exp2(logits - of_rows.logsumexp[line] / LN_2)
                slopes, dropped = _across(value, own_cotangent), probabilities
                if problem.rate:
                    factor = jnp.where(keep(index, logits.shape, head), 1 / (1 - problem.rate), 0.0)
                    slopes, dropped = slopes * factor, probabilities * factor
                of_logits = (probabilities * (slopes - of_rows.delta[line])).astype(key.dtype)
                # Where the others' lanes are zero, so are those of the products.
                value_sums[...] += _product(dropped.astype(key.dtype), own_cotangent)
                key_sums[...] += _product(of_logits, own_query)
                found = _put(found, _product(keys, of_logits), head, problem)
            of_query[row, at, :] = (found.T * problem.head**-0.5).astype(of_query.dtype)

        _each(key.shape[0] // problem.tile, of_tile)
        of_key[row] = (key_sums[...] * problem.head**-0.5).astype(of_key.dtype)
        of_value[row] = value_sums[...].astype(of_value.dtype)

    _each(problem.rows, of_row)


def _each(count: int, function: Callable[[Any], None]) -> None:
    """Calls the function with 0 to count - 1, one after another."""
    if count == 1:
        return function(0)
    jax.lax.fori_loop(0, count, lambda index, _: function(index), None)
    return None


def _tile(problem: _Problem, index: Any) -> Any:
    return pl.ds(pl.multiple_of(index * problem.tile, problem.tile), problem.tile)


def _allowed(inputs: _Inputs, row: Any, at: Any) -> Bool[Array, "L q"]:
    return inputs.column[row] == inputs.line[row, :, at]


def _only(x: Float[Array, "q W"], head: int, problem: _Problem) -> Float[Array, "q W"]:
    """Returns the array with zeros in the lanes of the program's other heads."""
    return _put(jnp.zeros_like(x), x, head, problem, axis=1)


def _put(
    whole: Float[Array, "W q"],
    part: Float[Array, "W q"],
    head: int,
    problem: _Problem,
    *,
    axis: int = 0,
) -> Float[Array, "W q"]:
    """Returns `whole` with what belongs to one of the program's heads from `part`."""
    if problem.group == 1:
        return part
    place = jax.lax.broadcasted_iota(jnp.int32, whole.shape, axis)
    own = (place >= head * problem.head) & (place < (head + 1) * problem.head)
    return jnp.where(own, part, whole)


def _keeper(problem: _Problem, words: Any) -> Callable[[Any], Callable[..., Bool[Array, "L q"]]]:
    """Returns row -> which probabilities of a tile and a head dropout keeps, all of the program."""
    first_row, first_head = (
        pl.program_id(axis) * size for axis, size in enumerate((problem.rows, problem.group))
    )

    def of_row(row: Any) -> Callable[..., Bool[Array, "L q"]]:
        at = 2 * (first_row + row)
        start, step = words[at], odd(words[at + 1])

        def keep(index: Any, shape: tuple[int, int], head: int) -> Bool[Array, "L q"]:
            # start + (the row's first index + the key's) · step, each part where it is the same.
            keys = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
            rows = jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1) + index * problem.tile
            rows = ((first_head + head) * problem.length + rows) * problem.length
            rows = start + rows.astype(jnp.uint32) * step
            return kept_of_sequence(rows + keys.astype(jnp.uint32) * step, problem.rate)

        return keep

    return of_row


def _across(x: Float[Array, "L W"], y: Float[Array, "q W"]) -> Float[Array, "L q"]:
    """Returns the products of rows of both, in fp32."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _problem(query: Float[Array, "B L D"], *, heads: int, rate: float) -> _Problem:
    batch, length, width = query.shape
    head, padded = width // heads, _padded(length)
    group = heads if width <= LANES else max(1, LANES // head)
    fitting = max(1, _TOKENS // padded)
    rows = next(n for n in range(min(fitting, batch), 0, -1) if batch % n == 0)
    tile = next(n for n in range(_TOKENS, 0, -LANES) if padded % n == 0)
    return _Problem(length, head, group, rows, tile, rate)


def _padded(length: int) -> int:
    return -(-length // LANES) * LANES


def _pad_tokens(x: Array, *, axis: int = 1, with_value: int = 0) -> Array:
    """Returns the array with its tokens padded to whole lines of lanes."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, _padded(x.shape[axis]) - x.shape[axis])
    return jnp.pad(x, widths, constant_values=with_value)


def _inputs(query: Array, key: Array, value: Array, segments: Array, words: Array) -> _Inputs:
    segments = _pad_tokens(segments.astype(jnp.int32), with_value=-1)
    query, key, value = (_pad_tokens(x) for x in (query, key, value))
    return _Inputs(words.reshape(-1), segments[:, None, :], segments[:, :, None], query, key, value)


def _run(
    kernel: Callable[..., None],
    problem: _Problem,
    arrays: Sequence[Array],
    *,
    outputs: Sequence[str],
    interpret: bool,
) -> list[Array]:
    """Runs the kernel for some rows and a group of heads at a time, and returns its outputs."""
    inputs = _Inputs(*arrays[:6])
    batch, length, width = inputs.query.shape
    lanes, rows = problem.head * problem.group, problem.rows
    groups = width // lanes
    wide = pl.BlockSpec((rows, length, lanes), lambda b, g: (b, 0, g))
    lines = pl.BlockSpec((rows, 1, problem.group, length), lambda b, g: (b, g, 0, 0))
    specs = _Inputs(
        words=pl.BlockSpec(memory_space=pltpu.SMEM),
        line=pl.BlockSpec((rows, 1, length), lambda b, g: (b, 0, 0)),
        column=pl.BlockSpec((rows, length, 1), lambda b, g: (b, 0, 0)),
        query=wide,
        key=wide,
        value=wide,
    )

    def output(name: str) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
        if name == "logsumexp":
            shape, dtype, spec = (batch, groups, problem.group, length), jnp.float32, lines
        else:
            shape, dtype, spec = inputs.query.shape, inputs.query.dtype, wide
        found = jax.eval_shape(lambda x: zeros_like_any(shape, like=x).astype(dtype), list(arrays))
        return found, spec

    shapes, out_specs = zip(*map(output, outputs), strict=True)
    sums = pltpu.VMEM((length, lanes), jnp.float32)
    run = pl.pallas_call(
        partial(kernel, problem),
        grid=(batch // rows, groups),
        in_specs=[*specs, *([wide, lines, lines] if len(arrays) > 6 else [])],
        out_specs=list(out_specs),
        out_shape=list(shapes),
        scratch_shapes=[sums, sums] if kernel is _backward else [],
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=(10 if kernel is _backward else 4) * batch * length**2 * width,
            transcendentals=batch * groups * problem.group * length**2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
        ),
        name=f"attention{kernel.__name__}",
    )
    return list(run(*arrays))
