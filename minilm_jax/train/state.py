"""What training carries from one step to the next, and what a checkpoint therefore holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

Params = dict[str, Any]


class TrainState(NamedTuple):
    """Step, parameters, optimizer state. No rng: randomness is a function of (seed, step, row)."""

    step: Int[Array, ""]
    """Optimizer steps taken so far."""
    params: Params
    opt_state: Any


def create_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    # Copied, because the step donates its state: the caller's arrays must stay alive.
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params)
    )
