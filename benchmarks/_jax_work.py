"""This library's side of the benchmarks: the functions its jobs are made of."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _peers import Work
from _setting import Setting

from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model
from minilm_jax.distill.objectives import minilmv2
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.jobs.distill import needed_params
from minilm_jax.train.devices import Devices
from minilm_jax.train.optimizer import OptimizerConfig, make_optimizer
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_evaluation, make_step

STEPS = 400_000
"""Of the learning rate schedule, as in the paper; a benchmark runs a few of them."""


def write_encoder(folder: Any, config: EncoderConfig, *, seed: int) -> Any:
    """Returns a Hugging Face folder with a random encoder that every peer loads."""
    params = jax.tree.map(np.asarray, init_params(jax.random.key(seed), config))
    return write_model(Model(config=config, params={"encoder": params}), folder)


def full_batch(setting: Setting) -> dict[str, np.ndarray]:
    """Returns a batch as data/ makes it, one document a row and no padding."""
    tokens = setting.tokens()
    return {
        "input_ids": tokens,
        "segments": np.ones_like(tokens),
        "rows": np.arange(setting.batch, dtype=np.int32),
    }


def distillation_step(setting: Setting, batch: Mapping[str, np.ndarray] | None = None) -> Work:
    """Returns the step that `minilm-jax distill` runs, wired as the job wires it."""
    assert setting.teacher is not None
    teacher, student = read_model(setting.teacher), read_model(setting.student)
    objective = minilmv2(
        heads=setting.heads,
        teacher_layer=setting.teacher_layer,
        student_layer=student.config.num_hidden_layers,
    )
    devices = Devices(devices=jax.devices()[:1])
    loss = objective.make_loss(teacher.config, student.config, Compute(dtype=setting.dtype))
    optimizer = make_optimizer(
        OptimizerConfig(), steps=STEPS, undecayed=objective.unreached(student.config)
    )
    step = devices.lift_step(make_step(loss, optimizer, seed=0))
    evaluate = devices.lift_evaluation(make_evaluation(loss))
    frozen = devices.place(needed_params(teacher, objective))
    placed = devices.place_batch(batch or full_batch(setting))
    state = devices.place(create_state({"encoder": student.params["encoder"]}, optimizer))
    check = float(evaluate(state.params, frozen, placed).value())

    def run() -> None:
        nonlocal state
        state, metrics = step(state, frozen, placed)
        jax.block_until_ready((state, metrics))

    return Work(run, check, _peak_of_accelerator(setting))


def matrix_product(size: int, dtype: str = "float32") -> Work:
    """Returns one product of square matrices: what the machine gives at best, 2·size³ FLOPs."""
    square = jnp.full((size, size), 1 / size, dtype)
    multiply = jax.jit(lambda x: x @ x)
    return Work(lambda: multiply(square).block_until_ready())


def _peak_of_accelerator(setting: Setting) -> Any:
    if setting.device == "cpu":
        return None
    return lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
