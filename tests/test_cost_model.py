"""The closed form of a step's cost against the step itself, as JAX traces it."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minilm_jax.distill.objectives import minilmv2
from minilm_jax.distill.relations import relation_kl
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.train.flops import count_flops

MODEL = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "cost_model.py"))
TEACHER = EncoderConfig(num_hidden_layers=4)
STUDENT = MODEL["STUDENT_6X384"]


def abstract_params(config):
    return jax.eval_shape(lambda: {"encoder": init_params(jax.random.key(0), config)})


@pytest.mark.parametrize("teacher_layer", [4, 3])
def test_closed_form_is_within_2_percent_of_the_traced_step(teacher_layer):
    batch, length = 2, 128
    # The others loop as far as the longest row, which a trace cannot know.
    objective = dataclasses.replace(
        minilmv2(heads=12, teacher_layer=teacher_layer, student_layer=6), implementation="reference"
    )
    loss = objective.make_loss(TEACHER, STUDENT, Compute())

    def gradient(student, teacher, batch):
        return jax.grad(lambda p: loss(p, teacher, batch, jax.random.key(0)).value())(student)

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    traced = count_flops(
        gradient,
        abstract_params(STUDENT),
        abstract_params(TEACHER),
        {"input_ids": tokens, "segments": tokens, "rows": rows},
    )
    cost = MODEL["distillation_cost"](
        TEACHER, STUDENT, batch=batch, length=length, teacher_layer=teacher_layer
    )
    assert cost.flops == pytest.approx(traced, rel=0.02)


def test_relations_alone():
    width, rows, length = {"teacher": 768, "student": 384}, 2, 64
    arrays = {
        name: jax.ShapeDtypeStruct((rows, length, size), jnp.float32)
        for name, size in width.items()
    }
    segments = jnp.ones((rows, length), jnp.int32)

    def gradient(student, teacher):
        def total(a, b):
            found = relation_kl(
                (teacher, teacher), (a, b), segments=segments, heads=12, implementation="reference"
            )
            return found.total

        return jax.grad(total, argnums=(0, 1))(student, student)

    traced = count_flops(gradient, arrays["student"], arrays["teacher"])
    cost = MODEL["distillation_cost"](TEACHER, STUDENT, batch=rows, length=length, relations=1)
    assert cost.relations == pytest.approx(traced, rel=0.001)


def test_parameters_are_those_of_the_encoder():
    leaves = jax.tree.leaves(abstract_params(STUDENT))
    assert MODEL["parameter_count"](STUDENT) == sum(x.size for x in leaves)


def test_tokens_a_day_of_a_machine_that_does_one_step_a_second():
    cost = MODEL["distillation_cost"](TEACHER, STUDENT, batch=2, length=128)
    rate = MODEL["tokens_a_day"](cost, tokens=256, peak=2 * cost.flops, mfu=0.5)
    assert rate == pytest.approx(256 * 86400)
