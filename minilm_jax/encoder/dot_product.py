"""Dot-product attention whose gradient keeps no L × L array.

Every such array is computed again from queries, keys and one number a row, as FlashAttention does
(Dao et al., arXiv 2205.14135), so that a layer's activations are O(L·D). TPUs in bf16, NVIDIA GPUs
and CPUs in fp32 have kernels (dot_product_tpu.py, _gpu.py, _cpu.py), where no L × L array is ever
written. Without them a CPU computes a few heads at a time, to bound memory; an accelerator gets all
of them at once.

B batch, L tokens, D width, H heads (h at a time), K head width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from minilm_jax import native
from minilm_jax.cpu import not_before
from minilm_jax.encoder.config import Attention
from minilm_jax.encoder.dot_product_cpu import cpu_backward, cpu_forward
from minilm_jax.encoder.dot_product_gpu import gpu_backward, gpu_forward
from minilm_jax.encoder.dot_product_tpu import fits_tpu, tpu_backward, tpu_forward
from minilm_jax.encoder.dropout import kept
from minilm_jax.kernels import fill_up_head, fits_gpu, kernels_can_run, row_deltas
from minilm_jax.rows import fixed_shape, map_over_rows, mesh_platform, vary_like

FORWARD_ELEMENTS = 2**20
"""Of the logits computed at a time on a CPU; 4 MB, of which two are alive at once."""

BACKWARD_ELEMENTS = 2**22
"""The same for the gradient, which has a handful of them alive: little beside the activations of
all layers, and more at a time is faster."""


class _Residuals(NamedTuple):
    query: Float[Array, "B L D"]
    key: Float[Array, "B L D"]
    value: Float[Array, "B L D"]
    mixed: Float[Array, "B L D"]
    logsumexp: Float[Array, "B H L"]
    """Logarithm of the sum of the exponentials of a row's logits."""
    segments: Int[Array, "B L"]
    words: UInt32[Array, "B 2"]


class _Settings(NamedTuple):
    heads: int
    rate: float
    """Share of the probabilities that is dropped."""
    implementation: Attention


def dot_product_attention(
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    *,
    segments: Int[Array, "B L"],
    heads: int,
    dropout_rate: float = 0.0,
    words: UInt32[Array, "B 2"] | None = None,
    implementation: Attention = "auto",
) -> Float[Array, "B L D"]:
    """Returns softmax(Q Kᵀ / √K) V of each head, side by side, in the dtype of `query`.

    Products take operands of that dtype and sum in fp32; the softmax is fp32.

    Args:
      query: queries of all heads.
      key: keys of all heads.
      value: values of all heads.
      segments: a query sees the keys of its own number. Padding (0) sees padding, so that no row is
        empty and nothing becomes NaN; its outputs are never used.
      heads: H; divides D.
      dropout_rate: share of the probabilities that is dropped.
      words: two random words for each row (`row_words`), which choose them; None drops nothing.
      implementation: `plain` is made of XLA's operations. `auto` takes the platform's kernels where
        they suit the shape and the dtype, else the plain one.
    """
    if words is None:
        dropout_rate, words = 0.0, jnp.zeros((query.shape[0], 2), jnp.uint32)
    settings = _Settings(heads, dropout_rate, implementation)
    arrays = (query, key, value, segments, words)
    if implementation == "auto" and mesh_platform() is not None:
        return map_over_rows(lambda rows: _attend(settings, *rows), arrays)
    return _attend(settings, *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: _Settings, query: Array, key: Array, value: Array, segments: Array, words: Array
) -> Float[Array, "B L D"]:
    return _forward(settings, query, key, value, segments, words)[0]


def _forward(
    settings: _Settings, query: Array, key: Array, value: Array, segments: Array, words: Array
) -> tuple[Array, _Residuals]:
    arrays = (query, key, value, segments, words)
    kernels = {"cpu": cpu_forward, "cuda": gpu_forward, "tpu": tpu_forward}
    mixed, logsumexp = _implemented(settings, _plain_forward, kernels, arrays)
    return mixed, _Residuals(query, key, value, mixed, logsumexp, segments, words)


def _backward(
    settings: _Settings, residuals: _Residuals, cotangent: Float[Array, "B L D"]
) -> tuple[Array, Array, Array, None, None]:
    # The mixed values are kept as they are in any case, as the output layer's input.
    late = not_before(cotangent, residuals)._replace(mixed=residuals.mixed)
    arrays = (cotangent, *late)
    kernels = {"cpu": cpu_backward, "cuda": gpu_backward, "tpu": tpu_backward}
    of_query, of_key, of_value = _implemented(settings, _plain_backward, kernels, arrays)
    return of_query, of_key, of_value, None, None


_attend.defvjp(_forward, _backward)


