"""What a loss depends on, found where JAX knows it: in its traced form."""

from typing import Any

import jax
from jax.interpreters.partial_eval import dce_jaxpr

from minilm_jax.train.optimizer import ParamPath
from minilm_jax.train.step import LossFunction


def unreached(loss: LossFunction, params: Any, frozen: Any, batch: Any) -> frozenset[ParamPath]:
    """Returns the parameters that the loss does not depend on, whatever their values are.

    Of a student that is compared at one layer, these are all that lie behind it.

    Args:
      loss: traced, not run.
      params: what is trained, in dicts; here and below arrays, or their shapes.
      frozen: what is not.
      batch: of any size.
    """

    def value(params: Any, frozen: Any, batch: Any) -> Any:
        return loss(params, frozen, batch, jax.random.key(0)).value()

    jaxpr = jax.make_jaxpr(value)(params, frozen, batch).jaxpr
    _, used = dce_jaxpr(jaxpr, [True])
    paths = [tuple(entry.key for entry in path) for path, _ in jax.tree.leaves_with_path(params)]
    return frozenset(path for path, needed in zip(paths, used, strict=False) if not needed)
