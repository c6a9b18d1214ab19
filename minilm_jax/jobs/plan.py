"""The plan job: what a run needs and takes, before anything is spent on it.

For a TPU slice, or for GPUs, the run's own step is compiled ahead of time for those devices, which
need not be there: the memory is what the compiler assigned. Time is an estimate:

    step = max(FLOPs / (efficiency · peak), bytes / bandwidth) + 2 · gradient bytes / interconnect

for one device, where FLOPs are those of the matrix products and bytes what XLA says the step reads
and writes (a loop's body once, so a lower bound; nothing for GPUs that are not there). Input,
checkpoints and evaluation are not in it.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from minilm_jax.convert.model import Model
from minilm_jax.errors import first_line
from minilm_jax.jobs.distill_config import ChainConfig, DistillConfig, check_settings
from minilm_jax.jobs.distill_step import (
    batch_shapes,
    exported,
    initial_params,
    step_flops,
    step_parts,
)
from minilm_jax.jobs.running import lift_step
from minilm_jax.jobs.teacher import check_heads, describe_teacher
from minilm_jax.settings import Settings, above, at_most, check
from minilm_jax.train.described import described_devices
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import duration
from minilm_jax.train.hardware import GIB, known_chip, memory_limit
from minilm_jax.train.state import create_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(Settings):
    """What an experiment would need on some hardware; every setting of the run can be changed."""

    run: Annotated[DistillConfig | ChainConfig, tyro.conf.arg(name="")]
    """The run, or the chain of two."""
    hardware: str = "local"
    """local, or what need not be there: tpu-v5e-256, tpu-v4-256, tpu-v5p:2x2x2, gpu-h100-8."""
    efficiency: Annotated[float, above(0), at_most(1)] | None = None
    """Share of the peak the matrix products are assumed to reach; None: 0.75
    of what this CPU is measured to do, 0.4 of the published peak
    elsewhere, which is not measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fullest device."""

    teacher: int
    student: int
    optimizer: int
    batch: int
    temporary: int
    """Activations, gradients and whatever else the compiled step holds while it runs."""
    code: int
    limit: int | None
    """What the device has; None where it does not say."""

    @property
    def total(self) -> int:
        """All of it; the new state takes the old one's place."""
        return (
            self.teacher + self.student + self.optimizer + self.batch + self.temporary + self.code
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run needs and takes."""

    name: str
    hardware: str
    devices: int
    lift: str
    teacher_parameters: int
    """Those that the loss depends on."""
    student_parameters: int
    flops: int
    """Of the matrix products of one step, over all devices."""
    steps: int
    tokens: int
    """Of all steps, padding included."""
    memory: Memory | None
    """None where the compiler refused the step for want of memory; `refusal` says why."""
    refusal: str
    seconds_a_step: float | None
    """None where the peak of the device is not known."""
    advice: tuple[str, ...]
    """What to change where it does not fit."""

    @property
    def fits(self) -> bool:
        """Whether a device holds it, as far as it is known."""
        memory = self.memory
        return memory is not None and (memory.limit is None or memory.total <= memory.limit)


def run(config: PlanConfig, *, say: Callable[[str], None] = print) -> tuple[Plan, ...]:
    """Returns a plan for each run of the experiment, after showing it.

    Raises:
      ConfigError: the settings contradict each other, or the hardware is not known.
    """
    check("config", config, PlanConfig)
    local = config.hardware == "local"
    found = None if local else described_devices(config.hardware)
    if isinstance(config.run, ChainConfig):
        stages = dict(zip(("--assistant.", "--student."), config.run.stages(), strict=True))
    else:
        stages = {"--": config.run}
    first, *later = stages.values()
    teachers = [describe_teacher(first)]
    for student in later:
        teachers.append(exported(first, teachers[0]))
        check_heads(student, teachers[-1])
    plans: list[Plan] = []
    for (option, stage), teacher in zip(stages.items(), teachers, strict=True):
        train = stage.train
        devices = Devices(train.lift, fsdp=train.fsdp, count=train.devices, devices=found)
        plans.append(
            make_plan(
                stage,
                teacher,
                devices,
                hardware=config.hardware,
                efficiency=config.efficiency,
                option=option,
            )
        )
        say(("" if len(plans) == 1 else "\n") + describe_plan(plans[-1]))
    return tuple(plans)


def make_plan(
    config: DistillConfig,
    teacher: Model,
    devices: Devices,
    *,
    hardware: str,
    efficiency: float | None,
    option: str = "--",
) -> Plan:
    """Returns the plan of one run on devices that may be only described; compiles its step.

    Args:
      config: of the run.
      teacher: its parameters may be shapes.
      devices: what it would run on.
      hardware: their name.
      efficiency: share of the peak that is reached; None: by the kind of device.
      option: what the options of this run begin with.
    """
    devices.check_batch(config.batch.batch_size, accumulate=config.train.accumulate)
    step, state, given, batch = abstract_step(config, teacher, devices)
    flops = step_flops(config, teacher, config.batch.sequence_length)
    refusal, memory, bytes_accessed = "", None, 0.0
    try:
        with warnings.catch_warnings():
            # A program for devices that are not there is kept, but cannot be read back.
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
            compiled = step.lower(state, given, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = first_line(error)
        if "RESOURCE_EXHAUSTED" not in refusal:
            raise
    else:
        memory = _memory(compiled, state, given.frozen, batch, devices)
        bytes_accessed = float((compiled.cost_analysis() or {}).get("bytes accessed", 0.0))
    peak = _peak(devices)
    seconds = None
    if efficiency is None:
        efficiency = 0.75 if devices.devices[0].platform == "cpu" else 0.4
    if peak is not None:
        seconds = flops / devices.count / (efficiency * peak)
        chip = known_chip(devices.devices[0])
        if chip is not None:
            seconds = max(seconds, bytes_accessed / chip.bandwidth)
            if devices.count > 1:
                gradient = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(state.params))
                seconds += 2 * gradient / chip.interconnect
    plan = Plan(
        name=str(config.output),
        hardware=hardware,
        devices=devices.count,
        lift=devices.lift if config.train.fsdp == 1 else f"mesh, fsdp {config.train.fsdp}",
        teacher_parameters=_parameters(given.frozen),
        student_parameters=_parameters(state.params),
        flops=flops,
        steps=config.train.steps,
        tokens=config.train.steps * config.batch.batch_size * config.batch.sequence_length,
        memory=memory,
        refusal=refusal,
        seconds_a_step=seconds,
        advice=(),
    )
    return plan if plan.fits else dataclasses.replace(plan, advice=_advice(config, devices, option))


def abstract_step(
    config: DistillConfig, teacher: Model, devices: Devices
) -> tuple[Any, Any, Any, Any]:
    """Returns the lifted step of a run and the shapes (state, given, batch) it takes.

    Args:
      config: of the run.
      teacher: its parameters may be shapes.
      devices: they may be only described.
    """
    check_settings(config, teacher.config)
    parts = step_parts(config, teacher)

    def start(encoder: Any) -> Any:
        return create_state(initial_params(config, teacher.config, encoder), parts.optimizer)

    return (
        lift_step(parts.loss, parts.optimizer, config=config.train, devices=devices),
        devices.abstract(jax.eval_shape(start, teacher.params["encoder"])),
        devices.abstract(parts.given),
        devices.abstract_batch(batch_shapes(config, config.batch.sequence_length)),
    )


def _memory(compiled: Any, state: Any, frozen: Any, batch: Any, devices: Devices) -> Memory:
    analysis = compiled.memory_analysis()
    # What is donated is counted once; the rest of the output (metrics) is small but there.
    new = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    return Memory(
        teacher=_bytes(frozen),
        student=_bytes(state.params),
        optimizer=_bytes(state.opt_state),
        batch=_bytes(batch),
        temporary=analysis.temp_size_in_bytes + new,
        code=analysis.generated_code_size_in_bytes,
        limit=memory_limit(devices.devices[0]),
    )


def _bytes(tree: Any) -> int:
    """Returns what one device holds of a placed tree."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _parameters(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _peak(devices: Devices) -> float | None:
    """Returns the FLOPs a second of one device: published, or of this CPU as it is measured."""
    device = devices.devices[0]
    chip = known_chip(device)
    if chip is not None:
        return chip.flops
    if device.platform != "cpu":
        return None
    size = 1024
    square = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(square).block_until_ready()
    fastest = math.inf
    for _ in range(16):  # whatever else this machine is at
        began = time.monotonic()
        multiply(square).block_until_ready()
        fastest = min(fastest, time.monotonic() - began)
    # Emulated devices share the cores.
    return 2 * size**3 / fastest / devices.count


def _advice(config: DistillConfig, devices: Devices, option: str) -> tuple[str, ...]:
    """Returns what makes it smaller, the cheapest first."""
    rows = config.batch.batch_size // devices.count
    accumulate = config.train.accumulate
    larger = next((n for n in range(accumulate + 1, rows + 1) if rows % n == 0), None)
    advice = []
    if larger is not None:
        advice.append(f"{option}train.accumulate {larger}: fewer rows at a time, the same numbers")
    if not config.compute.remat:
        advice.append(f"{option}compute.remat: activations are recomputed, about a third more time")
    if config.compute.dtype == "float32":
        advice.append(f"{option}compute.dtype bfloat16: half the activations")
    if config.train.fsdp < devices.count:
        wanted = next(
            n for n in range(2 * config.train.fsdp, devices.count + 1) if devices.count % n == 0
        )
        advice.append(
            f"{option}train.lift mesh {option}train.fsdp {wanted}: teacher, student and optimizer "
            "are divided"
        )
    advice.append("more devices, or devices with more memory")
    return tuple(advice)


def describe_plan(plan: Plan) -> str:
    """Returns the plan as lines of text."""
    lines = [
        f"run         {plan.name}",
        f"hardware    {plan.hardware}: "
        + (f"{plan.devices} devices, {plan.lift}" if plan.devices > 1 else "1 device"),
        f"parameters  teacher {plan.teacher_parameters / 1e6:.1f} M (that the loss depends on), "
        f"student {plan.student_parameters / 1e6:.1f} M",
        f"a step      {plan.flops:.3g} FLOPs of matrix products over all devices",
        f"the run     {plan.steps:,} steps, {_tokens(plan.tokens)} tokens with padding, "
        f"{plan.flops * plan.steps:.3g} FLOPs",
    ]
    memory = plan.memory
    if memory is not None:
        lines.append("memory of a device")
        parts = ("teacher", "student", "optimizer", "batch", "temporary", "code", "total")
        lines += [f"  {name:<10}{getattr(memory, name) / GIB:8.3f} GiB" for name in parts]
        if memory.limit is not None:
            lines.append(f"  of        {memory.limit / GIB:8.3f} GiB")
    if plan.seconds_a_step is None:
        lines.append("time        not known: the peak of this device is not in our table")
    else:
        lines.append(
            f"time        {_step_time(plan.seconds_a_step)} a step, "
            f"{duration(plan.seconds_a_step * plan.steps)} in all: an estimate, see docs/tpu.md"
        )
    if plan.fits:
        lines.append("fits        yes, in memory")
    else:
        lines.append(f"fits        no{': ' + plan.refusal if plan.refusal else ''}")
        lines += [f"  try       {line}" for line in plan.advice]
    return "\n".join(lines)


def _tokens(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e8 else f"{count:,.0f}"


def _step_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