def _implemented(
    settings: _Settings,
    plain: Callable[..., tuple[Array, ...]],
    kernels: Mapping[str, Callable[..., tuple[Array, ...]]],
    arrays: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Returns what the implementation computes, on the platform the program is lowered for."""
    heads, rate, implementation = settings
    bind = partial(partial, heads=heads, rate=rate)
    if implementation == "plain" or not fixed_shape(arrays[0]):
        return bind(plain)(*arrays)
    suited = {
        platform: bind(kernel)
        for platform, kernel in kernels.items()
        if _suits(platform, arrays[0], heads)
    }
    if not suited:
        return bind(plain)(*arrays)
    found: tuple[Array, ...] = jax.lax.platform_dependent(*arrays, default=bind(plain), **suited)
    return found


def _suits(platform: str, x: Float[Array, "B L D"], heads: int) -> bool:
    """Returns whether a platform's kernels suit the shape, and can run here."""
    _, length, width = x.shape
    head = width // heads
    match platform:
        case "tpu":
            fits = fits_tpu(length=length, heads=heads, head=head, dtype=x.dtype)
            return fits and kernels_can_run("tpu")
        case "cuda":
            fits = fits_gpu(length=length, head=head, dtype=x.dtype)
            return fits and fill_up_head(head) == head and kernels_can_run("gpu")
        case _:
            fits = x.dtype == jnp.float32
            return fits and kernels_can_run("cpu") and native.load("attention")


def _plain_forward(
    query: Array,
    key: Array,
    value: Array,
    segments: Array,
    words: Array,
    *,
    heads: int,
    rate: float,
) -> tuple[Float[Array, "B L D"], Float[Array, "B H L"]]:
    """Returns the mixed values and the logarithm of each row's total."""
    rows = _Rows(segments, words, rate)
    totals = jnp.zeros((*query.shape[:2], heads), jnp.float32)
    totals = vary_like(totals, like=(query, key, value, segments, words))
    mixed, logsumexp = _replace_heads(
        partial(_forward_heads, rows=rows),
        (query, totals),
        (key, value),
        heads=heads,
        elements=FORWARD_ELEMENTS,
    )
    return mixed, logsumexp.swapaxes(1, 2)


def _plain_backward(
    cotangent: Array,
    query: Array,
    key: Array,
    value: Array,
    mixed: Array,
    logsumexp: Array,
    segments: Array,
    words: Array,
    *,
    heads: int,
    rate: float,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Returns the gradients of queries, keys and values."""
    rows = _Rows(segments, words, rate)
    delta = row_deltas(cotangent, mixed, heads=heads)
    of_query, of_key, of_value = _replace_heads(
        partial(_backward_heads, rows=rows),
        (query, key, cotangent),
        (value, logsumexp.swapaxes(1, 2), delta),
        heads=heads,
        elements=BACKWARD_ELEMENTS,
    )
    return of_query, of_key, of_value


class _Rows(NamedTuple):
    """What the logits of all heads share."""

    segments: Int[Array, "B L"]
    words: UInt32[Array, "B 2"]
    rate: float

    def allowed(self) -> Bool[Array, "B 1 L L"]:
        return self.segments[:, None, :, None] == self.segments[:, None, None, :]

    def kept(self, first: Array | int, shape: tuple[int, ...]) -> Bool[Array, "B h L L"]:
        """Of `shape`, logits of heads from the one numbered `first`."""
        _, heads, length, _ = shape
        return kept(self.words, (heads, length, length), self.rate, first=first * length**2)


def _forward_heads(
    first: Array | int,
    query: Float[Array, "B h L K"],
    _: Float[Array, "B h L 1"],
    key: Float[Array, "B h L K"],
    value: Float[Array, "B h L K"],
    *,
    rows: _Rows,
) -> tuple[Float[Array, "B h L K"], Float[Array, "B h L 1"]]:
    """Returns the mixed values of some heads and the logarithm of each row's total."""
    logits = jnp.where(rows.allowed(), _logits(query, key), -jnp.inf)
    peak = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    # Normalising after the value product divides L x K numbers instead of L x L.
    total = weights.sum(axis=-1, keepdims=True)
    if rows.rate:
        weights = jnp.where(rows.kept(first, weights.shape), weights, 0.0)
    mixed = _product("bhql,bhlk->bhqk", weights.astype(value.dtype), value)
    return (mixed / (total * (1 - rows.rate))).astype(value.dtype), peak + jnp.log(total)


def _backward_heads(
    first: Array | int,
    query: Float[Array, "B h L K"],
    key: Float[Array, "B h L K"],
    cotangent: Float[Array, "B h L K"],
    value: Float[Array, "B h L K"],
    logsumexp: Float[Array, "B h L 1"],
    delta: Float[Array, "B h L 1"],
    *,
    rows: _Rows,
) -> tuple[Float[Array, "B h L K"], Float[Array, "B h L K"], Float[Array, "B h L K"]]:
    """Returns the gradients of some heads' queries, keys and values."""
    dtype = query.dtype
    logits = _logits(query, key)
    probabilities = jnp.where(rows.allowed(), jnp.exp(logits - logsumexp), 0.0)
    slopes = _product("bhqk,bhkl->bhql", cotangent, _transpose(value))
    dropped = probabilities
    if rows.rate:
        factor = jnp.where(rows.kept(first, logits.shape), 1 / (1 - rows.rate), 0.0)
        dropped, slopes = probabilities * factor, slopes * factor
    of_logits = (probabilities * (slopes - delta)).astype(dtype)
    # With keys last, as in the logits, no product has to transpose an L x L array.
    of_query = _product("bhql,bhlk->bhqk", of_logits, key)
    of_key = _product("bhkq,bhql->bhkl", _transpose(query), of_logits)
    of_value = _product("bhkq,bhql->bhkl", _transpose(cotangent), dropped.astype(dtype))
    return (
        (of_query * _scale(query)).astype(dtype),
        (_transpose_product(of_key) * _scale(query)).astype(dtype),
        _transpose_product(of_value).astype(dtype),
    )


def _replace_heads(
    function: Callable[..., tuple[Array, ...]],
    replaced: tuple[Array, ...],
    read: tuple[Array, ...],
    *,
    heads: int,
    elements: int,
) -> tuple[Array, ...]:
    """Returns `replaced` after function(first head, *replaced, *read) of all heads.

    A CPU takes `elements` logits at a time, and writes what comes of some heads over them. The loop
    is over heads, not rows: rows may be divided over the devices of a mesh.

    Args:
      function: of arrays `[B, h, L, K]`; returns one in the place of each that is replaced. It has
        to depend on that, if that is read, or the loop would copy the whole array first.
      replaced: arrays `[B, L, H * K]`, each with its own K.
      read: the same.
      heads: H.
      elements: of the logits.
    """
    batch, length, _ = replaced[0].shape
    each = heads
    if fixed_shape(replaced[0]):
        divisors = (n for n in range(heads, 0, -1) if heads % n == 0)
        each = next(n for n in divisors if n == 1 or batch * n * length**2 <= elements)

    def whole(replaced: tuple[Array, ...], read: tuple[Array, ...]) -> tuple[Array, ...]:
        found = function(0, *(_split_heads(x, heads) for x in replaced + read))
        return tuple(_merge_heads(x) for x in found)

    def looped(replaced: tuple[Array, ...], read: tuple[Array, ...]) -> tuple[Array, ...]:
        def some(index: Array, replaced: tuple[Array, ...]) -> tuple[Array, ...]:
            def place(x: Array) -> tuple[Array, int]:
                width = x.shape[-1] // heads * each
                return index * width, width

            blocks = [
                _split_heads(jax.lax.dynamic_slice_in_dim(x, *place(x), axis=2), each)
                for x in replaced + read
            ]
            found = function(index * each, *blocks)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(x, _merge_heads(y), place(x)[0], axis=2)
                for x, y in zip(replaced, found, strict=True)
            )

        return jax.lax.fori_loop(0, heads // each, some, replaced)

    if each == heads:
        return whole(replaced, read)
    return jax.lax.platform_dependent(replaced, read, cpu=looped, default=whole)


def _logits(
    query: Float[Array, "B h L K"], key: Float[Array, "B h L K"]
) -> Float[Array, "B h L L"]:
    """Returns Q Kᵀ / √K in fp32; a query in bf16 would be rounded once more, were it scaled."""
    return _product("bhqk,bhkl->bhql", query, _transpose(key)) * _scale(query)


def _scale(query: Float[Array, "B h L K"]) -> float:
    return float(query.shape[-1] ** -0.5)


def _product(subscripts: str, left: Array, right: Array) -> Float[Array, "..."]:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _transpose(x: Float[Array, "B H L K"]) -> Float[Array, "B H K L"]:
    return x.swapaxes(2, 3)


def _transpose_product(x: Float[Array, "B H K L"]) -> Float[Array, "B H L K"]:
    """Returns the transposed product, whose transposition a CPU must not fold into it.

    XLA would: for the product of an L x L array's columns a CPU takes twice as long as for that of
    its rows, where an accelerator's takes as long and saves the transposition.
    """

    def kept_apart(x: Array) -> Array:
        return _transpose(jax.lax.optimization_barrier(x))

    return jax.lax.platform_dependent(x, cpu=kept_apart, default=_transpose)


def _split_heads(x: Float[Array, "B L D"], heads: int) -> Float[Array, "B H L K"]:
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def _merge_heads(x: Float[Array, "B H L K"]) -> Float[Array, "B L D"]:
    batch, heads, length, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)
