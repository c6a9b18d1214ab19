"""The settings of the engine: how a run trains, how long, and what it does on the way."""

import dataclasses
from typing import Literal

from minilm_jax.errors import ConfigError
from minilm_jax.settings import Count, Positive, Settings
from minilm_jax.train.devices import Lift
from minilm_jax.train.hosts import HostsConfig
from minilm_jax.train.step import Nonfinite
from minilm_jax.train.trackers import TrackerName


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings, name="train"):
    """How a run trains."""

    seed: Count = 0
    """Seed of data order, dropout and initialisation."""
    accumulate: Positive = 1
    """Micro-batches per step: less memory, same results."""
    lift: Lift = "pmap"
    """pmap: data parallel. mesh: jit over data × fsdp."""
    fsdp: Positive = 1
    """Devices a parameter is sharded over; needs lift=mesh."""
    devices: Positive | None = None
    """Number of devices; default: all."""
    nonfinite: Nonfinite = "stop"
    """A loss or gradient that is not finite ends the run, or its update is skipped."""
    log_every: Positive = 100
    """Steps between metrics."""
    save_every: Positive = 1000
    """Steps between checkpoints."""
    keep: Positive = 2
    """How many of the latest checkpoints to keep, in addition to the best."""
    trackers: tuple[TrackerName, ...] = ()
    """Extra places to log metrics; each needs its extra installed."""
    profile: tuple[Positive, Positive] | None = None
    """(first step from 1, number of steps) to trace into OUTPUT/profile."""
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    """The processes of the run; not part of what it computes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineConfig):
    """Length of a run and its evaluations."""

    steps: Positive = 400_000
    """Optimizer steps of the whole run."""
    evaluate_every: Count = 0
    """Steps between evaluations, each with a checkpoint; 0 disables them."""
    export: Literal["last", "best"] = "last"
    """best: the checkpoint of the lowest held-out loss; needs evaluate_every."""
    keep_models: Literal["exported", "all"] = "exported"
    """all: each evaluated state is kept as a model, too (step-…); needs evaluate_every."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is not None and self.profile[0] > self.steps:
            raise ConfigError(
                f"train.profile begins at step {self.profile[0]}, and the run ends at {self.steps}"
            )
        if self.export == "best" and not self.evaluate_every:
            raise ConfigError("train.export=best needs train.evaluate_every: nothing is compared")
        if self.keep_models == "all" and not self.evaluate_every:
            raise ConfigError(
                "train.keep_models=all needs train.evaluate_every: the evaluated states are kept"
            )
