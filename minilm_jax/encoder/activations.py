"""Activations of feed-forward networks and heads, by name."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import chebyshev

from minilm_jax.cpu import on_cpu


def _sigmoid(
    function: Callable[[float], float], *, limit: float, degree: int
) -> Callable[[Array], Array]:
    """Returns an fp32 approximation of a function of x.

    Args:
      function: ½ plus an odd function of x.
      limit: left of -limit it is 0, right of limit 1.
      degree: of the polynomial between, in x².
    """
    # Of 2 (x / limit)² - 1, which stays between -1 and 1: terms that do not cancel.
    points = chebyshev.chebpts1(degree + 1)
    values = [(function(x) - 0.5) / x for x in limit * np.sqrt((points + 1) / 2)]
    coefficients = chebyshev.cheb2poly(chebyshev.chebfit(points, values, degree)).tolist()

    def approximate(x: Float[Array, "..."]) -> Float[Array, "..."]:
        square = x * x
        at = square * (2 / limit**2) - 1
        p = jnp.full_like(x, coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            p = p * at + coefficient
        beyond = jnp.where(x > 0, 1.0, 0.0 * x)  # NaN of NaN
        return jnp.where(square < limit**2, x * p + 0.5, beyond)

    return approximate


def _cumulative(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def _slope(x: float) -> float:
    return _cumulative(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


_fast_cumulative = _sigmoid(_cumulative, limit=5.5, degree=15)
_fast_slope = _sigmoid(_slope, limit=5.8, degree=17)


@jax.custom_jvp
def _cpu_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    y = x.astype(jnp.float32)
    return (y * _fast_cumulative(y)).astype(x.dtype)


@_cpu_gelu.defjvp
def _cpu_gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    slope = _fast_slope(x.astype(jnp.float32))
    return _cpu_gelu(x), (tangent.astype(jnp.float32) * slope).astype(x.dtype)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x Φ(x) (Hendrycks and Gimpel, arXiv 1606.08415), in fp32 inside.

    By erf, as PyTorch has it, where `jax.nn.gelu` takes the costlier erfc. XLA makes erf of two
    polynomials and a division; on a CPU one polynomial takes less, is nearer to Φ, and a TPU would
    take longer by it.
    """
    if on_cpu(x):
        return _cpu_gelu(x)
    y = x.astype(jnp.float32)
    return (y * (0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))))).astype(x.dtype)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns GELU by its approximation with tanh, in fp32 inside.

    Step by step in bf16, 1 + tanh would lose all digits where x is below -2.
    """
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # BERT's GELU is the exact one; JAX's default is the tanh approximation.
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": jax.nn.relu,
}
