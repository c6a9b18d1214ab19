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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int, UInt32

from minilm_jax.encoder.dropout import kept_at

Device = Literal["gpu", "interpreted gpu"]

_TILE = 64
"""Tokens that a program meets at a time."""
_MASKED = -1e30
"""A logit that is not allowed; finite, because -inf - (-inf) is not a number."""


class _Call(NamedTuple):
    """What does not change within a call."""

    shape: tuple[int, ...]
    """B, L padded to whole tiles, D."""
    length: int
    """L."""
    heads: int
    rate: float
    """Share of the probabilities that is dropped."""
    device: Device

    @property
    def head(self) -> int:
        """K."""
        return self.shape[-1] // self.heads

    @property
    def scale(self) -> float:
        return float(self.head**-0.5)

    @property
    def tiles(self) -> int:
        return self.shape[1] // _TILE


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
    log_total: Any  # q
    shared: Any  # q


def fits_pallas(*, length: int, width: int, heads: int) -> bool:
    """Returns whether the kernels suit a shape: a tile of tokens, heads that fit registers."""
    return length >= _TILE and width // heads in (16, 32, 64, 128)


def pallas_forward(
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    segments: Int[Array, "B L"],
    words: UInt32[Array, "B 2"],
    *,
    heads: int,
    rate: float,
    device: Device,
) -> tuple[Float[Array, "B L D"], Float[Array, "B H L"]]:
    """Returns the mixed values and the logarithm of each row's total of exponentials."""
    length = query.shape[1]
    query, key, value = (_pad(x) for x in (query, key, value))
    segments = _pad(segments, with_value=-1)
    call = _Call(query.shape, length, heads, rate, device)
    # Two tiles of rows, where they come out even, make twice the use of the keys that are read.
    own = _Side(call, 2 * _TILE if call.tiles % 2 == 0 else _TILE)
    every = _Side(call, None)
    line = jax.ShapeDtypeStruct((query.shape[0], heads, query.shape[1]), jnp.float32)
    mixed, log_total = _run(
        _forward,
        call,
        _inputs(query, key, value, segments, words, rows=own, keys=every),
        [(jax.ShapeDtypeStruct(query.shape, query.dtype), own.tokens), (line, own.line)],
        block=own.size,
        name="attention_forward",
    )
    return mixed[:, :length], log_total[:, :, :length]


