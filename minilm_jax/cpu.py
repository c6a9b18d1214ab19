"""What XLA's CPU backend has to be told: what to compute when, and how much at a time."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minilm_jax.kernels import (
    first_element,
    mesh_platform,
    of_one_device,
    vary_like,
    zeros_like_any,
)

Arrays = TypeVar("Arrays")


def on_one_cpu(x: Array) -> bool:
    """Returns whether the array being traced is one device's, and a CPU's.

    Not where its shape has symbols: then the program is exported, to run elsewhere.
    """
    fixed = all(isinstance(size, int) for size in x.shape)
    return fixed and of_one_device() and (mesh_platform() or jax.default_backend()) == "cpu"


def not_before(cotangent: Float[Array, "..."], arrays: Arrays) -> Arrays:
    """Returns a tree of arrays, which nothing may use before the cotangent is there.

    So that what a gradient computes again, rather than keep, is neither merged with its double in
    the forward pass nor computed there because its inputs are at hand. A barrier says so, and holds
    on accelerators. XLA's CPU backend drops barriers before it schedules and merges what is equal
    once more; there a zero which comes of the cotangent is added, and fuses with the array's use.
    """
    arrays, cotangent = jax.lax.optimization_barrier((arrays, cotangent))

    def tied(arrays: Arrays, cotangent: Array) -> Arrays:
        zero = _unknown_zero(cotangent)
        tree: Arrays = jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)
        return tree

    def varying(arrays: Arrays, cotangent: Array) -> Arrays:
        return vary_like(arrays, like=cotangent)

    found: Arrays = _depending(tied, varying, arrays, cotangent)
    return found


def zeros_not_before(cotangent: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns fp32 zeros, which a CPU may not write before the cotangent is there."""
    zeros: Array = _depending(
        lambda cotangent: jnp.broadcast_to(_unknown_zero(cotangent), shape),
        lambda cotangent: zeros_like_any(shape, like=cotangent),
        cotangent,
    )
    return zeros


def _depending(cpu: Callable[..., Any], default: Callable[..., Any], *operands: Any) -> Any:
    if not of_one_device():  # one device's element would have to travel to all
        return default(*operands)
    return jax.lax.platform_dependent(*operands, cpu=cpu, default=default)


def _unknown_zero(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns a zero, which XLA does not know before the array is there."""
    return (first_element(x) > jnp.inf).astype(jnp.float32)
