"""The optimizer: a schedule, a clip, and weight decay where decay is meant."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int

from minilm_jax.errors import ConfigError
from minilm_jax.settings import FINITE, Count, Rate, Settings, Weight, above
from minilm_jax.train.state import Params, TrainState

Decay = Literal["linear", "cosine", "constant"]

ParamPath = tuple[str, ...]
"""The names on the way to a parameter: `("encoder", "layer_0", "ffn", "up", "kernel")`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings, name="optimizer"):
    """Optimizer and learning rate schedule. Rates are for the global batch, never per device."""

    name: Literal["adamw", "lamb", "sgd"] = "adamw"
    learning_rate: Weight = 3e-4
    """Peak learning rate."""
    warmup_steps: Count = 4000
    """Steps of linear warm-up from 0."""
    schedule: Decay = "linear"
    """Decay to 0 at the last step, after the warm-up."""
    b1: Rate = 0.9
    b2: Rate = 0.999
    eps: Annotated[float, above(0), FINITE] = 1e-6
    """Adam's epsilon; 1e-6 as in BERT's code, both MiniLM papers are silent.
    With 0, a parameter without a gradient would become 0/0."""
    weight_decay: Weight = 0.01
    """Decoupled; never on biases, LayerNorm scales and parameters the loss does not reach."""
    clip_norm: Weight = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns it off."""
    ema_decay: Rate = 0.0
    """Of an exponential moving average of the parameters, which is then what
    is evaluated and exported; 0 turns it off. Try 0.999."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step.

    Its numbers are data of a compiled step and no part of it.
    """

    # Any: JAX maps them to shapes and shardings, too.
    peak: Any
    """Each a scalar in fp32."""
    warmup_steps: Any
    steps: Any
    """Of the whole run."""
    decay: Decay = dataclasses.field(metadata={"static": True})

    def __call__(self, step: Int[ArrayLike, ""]) -> Float[Array, ""]:
        """Returns the rate of a step, counted from 0: with a warm-up that of 0 is 0, as in BERT."""
        left = (self.steps - step) / jnp.maximum(self.steps - self.warmup_steps, 1.0)
        left = jnp.clip(left, 0.0, 1.0)
        match self.decay:
            case "linear":
                after = left
            case "cosine":
                after = 0.5 * (1.0 - jnp.cos(jnp.pi * left))
            case "constant":
                after = jnp.ones_like(left)
        warming = step / jnp.maximum(self.warmup_steps, 1.0)
        return self.peak * jnp.where(step < self.warmup_steps, warming, after)


def make_schedule(config: OptimizerConfig, *, steps: int) -> Schedule:
    """Returns the schedule of a run of so many steps.

    Raises:
      ConfigError: nothing would be left after the warm-up.
    """
    if config.warmup_steps >= steps > 0:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} must be below the run's steps={steps}"
        )
    return Schedule(
        peak=np.float32(config.learning_rate),
        warmup_steps=np.float32(config.warmup_steps),
        steps=np.float32(steps),
        decay=config.schedule,
    )


def make_optimizer(
    config: OptimizerConfig, *, unreached: Collection[ParamPath] = ()
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run; its update takes the step's `learning_rate`.

    Args:
      config: what to build; its learning rate and schedule are no part of it.
      unreached: parameters the loss does not reach, as `reach.unreached` finds them. They stay
        as they are and have no moments, as PyTorch skips parameters without a gradient;
        decoupled decay would shrink exactly those.
    """

    def mask(holds: Callable[[ParamPath], bool]) -> Callable[[Any], Any]:
        return lambda params: jax.tree.map_with_path(
            lambda path, _: holds(tuple(entry.key for entry in path)), params
        )

    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask(decays))
    parts = {
        "adamw": (adam, decay),
        "lamb": (adam, decay, optax.scale_by_trust_ratio()),
        "sgd": (decay,),
    }[config.name]
    clip = (optax.clip_by_global_norm(config.clip_norm),) if config.clip_norm else ()
    updates = optax.masked(optax.chain(*parts), mask(lambda path: path not in unreached))
    optimizer = optax.chain(*clip, updates, scale_by_learning_rate())
    return with_average(optimizer, config.ema_decay) if config.ema_decay else optimizer


def scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer's last part: updates times `-learning_rate`, given with each step."""

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Any = None, **unused: Any
    ) -> Any:
        if learning_rate is None:
            raise ConfigError(
                "this optimizer is given its learning rate step by step: "
                "make_given(..., schedule=make_schedule(...)), or update(..., learning_rate=...)"
            )
        return jax.tree.map(lambda x: -learning_rate * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class AveragedState(NamedTuple):
    """The state of an optimizer that also averages the parameters."""

    inner: Any
    average: optax.EmaState


def with_average(
    optimizer: optax.GradientTransformationExtraArgs, decay: float
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer with an average of the parameters it leads to in its state.

    average = decay · average + (1 − decay) · parameters after the step, from 0.
    """
    average = optax.ema(decay)

    def init(params: Any) -> AveragedState:
        return AveragedState(inner=optimizer.init(params), average=average.init(params))

    def update(updates: Any, state: AveragedState, params: Any = None, **given: Any) -> Any:
        updates, inner = optimizer.update(updates, state.inner, params, **given)
        _, averaged = average.update(optax.apply_updates(params, updates), state.average)
        return updates, AveragedState(inner=inner, average=averaged)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated_params(state: TrainState, config: OptimizerConfig) -> Params:
    """Returns the parameters to evaluate and export: their average where there is one.

    The average starts at 0 and is divided by the weight it has had so far, 1 − decayᵗ after t
    updates.
    """
    if not config.ema_decay:
        return state.params
    average = state.opt_state.average
    if int(average.count) == 0:
        return state.params
    return optax.tree.bias_correction(average.ema, config.ema_decay, average.count)


def decays(path: ParamPath) -> bool:
    """Returns whether weight decay applies to the parameter at `path`."""
    return path[-1] not in ("bias", "scale")
