"""The settings of the engine: how a run trains, how long, and what it does on the way."""

import dataclasses
from typing import Literal

from minilm_jax.errors import ConfigError
from minilm_jax.train.devices import Lift
from minilm_jax.train.hosts import HostsConfig
from minilm_jax.train.trackers import TrackerName


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a run trains, whatever it trains and however long."""

    seed: int = 0
    """Of data order, dropout and initialisation."""
    accumulate: int = 1
    """Micro-batches a step; memory falls, numbers stay."""
    lift: Lift = "pmap"
    """pmap: data parallel. mesh: jit over data × fsdp."""
    fsdp: int = 1
    """Devices a parameter is sharded over; needs lift=mesh."""
    devices: int | None = None
    """How many devices to take; all where absent."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite ends the run, or its update is skipped."""
    log_every: int = 100
    """Steps between metrics."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """The latest checkpoints kept, beside the best where there is one."""
    trackers: tuple[TrackerName, ...] = ()
    """Where else the metrics go; each is an extra to install."""
    profile: tuple[int, int] | None = None
    """(first step, number of steps) to trace into OUTPUT/profile."""
    hosts: HostsConfig = dataclasses.field(default_factory=HostsConfig)
    """The processes of the run; not part of what it computes."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"train.seed must not be negative, got {self.seed}")
        for name in ("accumulate", "fsdp", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.devices is not None and self.devices < 1:
            raise ConfigError(f"train.devices must be at least 1, got {self.devices}")
        if self.profile is not None and min(self.profile) < 1:
            raise ConfigError(
                "train.profile is (first step from 1, number of steps), got "
                f"{' '.join(map(str, self.profile))}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(EngineConfig):
    """How long a run trains too, and what it measures on the way."""

    steps: int = 400_000
    """Optimizer steps of the whole run."""
    evaluate_every: int = 0
    """Steps between evaluations, each with a checkpoint; 0: none."""
    export: Literal["last", "best"] = "last"
    """best: the checkpoint of the lowest held-out loss; needs evaluate_every."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ConfigError(f"train.steps must be at least 1, got {self.steps}")
        if self.profile is not None and self.profile[0] > self.steps:
            raise ConfigError(
                f"train.profile begins at step {self.profile[0]}, and the run ends at {self.steps}"
            )
        if self.evaluate_every < 0:
            raise ConfigError(
                f"train.evaluate_every must not be negative, got {self.evaluate_every}"
            )
        if self.export == "best" and not self.evaluate_every:
            raise ConfigError("train.export=best needs train.evaluate_every: nothing is compared")
