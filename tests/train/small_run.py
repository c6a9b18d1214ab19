"""A run of twelve steps through the whole loop, and what it is compared by."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minilm_jax.reductions import Loss, Mean
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import GOODPUT, Goodput
from minilm_jax.train.loop import fit
from minilm_jax.train.monitor import Monitor
from minilm_jax.train.profile import Profile
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_given, make_step

STEPS = 12
ADAM = optax.adamw(0.01)


def loss(params, frozen, batch, key):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["rows"])
    noise = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:]))(keys)
    error = ((batch["x"] + 0.1 * noise) @ params["kernel"] - batch["x"] @ frozen) ** 2
    count = jnp.float32(error.shape[0])
    return Loss(
        terms={"error": Mean(total=error.sum(), count=count)}, metrics={}, counts={"rows": count}
    )


def batch_at(step):
    rng = np.random.default_rng(step)
    return {
        "x": rng.normal(size=(8, 4)).astype(np.float32),
        "rows": np.arange(8, dtype=np.int32),
    }


def run(
    folder,
    *,
    batches=batch_at,
    devices=None,
    on_batch=None,
    optimizer=ADAM,
    evaluate=None,
    width=4,
    loss=loss,
    **config,
):
    """One start of the run in `folder`; returns its final state."""
    devices = devices or Devices("pmap", devices=jax.devices()[:1])
    folder.mkdir(exist_ok=True)
    config = TrainConfig(**{"steps": STEPS, "log_every": 2, "save_every": 3, **config})

    @contextlib.contextmanager
    def stream(first):
        def generate():
            for step in range(first, config.steps):
                if on_batch:
                    on_batch(step)
                yield devices.place_batch(batches(step))

        yield generate()

    params = {"kernel": np.eye(width, dtype=np.float32)}
    with Checkpoints(
        folder / "checkpoints",
        keep=config.keep,
        keep_best=config.evaluate_every > 0,
    ) as checkpoints:
        return fit(
            devices.lift_step(make_step(loss, optimizer, nonfinite=config.nonfinite)),
            lambda: create_state(params, optimizer),
            devices.place(make_given(2 * np.eye(width, dtype=np.float32), seed=1)),
            stream,
            config=config,
            devices=devices,
            checkpoints=checkpoints,
            make_monitor=lambda first: Monitor(
                folder / "metrics.jsonl", steps=STEPS, first_step=first, stream=io.StringIO()
            ),
            goodput=Goodput(folder / GOODPUT),
            flops=lambda batch: 2 * batch["x"].size,
            evaluate=evaluate,
            profile=Profile(config.profile, folder / "profile"),
        )


def assert_same(state, expected):
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)
