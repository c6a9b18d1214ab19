"""What every job that trains does around the engine: hosts, devices, the run's folder, the loop."""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import optax

from minilm_jax import native
from minilm_jax.data.prefetch import Prefetch
from minilm_jax.data.prepare import check_guarded
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.settings import Settings
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.config import EngineConfig, TrainConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import GOODPUT, Goodput
from minilm_jax.train.hosts import check_shared, fail_together, join, wait_for_all, writes
from minilm_jax.train.loop import Evaluation, fit
from minilm_jax.train.monitor import Monitor
from minilm_jax.train.profile import PROFILE, Profile
from minilm_jax.train.run_folder import (
    CHECKPOINTS,
    METRICS,
    NOT_COMPARED,
    RESULT,
    jsonable,
    open_run,
    versions,
    write_json,
)
from minilm_jax.train.state import TrainState
from minilm_jax.train.step import Given, LossFunction, make_step
from minilm_jax.train.trackers import check_trackers, open_trackers

SAVES_MEMORY = (
    "try --train.accumulate 2 or more, a smaller batch, or parameters sharded by --train.lift mesh "
    "--train.fsdp N; minilm-jax plan shows what a distillation needs with each of them"
)
"""What a job that trains says where memory runs out."""

Say = Callable[[str], None]


def join_hosts(config: EngineConfig, say: Say) -> Say:
    """Joins the processes of the run, and returns the function that the job reports with.

    In all but one process it says nothing, once each has said who it is.
    """
    check_guarded()
    join(config.hosts, say=say)
    return say if writes() else lambda _: None


def open_devices(config: EngineConfig, *, batch_size: int) -> Devices:
    """Returns the devices of a run, once it is known to have what its settings ask for."""
    check_trackers(config.trackers)
    devices = Devices(config.lift, fsdp=config.fsdp, count=config.devices)
    devices.check_batch(batch_size, accumulate=config.accumulate)
    if _of_cpus(devices):
        native.begin()
    return devices


def describe_devices(devices: Devices) -> str:
    """Returns how many devices of which kind, for what a job says when it starts."""
    slow = _of_cpus(devices) and not native.load("attention")
    told = ", without C++ kernels: no working compiler (README)" if slow else ""
    return f"{devices.count} × {devices.devices[0].device_kind}{told}"


def _of_cpus(devices: Devices) -> bool:
    return bool(devices.devices[0].platform == "cpu")


def describe(config: Any, **fingerprints: str | Mapping[str, str]) -> dict[str, Any]:
    """Returns a job's resolved config as JSON, with what it was given to read beside it."""
    plain = jsonable(dataclasses.asdict(config))
    # A field that takes one of several classes, such as an objective: two of equal fields differ.
    for name, declared in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and type(value) is not declared:
            plain[name] = {"class": type(value).__qualname__, **plain[name]}
    # Where a run lies, who watches it and which changes it forgives is not what it is.
    for name in NOT_COMPARED:
        *outer, last = name.split(".")
        functools.reduce(dict.__getitem__, outer, plain).pop(last)
    return {**plain, "fingerprints": fingerprints}


def shape_digest(model: EncoderConfig) -> str:
    """Returns SHA-256 of what an encoder computes beside its weights: shape, activation, norm."""
    content = json.dumps(dataclasses.asdict(model), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def own_code(settings: Settings) -> dict[str, str]:
    """Returns the SHA-256 of each file of code outside of this package that defines settings.

    What a run is computed with where its objective is the user's own: fields do not tell formulas.
    """
    found = {}
    for part in type(settings).__mro__:
        module = sys.modules.get(part.__module__)
        file = getattr(module, "__file__", None)
        if issubclass(part, Settings) and not part.__module__.startswith("minilm_jax.") and file:
            found[Path(file).name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


@contextmanager
def own_folder(
    output: Path,
    described: Mapping[str, Any],
    *,
    override: tuple[str, ...],
    code: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Holds a run's folder, which one process does for all; its refusal is everyone's."""
    with ExitStack() as held:
        with fail_together():
            if writes():
                held.enter_context(open_run(output, described, override=override, code=code))
        check_shared(output)
        yield


def open_goodput(output: Path, *, began: float | None = None) -> Goodput:
    """Returns the account of the run's time, which one process writes."""
    return Goodput(output / GOODPUT if writes() else None, began=began)


def open_checkpoints(
    output: Path, config: EngineConfig, *, metadata: Mapping[str, Any], keep_best: bool = False
) -> Checkpoints:
    """Returns the run's checkpoints, each with `metadata` and the versions it was computed with."""
    return Checkpoints(
        output / CHECKPOINTS,
        keep=config.keep,
        keep_best=keep_best,
        metadata={**metadata, "versions": versions()},
    )


def write_result(output: Path, result: Any) -> None:
    """Writes what a finished run reports, a dataclass, and with it that the run is finished.

    The last thing to be written; no process goes on before it is.
    """
    if writes():
        write_json(output / RESULT, dataclasses.asdict(result))
    wait_for_all("finished")


def lift_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    config: EngineConfig,
    devices: Devices,
) -> Callable[..., Any]:
    """Returns the step of runs of these settings, lifted over their devices."""
    return devices.lift_step(
        make_step(loss, optimizer, accumulate=config.accumulate, nonfinite=config.nonfinite)
    )


def train(
    step: Callable[..., Any],
    start: Callable[[], TrainState],
    given: Given,
    batch_at: Callable[[int], Mapping[str, np.ndarray]],
    *,
    output: Path,
    config: TrainConfig,
    described: Mapping[str, Any],
    devices: Devices,
    checkpoints: Checkpoints,
    goodput: Goodput,
    flops: Callable[[Any], int] | None = None,
    evaluate: Callable[[TrainState], Evaluation] | None = None,
) -> TrainState:
    """Returns the state after the last step: `fit`, with all that it writes into the run's folder.

    Args:
      step: of `lift_step`.
      start: makes the state to start from where there is no checkpoint.
      given: what all steps are given, placed.
      batch_at: this process's rows of the batch of a step, counted from 0.
      output: the run's folder.
      config: of the run.
      described: the run, shown beside its curves.
      devices: where it runs.
      checkpoints: where it saves and resumes.
      goodput: books where the time goes.
      flops: of a step on a placed batch.
      evaluate: looks at a state every config.evaluate_every steps, as in `fit`.
    """
    return fit(
        step,
        start,
        given,
        # Placed by the thread that makes it: the copy overlaps with the step before.
        lambda first: Prefetch(
            lambda number: devices.place_batch(batch_at(number)), start=first, stop=config.steps
        ),
        config=config,
        devices=devices,
        checkpoints=checkpoints,
        make_monitor=lambda first: Monitor(
            output / METRICS,
            steps=config.steps,
            first_step=first,
            devices=devices.devices,
            trackers=open_trackers(config.trackers, output, config=described, first_step=first),
        ),
        goodput=goodput,
        flops=flops,
        evaluate=evaluate,
        profile=Profile(config.profile, output / PROFILE) if writes() else None,
    )
