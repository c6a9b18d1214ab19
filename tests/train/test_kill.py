"""SIGKILL at random moments and at every stage of a save, SIGTERM, SIGINT: nothing is lost."""

import multiprocessing
import os
import signal
import time

import jax
import numpy as np
import pytest
from killed_run import (
    CONFIG,
    DELETED_STEP,
    STAGED_STEP,
    STAGES,
    STALL,
    STALL_S,
    one_device,
    start_state,
    train,
)

from minilm_jax.train.checkpoint import Checkpoints

# A server that has imported JAX, never started it, and forks a process for each start.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["jax", "optax", "orbax.checkpoint"])


def start(*arguments):
    process = PROCESSES.Process(target=train, args=arguments)
    process.start()
    return process


def finish(process):
    process.join(timeout=120)
    return process.exitcode


def final_state(folder):
    devices = one_device()
    state = start_state()[0]
    with Checkpoints(folder / "checkpoints", keep=CONFIG.keep) as checkpoints:
        assert checkpoints.latest() == CONFIG.steps
        return jax.device_get(checkpoints.restore(state, devices.shardings(state)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run: compile cache, state, metrics and seconds from start to end."""
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    began = time.monotonic()
    assert finish(start(folder, cache)) == 0
    seconds = time.monotonic() - began
    return cache, final_state(folder), (folder / "metrics.jsonl").read_text(), seconds


def complete_steps(folder):
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def unfinished_saves(folder):
    # By inode: the next start makes folders of the same names.
    return {path.stat().st_ino for path in (folder / "checkpoints").glob("*-tmp")}


def assert_ended_as(whole, folder):
    _, state, metrics, _ = whole
    for found, expected in zip(
        jax.tree.leaves(final_state(folder)), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    assert (folder / "metrics.jsonl").read_text() == metrics
    # An older one only where a kill cut its deletion short, and no save came after.
    kept = [CONFIG.steps - CONFIG.save_every, CONFIG.steps]
    assert sorted(complete_steps(folder))[-len(kept) :] == kept
    assert not unfinished_saves(folder)


def run_with_kills(folder, whole, rng, *, kills):
    """Starts the run until it ends, killing the first starts; returns which kills hit a save."""
    cache, _, _, seconds = whole
    hits = []
    while True:
        before, resumable = unfinished_saves(folder), max(complete_steps(folder), default=0)
        process = start(folder, cache)
        if len(hits) < kills:
            # Every other one waits for a save to begin, the rest come when they come.
            aim = len(hits) % 2 == 0
            deadline = time.monotonic() + (120 if aim else rng.uniform(0, seconds))
            while process.is_alive() and time.monotonic() < deadline:
                if aim and unfinished_saves(folder) - before:
                    aim, deadline = False, time.monotonic() + rng.uniform(0, 0.1)
                time.sleep(0.001)
            process.kill()
        code = finish(process)
        assert_resumed_from(folder, resumable)
        if code == 0:
            assert_ended_as(whole, folder)
            return hits
        assert code == -signal.SIGKILL
        hits.append(bool(unfinished_saves(folder) - before))


def assert_resumed_from(folder, step):
    """Every start that came as far as the loop took up the last complete checkpoint."""
    starts = folder / "starts"
    if starts.exists():
        assert starts.read_text() == f"{step}\n"
        starts.unlink()


@pytest.mark.parametrize(
    "kills,inside", [(3, 0), pytest.param(30, 10, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_kills_change_nothing(tmp_path, whole, kills, inside):
    """At least `kills` of them, `inside` a save; a run that ends before its kill starts anew."""
    rng, hits = np.random.default_rng(kills), []
    while len(hits) < kills:
        folder = tmp_path / f"after {len(hits)} kills"
        folder.mkdir()
        hits += run_with_kills(folder, whole, rng, kills=min(6, kills))
    print(f"{len(hits)} kills, {sum(hits)} of them inside a save")
    assert sum(hits) >= inside


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_at_each_stage_of_a_save(tmp_path, whole, stage):
    cache = whole[0]
    assert finish(start(tmp_path, cache, stage)) == -signal.SIGKILL
    committed = stage in ("before rotation", "during deletion")
    latest = STAGED_STEP if committed else STAGED_STEP - CONFIG.save_every
    assert max(complete_steps(tmp_path)) == latest
    assert bool(unfinished_saves(tmp_path)) == (stage in ("during shards", "before commit"))
    assert DELETED_STEP in complete_steps(tmp_path)  # wholly or in part
    (tmp_path / "starts").unlink()
    assert finish(start(tmp_path, cache)) == 0
    assert_resumed_from(tmp_path, latest)
    assert_ended_as(whole, tmp_path)


def wait_for(condition, process):
    while not condition():
        assert process.is_alive()
        time.sleep(0.005)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_came_in(tmp_path, whole, signum):
    cache = whole[0]
    process = start(tmp_path, cache)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    os.kill(process.pid, signum)
    assert finish(process) == signum
    stopped_after = len(metrics.read_text().splitlines())
    assert max(complete_steps(tmp_path)) == stopped_after < CONFIG.steps
    (tmp_path / "starts").unlink()
    assert finish(start(tmp_path, cache)) == 0
    assert_resumed_from(tmp_path, stopped_after)
    assert_ended_as(whole, tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_a_save(tmp_path, whole, signum):
    cache = whole[0]
    process = start(tmp_path, cache, STALL)
    wait_for(lambda: unfinished_saves(tmp_path), process)
    began = time.monotonic()
    while process.is_alive():  # more than two, should two arrive as one
        os.kill(process.pid, signum)
        process.join(timeout=1)
    assert time.monotonic() - began < STALL_S / 2
    assert process.exitcode == -signum
    (tmp_path / "starts").unlink()
    assert finish(start(tmp_path, cache)) == 0
    assert_resumed_from(tmp_path, 0)
    assert_ended_as(whole, tmp_path)
