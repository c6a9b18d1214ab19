"""Dot-product attention as Pallas kernels for NVIDIA GPUs: no logit leaves a multiprocessor.

FlashAttention (Dao et al., arXiv 2205.14135; loops as in its second version, 2307.08691): a program
meets the keys of a block of rows tile by tile and keeps a running maximum and total of each row.
The gradient computes the probabilities again from the logarithm of that total, once for a block of
rows and once for a block of keys. Segments mask, and dropout draws the masks of dropout.py where
they are used. Heads stay where the projections have them, side by side in the last axis.

B batch, L tokens, D width, H heads, K head width; q rows and l keys that a program sees at a time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, UInt32

from minilm_jax.encoder.dropout import kept_of_sequence, odd
from minilm_jax.kernels import (
    LN_2,
    MASKED,
    TILE,
    Output,
    Side,
    pad_tokens,
    row_deltas,
    run_on_gpu,
)


class _Problem(NamedTuple):
    """What does not change within a problem."""

    length: int
    heads: int
    head: int
    """K."""
    rate: float
    """Share of the probabilities that is dropped."""

    @property
    def scale(self) -> float:
        """Of logits whose exponentials are powers of two: a GPU has an instruction for those."""
        return float(self.head**-0.5 / LN_2)

    @property
    def tiles(self) -> int:
        """Of a row of the batch, the last one filled up."""
        return -(-self.length // TILE)


class _References(NamedTuple):
    """What every kernel reads, of one head of one row of the batch.

    One side has the program's own block of tokens, the other all tokens.
    """

    query: Any  # q K
    key: Any  # l K
    value: Any  # l K
    row_segments: Any  # q
    key_segments: Any  # l
    words: Any  # 2


class _OfRows(NamedTuple):
    """What the gradients read beside it."""

    cotangent: Any  # q K
    logsumexp: Any  # q
    delta: Any  # q


def gpu_forward(
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
    batch, length, width = query.shape
    problem = _Problem(length, heads, width // heads, rate)
    query, key, value = (pad_tokens(x) for x in (query, key, value))
    segments = pad_tokens(segments, with_value=-1)
    # Two tiles of rows, where they come out even, make twice the use of the keys that are read.
    block = 2 * TILE if problem.tiles % 2 == 0 else TILE
    own, every = Side(query.shape[1], block), Side(query.shape[1])
    mixed, logsumexp = run_on_gpu(
        partial(_forward, problem),
        _inputs(problem, query, key, value, segments, words, rows=own, keys=every),
        [
            Output(query.shape, query.dtype, own.heads(problem.head)),
            Output((batch, heads, query.shape[1]), jnp.float32, own.line()),
        ],
        grid=(query.shape[1] // block, heads, batch),
        interpret=interpret,
        name="attention_forward",
    )
    return mixed[:, :length], logsumexp[:, :, :length]


def gpu_backward(
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
    batch, length, width = query.shape
    problem = _Problem(length, heads, width // heads, rate)
    delta = row_deltas(cotangent, mixed, heads=heads).swapaxes(1, 2)
    query, key, value, cotangent = (pad_tokens(x) for x in (query, key, value, cotangent))
    logsumexp, delta = (pad_tokens(x, axis=2) for x in (logsumexp, delta))
    segments = pad_tokens(segments, with_value=-1)
    own, every = Side(query.shape[1], TILE), Side(query.shape[1])

    def run(kernel: Callable[..., None], gradients: int, rows: Side, keys: Side) -> list[Array]:
        inputs = _inputs(problem, query, key, value, segments, words, rows=rows, keys=keys)
        of_rows = [
            (cotangent, rows.heads(problem.head)),
            (logsumexp, rows.line()),
            (delta, rows.line()),
        ]
        return run_on_gpu(
            partial(kernel, problem),
            [*inputs, *of_rows],
            [Output(query.shape, query.dtype, own.heads(problem.head))] * gradients,
            grid=(problem.tiles, heads, batch),
            interpret=interpret,
            name=f"attention{kernel.__name__}",
        )

    (of_query,) = run(_backward_rows, 1, own, every)
    of_key, of_value = run(_backward_keys, 2, every, own)
    return of_query[:, :length], of_key[:, :length], of_value[:, :length]


def _forward(problem: _Problem, *references: Any) -> None:
    """Writes the mixed values of a block of rows of one head, and the logarithms of its totals."""
    inputs, (mixed, logsumexp) = _References(*references[:-2]), references[-2:]
    query, segments = inputs.query[...], inputs.row_segments[...]
    rows, keep = _own_tokens(query.shape[0]), _keeper(problem, inputs.words)

    def add(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        peak, total, sums = state
        at = pl.ds(index * TILE, TILE)
        logits = _product(query, inputs.key[at, :].T) * problem.scale
        allowed = segments[:, None] == inputs.key_segments[at][None, :]
        logits = jnp.where(allowed, logits, MASKED)
        higher = jnp.maximum(peak, logits.max(axis=1))
        weights, shrink = jnp.exp2(logits - higher[:, None]), jnp.exp2(peak - higher)
        total = total * shrink + weights.sum(axis=1)
        if problem.rate:
            weights = jnp.where(keep(rows[:, None], _tile_tokens(index)[None, :]), weights, 0.0)
        value = inputs.value[at, :]
        sums = sums * shrink[:, None] + _product(weights.astype(value.dtype), value)
        return higher, total, sums

    nothing = jnp.zeros(rows.shape, jnp.float32)
    start = (nothing + MASKED, nothing, jnp.zeros(query.shape, jnp.float32))
    peak, total, sums = jax.lax.fori_loop(0, problem.tiles, add, start)
    mixed[...] = (sums / (total * (1 - problem.rate))[:, None]).astype(mixed.dtype)
    logsumexp[...] = (peak + jnp.log2(total)) * LN_2


def _backward_rows(problem: _Problem, *references: Any) -> None:
    """Writes the gradient of a block of one head's queries."""
    inputs, of_rows = _References(*references[:6]), _OfRows(*references[6:-1])
    query, segments = inputs.query[...], inputs.row_segments[...]
    rows, keep = _own_tokens(TILE), _keeper(problem, inputs.words)
    cotangent, logsumexp, delta = (x[...] for x in of_rows)
    logsumexp /= LN_2

    def add(index: Array, gradient: Array) -> Array:
        at = pl.ds(index * TILE, TILE)
        key = inputs.key[at, :]
        allowed = segments[:, None] == inputs.key_segments[at][None, :]
        logits = jnp.where(allowed, _product(query, key.T) * problem.scale, MASKED)
        slopes = _product(cotangent, inputs.value[at, :].T)
        if problem.rate:
            kept = keep(rows[:, None], _tile_tokens(index)[None, :])
            slopes = jnp.where(kept, slopes / (1 - problem.rate), 0.0)
        of_logits = jnp.exp2(logits - logsumexp[:, None]) * (slopes - delta[:, None])
        return gradient + _product(of_logits.astype(key.dtype), key)

    gradient = jax.lax.fori_loop(0, problem.tiles, add, jnp.zeros(query.shape, jnp.float32))
    references[-1][...] = (gradient * (problem.scale * LN_2)).astype(query.dtype)


