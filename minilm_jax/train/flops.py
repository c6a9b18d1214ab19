"""The arithmetic of a function, counted where JAX knows it: in its traced form."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from minilm_jax.train.step import LossFunction


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Returns the operations of the matrix products in a call, 2·m·n·k for each.

    XLA's own figure counts a loop's body once, whatever its length, and no kernel at all; this one
    multiplies by the length wherever that is fixed, and counts a body of unknown length once.

    Args:
      function: anything JAX can trace.
      arguments: arrays, or their shapes.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def gradient_flops(loss: LossFunction, params: Any, frozen: Any, batch: Any) -> int:
    """Returns `count_flops` of a loss and its gradient, as a step computes them over the batch."""

    def gradient(params: Any, frozen: Any, batch: Any) -> Any:
        return jax.grad(lambda x: loss(x, frozen, batch, jax.random.key(0)).value())(params)

    return count_flops(gradient, params, frozen, batch)


def _of(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = (_shape(x) for x in (equation.invars[0], equation.outvars[0]))
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            continue
        inside = [_of(part) for part in _parts(equation.params.values())]
        if equation.primitive.name == "cond":
            total += max(inside)
        else:
            total += sum(inside) * equation.params.get("length", 1)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _parts(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _parts(value)