def pallas_backward(
    cotangent: Float[Array, "B L D"],
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    mixed: Float[Array, "B L D"],
    log_total: Float[Array, "B H L"],
    segments: Int[Array, "B L"],
    words: UInt32[Array, "B 2"],
    *,
    heads: int,
    rate: float,
    device: Device,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Returns the gradients of queries, keys and values."""
    batch, length, _ = query.shape
    # Σ_l p_l · slope_l of the softmax's gradient is a product of what is at hand.
    shared = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
    shared = shared.reshape(batch, length, heads, -1).sum(axis=-1).swapaxes(1, 2)
    query, key, value, cotangent = (_pad(x) for x in (query, key, value, cotangent))
    log_total, shared = (_pad(x, axis=2) for x in (log_total, shared))
    segments = _pad(segments, with_value=-1)
    call = _Call(query.shape, length, heads, rate, device)
    own, every = _Side(call, _TILE), _Side(call, None)
    gradient = (jax.ShapeDtypeStruct(query.shape, query.dtype), own.tokens)

    def inputs(rows: _Side, keys: _Side) -> list[tuple[Array, pl.BlockSpec]]:
        of_rows = [(cotangent, rows.tokens), (log_total, rows.line), (shared, rows.line)]
        return [*_inputs(query, key, value, segments, words, rows=rows, keys=keys), *of_rows]

    run = partial(_run, call=call, block=_TILE)
    (of_query,) = run(
        _backward_rows, inputs=inputs(own, every), outputs=[gradient], name="attention_rows"
    )
    of_key, of_value = run(
        _backward_keys, inputs=inputs(every, own), outputs=[gradient] * 2, name="attention_keys"
    )
    return of_query[:, :length], of_key[:, :length], of_value[:, :length]


def _forward(call: _Call, *references: Any) -> None:
    """Writes the mixed values of a block of rows of one head, and the logarithms of its totals."""
    inputs, (mixed, log_total) = _References(*references[:-2]), references[-2:]
    query, segments = inputs.query[...], inputs.row_segments[...]
    rows, keep = _own(query.shape[0]), _keeper(call, inputs.words)

    def add(index: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        peak, total, sums = state
        at = pl.ds(index * _TILE, _TILE)
        logits = _product(query, inputs.key[at, :].T) * call.scale
        allowed = segments[:, None] == inputs.key_segments[at][None, :]
        logits = jnp.where(allowed, logits, _MASKED)
        higher = jnp.maximum(peak, logits.max(axis=1))
        weights, shrink = jnp.exp(logits - higher[:, None]), jnp.exp(peak - higher)
        total = total * shrink + weights.sum(axis=1)
        if call.rate:
            weights = jnp.where(keep(rows[:, None], _tile(index)[None, :]), weights, 0.0)
        value = inputs.value[at, :]
        sums = sums * shrink[:, None] + _product(weights.astype(value.dtype), value)
        return higher, total, sums

    nothing = jnp.zeros(rows.shape, jnp.float32)
    start = (nothing + _MASKED, nothing, jnp.zeros(query.shape, jnp.float32))
    peak, total, sums = jax.lax.fori_loop(0, call.tiles, add, start)
    mixed[...] = (sums / (total * (1 - call.rate))[:, None]).astype(mixed.dtype)
    log_total[...] = peak + jnp.log(total)


def _backward_rows(call: _Call, *references: Any) -> None:
    """Writes the gradient of a block of one head's queries."""
    inputs, of_rows = _References(*references[:6]), _OfRows(*references[6:-1])
    query, segments = inputs.query[...], inputs.row_segments[...]
    rows, keep = _own(_TILE), _keeper(call, inputs.words)
    cotangent, log_total, shared = (x[...] for x in of_rows)

    def add(index: Array, gradient: Array) -> Array:
        at = pl.ds(index * _TILE, _TILE)
        key = inputs.key[at, :]
        allowed = segments[:, None] == inputs.key_segments[at][None, :]
        logits = jnp.where(allowed, _product(query, key.T) * call.scale, _MASKED)
        slopes = _product(cotangent, inputs.value[at, :].T)
        if call.rate:
            kept = keep(rows[:, None], _tile(index)[None, :])
            slopes = jnp.where(kept, slopes / (1 - call.rate), 0.0)
        of_logits = jnp.exp(logits - log_total[:, None]) * (slopes - shared[:, None])
        return gradient + _product(of_logits.astype(key.dtype), key)

    gradient = jax.lax.fori_loop(0, call.tiles, add, jnp.zeros(query.shape, jnp.float32))
    references[-1][...] = (gradient * call.scale).astype(query.dtype)


def _backward_keys(call: _Call, *references: Any) -> None:
    """Writes the gradients of a block of one head's keys and values; logits are [l, q] here."""
    inputs, of_rows = _References(*references[:6]), _OfRows(*references[6:-2])
    key, value = inputs.key[...], inputs.value[...]
    segments = inputs.key_segments[...]
    keys, keep = _own(_TILE), _keeper(call, inputs.words)

    def add(index: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        at = pl.ds(index * _TILE, _TILE)
        query, cotangent = inputs.query[at, :], of_rows.cotangent[at, :]
        allowed = segments[:, None] == inputs.row_segments[at][None, :]
        logits = jnp.where(allowed, _product(key, query.T) * call.scale, _MASKED)
        probabilities = jnp.exp(logits - of_rows.log_total[at][None, :])
        slopes, dropped = _product(value, cotangent.T), probabilities
        if call.rate:
            kept = keep(_tile(index)[None, :], keys[:, None])
            dropped, slopes = (
                jnp.where(kept, x / (1 - call.rate), 0.0) for x in (probabilities, slopes)
            )
        of_logits = probabilities * (slopes - of_rows.shared[at][None, :])
        of_key, of_value = gradients
        return (
            of_key + _product(of_logits.astype(query.dtype), query),
            of_value + _product(dropped.astype(query.dtype), cotangent),
        )

    start = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(key.shape, jnp.float32))
    of_key, of_value = jax.lax.fori_loop(0, call.tiles, add, start)
    references[-2][...] = (of_key * call.scale).astype(key.dtype)
    references[-1][...] = of_value.astype(key.dtype)


def _own(size: int) -> Int[Array, " n"]:
    """Returns the indices of the tokens of the program's own block."""
    return pl.program_id(0) * size + jnp.arange(size, dtype=jnp.int32)


def _tile(index: Array) -> Int[Array, " n"]:
    return index * _TILE + jnp.arange(_TILE, dtype=jnp.int32)


def _keeper(call: _Call, words: Any) -> Callable[[Array, Array], Bool[Array, "..."]]:
    """Returns which probabilities of rows and keys of the program's head dropout keeps."""
    head, start, step = pl.program_id(1), words[0], words[1]

    def keep(rows: Int[Array, "..."], keys: Int[Array, "..."]) -> Bool[Array, "..."]:
        index = (head * call.length + rows) * call.length + keys
        return kept_at(start, step, index.astype(jnp.uint32), call.rate)

    return keep


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _pad(x: Array, *, axis: int = 1, with_value: int = 0) -> Array:
    """Returns the array with its tokens padded to whole tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _TILE)
    return jnp.pad(x, widths, constant_values=with_value)


class _Side(NamedTuple):
    """The part that a program sees of arrays over rows, or of arrays over keys."""

    call: _Call
    own: int | None
    """Tokens of its own block; None: it sees all."""

    @property
    def size(self) -> int:
        return self.own or self.call.shape[1]

    def _block(self, i: Any) -> Any:
        return i if self.own else 0

    @property
    def tokens(self) -> pl.BlockSpec:
        """Of an array [B, L, D]."""
        return pl.BlockSpec(
            (None, self.size, self.call.head), lambda i, h, b: (b, self._block(i), h)
        )

    @property
    def line(self) -> pl.BlockSpec:
        """Of an array [B, H, L]."""
        return pl.BlockSpec((None, None, self.size), lambda i, h, b: (b, h, self._block(i)))

    @property
    def segments(self) -> pl.BlockSpec:
        """Of an array [B, L]."""
        return pl.BlockSpec((None, self.size), lambda i, h, b: (b, self._block(i)))


def _inputs(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    words: Array,
    *,
    rows: _Side,
    keys: _Side,
) -> list[tuple[Array, pl.BlockSpec]]:
    """Returns what every kernel reads, in the order of `_References`."""
    return [
        (query, rows.tokens),
        (key, keys.tokens),
        (value, keys.tokens),
        (segments, rows.segments),
        (segments, keys.segments),
        (words, pl.BlockSpec((None, 2), lambda i, h, b: (b, 0))),
    ]


def _run(
    kernel: Callable[..., None],
    call: _Call,
    inputs: list[tuple[Array, pl.BlockSpec]],
    outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    *,
    block: int,
    name: str,
) -> tuple[Array, ...]:
    """Runs a program for every block of tokens, head and row of the batch, blocks side by side."""
    batch, length, _ = call.shape
    run = pl.pallas_call(
        partial(kernel, call),
        grid=(length // block, call.heads, batch),
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        interpret=call.device == "interpreted gpu",
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name=name,
    )
    found: tuple[Array, ...] = tuple(run(*(x for x, _ in inputs)))
    return found
