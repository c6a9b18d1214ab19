"""Dropout that does not depend on the device count, and costs next to nothing."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


class RowDropout(nn.Module):
    """Dropout whose mask is a function of (key, module path, global row), not of the batch's split.

    The same global batch is dropped the same way on one device and on 256, which is what makes runs
    comparable across device counts.
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B ..."], *, rows: Int[Array, "B"], deterministic: bool
    ) -> Float[Array, "B ..."]:
        """Returns `x` with elements dropped at `rate` and the rest scaled by 1 / (1 - rate)."""
        if deterministic or self.rate == 0.0:
            return x
        return drop(x, row_words(self.make_rng("dropout"), rows), self.rate)


def row_words(key: Array, rows: Int[Array, "B"]) -> UInt32[Array, "B 2"]:
    """Returns two random words for each row of the global batch, from which its mask follows."""

    def words(row: Int[Array, ""]) -> UInt32[Array, "2"]:
        # Left to itself it draws 64 bits where JAX has them: other masks, and none a kernel takes.
        return jax.random.bits(jax.random.fold_in(key, row), (2,), jnp.uint32)

    return jax.vmap(words)(rows)


def kept(
    words: UInt32[Array, "B 2"], shape: tuple[int, ...], rate: float, *, first: Array | int = 0
) -> Bool[Array, "B ..."]:
    """Returns which elements of rows of this shape dropout keeps.

    The bits of element i are those of SplitMix (Steele, Lea and Flood, OOPSLA 2014) in 32 bits: a
    Weyl sequence start + i · step, whose start and odd step are the row's words, through the mixing
    function of MurmurHash3. That is a fraction of the arithmetic of Threefry, whose strength
    dropout does not need, and it fuses with what uses it: no bits are ever stored.

    Args:
      words: of each row.
      shape: of one row.
      rate: share that is dropped, exact to 2^-32.
      first: index of the first element, where this is a part of a row.
    """
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    index = index + jnp.asarray(first, jnp.uint32)
    start, step = (words[:, i].reshape(-1, *[1] * len(shape)) for i in (0, 1))
    return kept_of_sequence(start + index * odd(step), rate)


def odd(step: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns the step of a row's Weyl sequence, from its second word."""
    return step | 1


def kept_of_sequence(bits: UInt32[Array, "..."], rate: float) -> Bool[Array, "..."]:
    """Returns which elements dropout keeps, from their values in the rows' Weyl sequences."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    return bits >= jnp.uint32(round(rate * 2**32))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(
    x: Float[Array, "B ..."], words: UInt32[Array, "B 2"], rate: float
) -> Float[Array, "B ..."]:
    """Returns `x` with elements dropped; the gradient draws the mask again rather than keep it."""
    # A factor in bf16 is rounded itself: at a rate of 0.1 all that is kept would be 0.16% too low.
    scaled = (x.astype(jnp.float32) * (1 / (1 - rate))).astype(x.dtype)
    return jnp.where(kept(words, x.shape[1:], rate), scaled, jnp.zeros_like(x))


def _forward(x: Array, words: Array, rate: float) -> tuple[Array, Array]:
    return drop(x, words, rate), words


def _backward(rate: float, words: Array, cotangent: Array) -> tuple[Array, None]:
    return drop(cotangent, words, rate), None


drop.defvjp(_forward, _backward)