def _backward_keys(problem: _Problem, *references: Any) -> None:
    """Writes the gradients of a block of one head's keys and values; logits are [l, q] here."""
    inputs, of_rows = _References(*references[:6]), _OfRows(*references[6:-2])
    key, value = inputs.key[...], inputs.value[...]
    segments = inputs.key_segments[...]
    keys, keep = _own_tokens(TILE), _keeper(problem, inputs.words)

    def add(index: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        at = pl.ds(index * TILE, TILE)
        query, cotangent = inputs.query[at, :], of_rows.cotangent[at, :]
        allowed = segments[:, None] == inputs.row_segments[at][None, :]
        logits = jnp.where(allowed, _product(key, query.T) * problem.scale, MASKED)
        probabilities = jnp.exp2(logits - (of_rows.logsumexp[at] / LN_2)[None, :])
        slopes, dropped = _product(value, cotangent.T), probabilities
        if problem.rate:
            kept = keep(_tile_tokens(index)[None, :], keys[:, None])
            dropped, slopes = (
                jnp.where(kept, x / (1 - problem.rate), 0.0) for x in (probabilities, slopes)
            )
        of_logits = probabilities * (slopes - of_rows.delta[at][None, :])
        of_key, of_value = gradients
        return (
            of_key + _product(of_logits.astype(query.dtype), query),
            of_value + _product(dropped.astype(query.dtype), cotangent),
        )

    start = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32))
    of_key, of_value = jax.lax.fori_loop(0, problem.tiles, add, start)
    references[-2][...] = (of_key * (problem.scale * LN_2)).astype(key.dtype)
    references[-1][...] = of_value.astype(key.dtype)


def _own_tokens(size: int) -> Array:
    """Returns the indices, int32 [size], of the tokens of the program's own block."""
    return pl.program_id(0) * size + jnp.arange(size, dtype=jnp.int32)


def _tile_tokens(index: Array) -> Array:
    """Returns the indices, int32 [TILE], of the tokens of a tile."""
    return index * TILE + jnp.arange(TILE, dtype=jnp.int32)


def _keeper(problem: _Problem, words: Any) -> Callable[[Array, Array], Bool[Array, "..."]]:
    """Returns which probabilities of rows and keys of the program's head dropout keeps."""
    head, start, step = pl.program_id(1), words[0], odd(words[1])

    def keep(rows: Int[Array, "..."], keys: Int[Array, "..."]) -> Bool[Array, "..."]:
        # start + (the row's first index + the key's) · step, most of it for rows and keys alone.
        rows = start + ((head * problem.length + rows) * problem.length).astype(jnp.uint32) * step
        return kept_of_sequence(rows + keys.astype(jnp.uint32) * step, problem.rate)

    return keep


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _inputs(
    problem: _Problem,
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    words: Array,
    *,
    rows: Side,
    keys: Side,
) -> list[tuple[Array, pl.BlockSpec]]:
    """Returns what every kernel reads, in the order of `_References`."""
    return [
        (query, rows.heads(problem.head)),
        (key, keys.heads(problem.head)),
        (value, keys.heads(problem.head)),
        (segments, rows.tokens()),
        (segments, keys.tokens()),
        (words, pl.BlockSpec((None, 2), lambda i, h, b: (b, 0))),
    ]
