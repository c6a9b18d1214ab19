"""This library's side of the benchmarks, made of the same functions as its jobs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _peers import Work
from _setting import Setting, embedding_check

from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model
from minilm_jax.distill.objectives import minilmv2
from minilm_jax.encoder.config import Attention, Compute, EncoderConfig
from minilm_jax.encoder.encoder import encode, init_params
from minilm_jax.jobs.sentence_encoder import SentenceEncoder
from minilm_jax.jobs.teacher import teacher_params
from minilm_jax.reductions import Loss, Mean
from minilm_jax.train.devices import Devices
from minilm_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from minilm_jax.train.reach import leave_out, unreached
from minilm_jax.train.state import create_state
from minilm_jax.train.step import LossFunction, make_evaluation, make_given, make_step

Batch = Mapping[str, np.ndarray]
STEPS = 400_000
"""Of the learning rate schedule, as in the paper; a benchmark runs a few of them."""


def write_encoder(folder: Any, config: EncoderConfig, *, seed: int) -> Any:
    """Returns a Hugging Face folder with a random encoder that every peer loads."""
    params = jax.tree.map(np.asarray, init_params(jax.random.key(seed), config))
    return write_model(Model(config=config, params={"encoder": params}), folder)


def full_batch(setting: Setting) -> Batch:
    """Returns a batch as data/ makes it, one document a row and no padding."""
    tokens = setting.tokens()
    return {
        "input_ids": tokens,
        "segments": np.ones_like(tokens),
        "rows": np.arange(setting.batch, dtype=np.int32),
    }


def distillation_step(
    setting: Setting,
    batches: Sequence[Batch] = (),
    *,
    checked: bool = True,
    devices: Devices | None = None,
    attention: Attention = "auto",
) -> Work:
    """Returns the step that `minilm-jax distill` runs, wired as the job wires it.

    Args:
      setting: weights, shapes, dtype.
      batches: if given, one step is run on each, instead of one step on a full batch.
      checked: whether the loss is to be compared with that of other peers.
      devices: to run on; one if not given.
      attention: see `Compute`.
    """
    assert setting.teacher is not None
    teacher, student = read_model(setting.teacher), read_model(setting.student)
    objective = minilmv2(
        heads=setting.heads,
        teacher_layer=setting.teacher_layer,
        student_layer=student.config.num_hidden_layers,
    )
    work = _training(
        objective.make_loss(
            teacher.config, student.config, Compute(dtype=setting.dtype, attention=attention)
        ),
        student,
        teacher_params(teacher, objective),
        batches or [full_batch(setting)],
        setting,
        devices=devices,
    )
    return work if checked else work._replace(check=None)


def encoder_step(setting: Setting) -> Work:
    """Returns a training step of the encoder alone, on the mean of its outputs' fourth powers."""
    student = read_model(setting.student)

    def loss(params: Any, _: Any, batch: Any, key: Any) -> Loss:
        hidden = encode(
            student.config,
            params["encoder"],
            batch,
            compute=Compute(dtype=setting.dtype),
            key=key,
        ).last_hidden_state
        total = jnp.sum(hidden.astype(jnp.float32) ** 4)
        mean = Mean(total=total, count=jnp.float32(hidden.size))
        return Loss(terms={"fourth": mean}, metrics={}, counts={})

    return _training(loss, student, {}, [full_batch(setting)], setting)


def encoder_forward(setting: Setting) -> Work:
    """Returns a forward pass of the encoder, without dropout."""
    student = read_model(setting.student)
    params, batch = jax.device_put((student.params["encoder"], full_batch(setting)))

    @jax.jit
    def forward(params: Any, batch: Any) -> jax.Array:
        compute = Compute(dtype=setting.dtype)
        return encode(student.config, params, batch, compute=compute).last_hidden_state

    def run() -> jax.Array:
        return forward(params, batch).block_until_ready()

    return Work(run, lambda: float((run().astype(jnp.float32) ** 4).mean()))


def _training(
    loss: LossFunction,
    student: Model,
    frozen: Any,
    batches: Sequence[Batch],
    setting: Setting,
    *,
    devices: Devices | None = None,
) -> Work:
    devices = devices or Devices(devices=jax.devices()[:1])
    start = {"encoder": student.params["encoder"]}
    aside = unreached(loss, start, frozen, batches[0])
    loss, frozen = leave_out(loss, frozen, aside.frozen)
    optimizer = make_optimizer(OptimizerConfig(), unreached=aside.params)
    step = devices.lift_step(make_step(loss, optimizer))
    evaluate = devices.lift_evaluation(make_evaluation(loss))
    schedule = make_schedule(OptimizerConfig(), steps=STEPS)
    given = devices.place(make_given(frozen, seed=0, schedule=schedule))
    rows = devices.rows(setting.batch)
    placed = [
        devices.place_batch({name: x[rows] for name, x in batch.items()}) for batch in batches
    ]
    state = devices.place(create_state(start, optimizer))
    check = float(evaluate(state.params, given.frozen, placed[0]).value())

    def run() -> None:
        nonlocal state
        for batch in placed:
            state, metrics = step(state, given, batch)
            jax.block_until_ready((state, metrics))

    return Work(run, lambda: check, _peak_of_accelerator(setting))


def sentence_encoding(folder: Path, texts: Sequence[str]) -> Work:
    """Returns text-to-embedding work."""
    encoder = SentenceEncoder(folder)

    def run() -> np.ndarray:
        return encoder(texts)

    return Work(run, lambda: embedding_check(run()))


def matrix_product(size: int, dtype: str = "float32") -> Work:
    """Returns one product of square matrices (2·size³ FLOPs): the best the machine can do."""
    square = jnp.full((size, size), 1 / size, dtype)
    multiply = jax.jit(lambda x: x @ x)
    return Work(lambda: multiply(square).block_until_ready())


def _peak_of_accelerator(setting: Setting) -> Any:
    if setting.device == "cpu":
        return None
    return lambda: jax.devices()[0].memory_stats()["peak_bytes_in_use"]
