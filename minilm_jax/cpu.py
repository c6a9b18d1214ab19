"""What XLA's CPU backend has to be told: what to compute when, and how much at a time."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm_jax.rows import (
    first_element,
    fixed_shape,
    of_one_device,
    traced_platform,
    zeros_like_any,
)

Arrays = TypeVar("Arrays")


def on_cpu(x: Array) -> bool:
    """Returns whether the array being traced is a CPU's, or several CPUs'.

    Not where its shape has symbols: then the program is exported, to run elsewhere.
    """
    return traced_platform() == "cpu" and fixed_shape(x)


def on_one_cpu(x: Array) -> bool:
    """Returns whether the array being traced is one device's, and a CPU's."""
    return on_cpu(x) and of_one_device()


def not_before(cotangent: Float[Array, "..."], arrays: Arrays) -> Arrays:
    """Returns a tree of arrays, which nothing may use before the cotangent is there.

    So that what a gradient computes again, rather than keep, is neither merged with its double in
    the forward pass nor computed there because its inputs are at hand. A barrier says so, and holds
    on accelerators. XLA's CPU backend drops barriers before it schedules and merges what is equal
    once more; there a zero which comes of the cotangent is added, and fuses with the array's use.
    """
    arrays, cotangent = jax.lax.optimization_barrier((arrays, cotangent))
    zero = _zero_not_before(cotangent)
    tree: Arrays = jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)
    return tree


def zeros_not_before(cotangent: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns fp32 zeros, which a CPU may not write before the cotangent is there."""
    return jnp.broadcast_to(_zero_not_before(cotangent), shape)


def _zero_not_before(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns a zero, which on a CPU XLA does not know before the array is there."""

    def unknown(first: Array) -> Array:
        return (first > jnp.inf).astype(jnp.float32)

    def known(x: Array) -> Array:
        return zeros_like_any((), like=x)

    if not of_one_device():  # one device's element would have to travel to all
        return known(x)
    zero: Array = jax.lax.platform_dependent(first_element(x), cpu=unknown, default=known)
    return zero
