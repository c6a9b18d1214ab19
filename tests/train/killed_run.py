"""A small run for a process of its own, which somebody kills; nothing in the run knows that."""

import contextlib
import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import optax
from ragged_problem import make_problem, ragged_loss

from minilm_jax.signals import Stopped
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.loop import fit
from minilm_jax.train.monitor import Monitor
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_given, make_step

CONFIG = TrainConfig(steps=12, log_every=1, save_every=2, keep=2)
STAGES = ("before tmp", "during shards", "before commit", "before rotation", "during deletion")
"""Of a save, in the order in which they come."""
STAGED_STEP, DELETED_STEP = 6, 2
"""The save that is killed at its stage, and the one it rotates out."""
STALL, STALL_S = "stall", 60
BALLAST = 3_000_000
"""Parameters that nothing but weight decay moves: with the optimizer's, 36 MB to save."""
SECONDS_A_STEP = 0.02


def one_device():
    return Devices("pmap", devices=jax.local_devices()[:1])


def start_state():
    params, frozen, batches = make_problem(steps=CONFIG.steps)
    params["ballast"] = np.random.default_rng(1).random(BALLAST, np.float32)
    optimizer = optax.adamw(0.01, weight_decay=0.1)
    return create_state(params, optimizer), frozen, batches, optimizer


def train(folder: Path, cache: Path, stage: str | None = None) -> None:
    """Trains to the end; dies at a stage of the save of STAGED_STEP, or stalls every save.

    Exits with the number of the signal where one stopped it.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if stage == STALL:
        stall_commits()
    elif stage is not None:
        die_at(stage, folder / "checkpoints")
    devices = one_device()
    state, frozen, batches, optimizer = start_state()

    @contextlib.contextmanager
    def stream(first):
        def generate():
            for batch in batches[first:]:
                time.sleep(SECONDS_A_STEP)
                yield devices.place_batch(batch)

        yield generate()

    def monitor(first):
        with (folder / "starts").open("a") as file:
            file.write(f"{first}\n")
        return Monitor(
            folder / "metrics.jsonl", steps=CONFIG.steps, first_step=first, stream=io.StringIO()
        )

    with (
        exit_when_stopped(),
        Checkpoints(folder / "checkpoints", keep=CONFIG.keep) as checkpoints,
    ):
        fit(
            devices.lift_step(make_step(ragged_loss, optimizer)),
            lambda: state,
            devices.place(make_given(frozen, seed=3)),
            stream,
            config=CONFIG,
            devices=devices,
            checkpoints=checkpoints,
            make_monitor=monitor,
        )


@contextlib.contextmanager
def exit_when_stopped():
    try:
        yield
    except Stopped as stopped:
        sys.exit(stopped.signum)


def stall_commits() -> None:
    """Makes the rename that ends a save wait for longer than anybody does."""

    def watch(event, arguments):
        if event == "os.rename" and "checkpoint-tmp" in os.fspath(arguments[0]):
            time.sleep(STALL_S)

    sys.addaudithook(watch)


def die_at(stage: str, checkpoints: Path) -> None:
    """Watches what the process does to its files and kills it at the stage."""
    temporary = checkpoints / f"{STAGED_STEP}.orbax-checkpoint-tmp"
    old = checkpoints / str(DELETED_STEP)
    deleting: list[str] = []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_shards():
        # TensorStore writes from its own threads, where no hook sees it.
        while not any(path.stat().st_size for path in temporary.glob("**/d/*")):
            time.sleep(0.0005)
        die()

    def watch(event, arguments):
        if event not in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
            return
        path = os.fspath(arguments[0])
        if event == "os.mkdir" and path == str(temporary):
            if stage == "before tmp":
                die()
            if stage == "during shards":
                threading.Thread(target=die_in_shards, daemon=True).start()
        elif event == "os.rename" and path == str(temporary):
            if stage == "before commit":
                die()
        elif event in ("os.remove", "shutil.rmtree") and (
            deleting or Path(path).is_relative_to(old)
        ):
            deleting.append(path)
            if stage == "before rotation":
                die()
            if stage == "during deletion" and len(deleting) == 3:
                die()  # the folder, its first file, and the second that now stays

    sys.addaudithook(watch)
