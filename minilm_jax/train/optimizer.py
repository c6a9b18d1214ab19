"""The optimizer: a schedule, a clip, and weight decay where decay is meant."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import jax
import optax

from minilm_jax.errors import ConfigError
from minilm_jax.train.state import Params, TrainState

ParamPath = tuple[str, ...]
"""The names on the way to a parameter, or to a module of them: `("encoder", "layer_0", "ffn")`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rate schedule. Rates are for the global batch, never per device."""

    name: Literal["adamw", "lamb", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    """Peak learning rate."""
    warmup_steps: int = 4000
    """Steps of linear warm-up from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay to 0 at the last step, after the warm-up."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    """Adam's epsilon; 1e-6 as in BERT's code, both MiniLM papers are silent."""
    weight_decay: float = 0.01
    """Decoupled; never on biases, LayerNorm scales and parameters the loss does not reach."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 turns it off."""
    ema_decay: float = 0.0
    """Of an exponential moving average of the parameters, which is then what is evaluated and
    exported; 0 turns it off. Try 0.999."""

    def __post_init__(self) -> None:
        for name in ("b1", "b2", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"optimizer.{name} must be a number from 0 on, got {getattr(self, name)}"
                )


def make_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Returns step (from 0) -> learning rate; 0 at step 0 when there is a warm-up, as in BERT."""
    if config.warmup_steps >= steps > 0:
        raise ConfigError(
            f"optimizer.warmup_steps={config.warmup_steps} must be below the run's steps={steps}"
        )
    after = steps - config.warmup_steps
    peak = config.learning_rate
    decay = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, *, steps: int, undecayed: Collection[ParamPath] = ()
) -> optax.GradientTransformation:
    """Returns the optimizer of a run.

    Args:
      config: what to build.
      steps: optimizer steps of the whole run, for the schedule.
      undecayed: path prefixes of parameters the loss does not reach. Decoupled decay would shrink
        exactly those, where PyTorch skips parameters without a gradient.
    """
    schedule = make_schedule(config, steps=steps)

    def decay_mask(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: decays(tuple(entry.key for entry in path), undecayed), params
        )

    match config.name:
        case "adamw":
            core = optax.adamw(
                schedule,
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=decay_mask,
            )
        case "lamb":
            core = optax.lamb(
                schedule,
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=decay_mask,
            )
        case "sgd":
            core = optax.chain(
                optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
                optax.sgd(schedule),
            )
    if config.clip_norm:
        core = optax.chain(optax.clip_by_global_norm(config.clip_norm), core)
    return with_average(core, config.ema_decay) if config.ema_decay else core


class AveragedState(NamedTuple):
    """The state of an optimizer that also averages the parameters."""

    inner: Any
    average: optax.EmaState


def with_average(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Returns the optimizer with an average of the parameters it leads to in its state.

    average = decay · average + (1 − decay) · parameters after the step, from 0.
    """
    average = optax.ema(decay)

    def init(params: Any) -> AveragedState:
        return AveragedState(inner=optimizer.init(params), average=average.init(params))

    def update(updates: Any, state: AveragedState, params: Any = None) -> Any:
        updates, inner = optimizer.update(updates, state.inner, params)
        _, averaged = average.update(optax.apply_updates(params, updates), state.average)
        return updates, AveragedState(inner=inner, average=averaged)

    return optax.GradientTransformation(init, update)


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


def decays(path: ParamPath, undecayed: Collection[ParamPath]) -> bool:
    """Returns whether weight decay applies to the parameter at `path`."""
    if path[-1] in ("bias", "scale"):
        return False
    return not any(path[: len(prefix)] == prefix for prefix in undecayed)
