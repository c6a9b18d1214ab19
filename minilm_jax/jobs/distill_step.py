"""What the step of a distillation run is made of, for training it and for planning it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from minilm_jax.convert.model import Model
from minilm_jax.distill.objective import Batch, Params, check_loss
from minilm_jax.distill.student import init_student, student_encoder_config
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.jobs.distill_config import DistillConfig
from minilm_jax.jobs.teacher import teacher_params
from minilm_jax.reductions import Loss
from minilm_jax.train.flops import gradient_flops
from minilm_jax.train.optimizer import ParamPath, make_optimizer, make_schedule
from minilm_jax.train.reach import leave_out, unreached
from minilm_jax.train.step import Given, LossFunction, make_given

EXPORTED_HEADS = ("mlm",)
"""Trained modules that are part of the student; learned projections are not."""


def make_loss(config: DistillConfig, teacher: EncoderConfig) -> LossFunction:
    """Returns the loss of the run's student, given a teacher of this shape.

    Traced with an objective that returns anything but sums and counts it raises ConfigError.
    """
    student = student_encoder_config(config.student, teacher)
    found = config.objective.make_loss(teacher, student, config.compute)

    def checked(ours: Params, theirs: Params, batch: Batch, key: jax.Array | None) -> Loss:
        loss = found(ours, theirs, batch, key)
        check_loss(loss)
        return loss

    return checked


class StepParts(NamedTuple):
    """What the step of a run is made of, and what it is given."""

    loss: LossFunction
    """Of `given.frozen`."""
    optimizer: optax.GradientTransformationExtraArgs
    given: Given
    """Yet to be placed. `frozen` is as much of the teacher as the loss depends on."""
    unreached: frozenset[ParamPath]
    """What of the trained parameters the loss does not depend on: it stays as it starts."""


def step_parts(config: DistillConfig, teacher: Model) -> StepParts:
    """Returns the parts of a run's step; of a teacher of shapes, `given` has shapes."""
    loss = make_loss(config, teacher.config)
    frozen = teacher_params(teacher, config.objective)
    start = functools.partial(initial_params, config, teacher.config)
    aside = unreached(
        loss,
        jax.eval_shape(start, teacher.params["encoder"]),
        frozen,
        batch_shapes(config, config.batch.sequence_length),
    )
    loss, frozen = leave_out(loss, frozen, aside.frozen)
    schedule = make_schedule(config.optimizer, steps=config.train.steps)
    return StepParts(
        loss=loss,
        optimizer=make_optimizer(config.optimizer, unreached=aside.params),
        given=make_given(frozen, seed=config.train.seed, schedule=schedule),
        unreached=aside.params,
    )


def initial_params(
    config: DistillConfig, teacher: EncoderConfig, teacher_encoder: Any
) -> dict[str, Any]:
    """Returns what is trained as it is before the first step: the student, and what is beside it.

    A function of its arguments: a run that is resumed finds the same.

    Args:
      config: of the run.
      teacher: its shape.
      teacher_encoder: its encoder parameters.
    """
    key, other_key = jax.random.split(jax.random.key(config.train.seed))
    student = student_encoder_config(config.student, teacher)
    return {
        "encoder": init_student(key, config.student, teacher, teacher_encoder),
        **config.objective.new_params(other_key, teacher, student),
    }


def exported_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the trained parameters that the student is written with."""
    return {name: params[name] for name in ("encoder", *EXPORTED_HEADS) if name in params}


def exported(config: DistillConfig, teacher: Model) -> Model:
    """Returns the student as the run will write it, with shapes for parameters.

    It is what the second run of a chain is checked with, and planned, before the first has run.

    Args:
      config: of the run that trains it.
      teacher: of that run; its parameters may be shapes.
    """
    start = functools.partial(initial_params, config, teacher.config)
    params = exported_params(jax.eval_shape(start, teacher.params["encoder"]))
    return Model(config=student_encoder_config(config.student, teacher.config), params=params)


def batch_shapes(config: DistillConfig, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a global batch with rows of `length` tokens looks like."""
    rows = config.batch.batch_size
    names = ["input_ids", "segments"]
    if config.objective.masking() is not None:
        names.append("labels")
    shapes = {name: jax.ShapeDtypeStruct((rows, length), np.int32) for name in names}
    return shapes | {"rows": jax.ShapeDtypeStruct((rows,), np.int32)}


def step_flops(config: DistillConfig, teacher: Model, length: int) -> int:
    """Returns the FLOPs of the matrix products of a step, its relations written out.

    Args:
      config: of the run.
      teacher: its parameters may be shapes.
      length: tokens of a row.
    """
    objective = config.objective.for_flop_count()
    config = dataclasses.replace(config, objective=objective)
    start = functools.partial(initial_params, config, teacher.config)
    return gradient_flops(
        make_loss(config, teacher.config),
        jax.eval_shape(start, teacher.params["encoder"]),
        teacher_params(teacher, objective),
        batch_shapes(config, length),
    )


def model_flops(config: DistillConfig, teacher: Model) -> Callable[[Any], int]:
    """Returns batch -> FLOPs of the model's matrix products in a step, over all devices."""
    # What is computed twice to save memory is no work of the model.
    compute = dataclasses.replace(config.compute, remat=False)
    config = dataclasses.replace(config, compute=compute)
    counted = functools.cache(functools.partial(step_flops, config, teacher))
    return lambda batch: counted(batch["input_ids"].shape[-1])
