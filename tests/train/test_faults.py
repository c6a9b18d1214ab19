"""Faults of disks, files, clocks and memory, staged one by one (docs/faults.md)."""

import contextlib
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_run import STEPS, assert_same, batch_at, run

from minilm_jax.errors import CheckpointError, DataError, UserError
from minilm_jax.signals import Stopped
from minilm_jax.train import checkpoint
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.devices import Devices
from minilm_jax.train.hardware import memory_explained
from minilm_jax.train.monitor import plot_loss
from minilm_jax.train.nonfinite import DUMPS
from minilm_jax.train.state import TrainState

# Orbax leaves the reads beside a failed one unfinished, and says so when they are collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collected():
    """Has them collected here, where that is ignored."""
    yield
    gc.collect()


def state_of(step):
    """Arrays of several sizes, because small ones are stored elsewhere than large ones."""
    rng = np.random.default_rng(step)
    params = {"large": rng.normal(size=(300, 200)), "small": rng.normal(size=3)}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    opt_state = {"count": jnp.int32(step), "zeros": jnp.zeros((100, 100))}
    return TrainState(step=jnp.int32(step), params=params, opt_state=opt_state)


def shardings(state):
    return Devices("pmap", devices=jax.devices()[:1]).shardings(state)


def restore(folder, state=None):
    state = state or state_of(0)
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state, shardings(state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (6, 9):
            checkpoints.save(step, state_of(step))
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_damage_to_any_file_of_the_latest_is_no_state(tmp_path, saved, damage, caplog):
    """The state is that of the step before, unless the file is one that holds nothing of it."""
    files = [p.relative_to(saved) for p in (saved / "9").rglob("*") if p.is_file()]
    found = {}
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        damage(folder / file)
        state = restore(folder)
        assert_same(state, state_of(int(state.step)))
        assert (folder / "unreadable-9").exists() == (state.step == 6)
        found[file.as_posix()] = int(state.step)
    of_no_matter = {Path(file).name for file, step in found.items() if step == 9}
    assert of_no_matter <= {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert len(found) > 10
    if damage is flip_a_bit:
        assert "has a wrong checksum" in caplog.text


def test_steps_taken_during_a_save_do_not_reach_it(tmp_path):
    """They donate the state that is being written, for their own to lie in its memory."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = state_of(1)._replace(params=jnp.arange(4_000_000, dtype=jnp.float32))
    shardings = Devices("pmap", devices=jax.devices()[:1]).shardings(state)
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = step(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(state, shardings), expected)
    np.testing.assert_array_equal(state.params, expected.params + 5)


def test_an_intact_checkpoint_that_cannot_be_taken_up_stays(tmp_path, saved, monkeypatch):
    """Other settings, too little memory, storage that fails for a moment: no damage."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    other = state_of(0)._replace(opt_state={"count": jnp.int32(0), "zeros": jnp.zeros((7, 100))})
    with pytest.raises(
        CheckpointError,
        match=r"9 cannot be restored: its arrays differ from this run's \(1: opt_state/zeros is "
        r"float32\[100, 100\] in it and float32\[7, 100\] in this run\); it was not changed",
    ):
        restore(folder, other)

    def too_much(*_, **__):
        raise MemoryError("too little memory")

    def lost(*_, **__):
        raise OSError("stale file handle")

    for owner, name, fails in (
        (ocp.CheckpointManager, "restore", too_much),
        (checkpoint, "find_damage", lost),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fails)
            with pytest.raises(CheckpointError, match=r"restored: (too little|stale file)"):
                restore(folder)
    assert_same(restore(folder), state_of(9))


def test_a_damaged_best_is_not_exported(tmp_path):
    with Checkpoints(tmp_path, keep_best=True) as checkpoints:
        checkpoints.save(6, state_of(6), heldout=0.1)
        checkpoints.save(9, state_of(9), heldout=0.2)
    largest = max((tmp_path / "6").rglob("*/d/*"), key=lambda path: path.stat().st_size)
    flip_a_bit(largest)
    with (
        Checkpoints(tmp_path, keep_best=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"of step 6, is damaged \(.* has a wrong checksum"),
    ):
        checkpoints.restore_best(state_of(0), shardings(state_of(0)))


def test_a_run_whose_checkpoints_are_all_damaged_says_so(tmp_path, saved):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for manifest in folder.glob("*/default/manifest.ocdbt"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["unreadable-6", "unreadable-9"]
    assert restore(folder) is None


@contextlib.contextmanager
def full_disk(folder):
    """Puts the folder on a small disk of its own; yields (fill it up, make room)."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    filler = folder / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass

    try:
        yield fill, filler.unlink
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def file_size_limit(folder):
    """A quota that any user can stage: no file may become larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard)),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("disk", [full_disk, file_size_limit])
def test_a_save_that_finds_no_room_leaves_the_one_before(tmp_path, disk):
    """The disk fills up after step 7: the save of step 9 fails, and step 12 is not saved."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for path in (whole, folder):
        path.mkdir()
    # No row of the metrics is due before step 15: it would meet the full disk as well.
    steps = {"steps": 15, "log_every": 15}
    expected = run(whole, **steps)
    with disk(folder) as (fill, make_room):

        def on_batch(step):
            if step == 7:
                while not (folder / "checkpoints" / "6").exists():
                    time.sleep(0.01)
                fill()

        with pytest.raises(CheckpointError) as error:
            run(folder, on_batch=on_batch, **steps)
        assert "could not be written" in str(error.value)
        assert "\n" not in str(error.value)
        make_room()
        # Apart, because this process's threads still hold on to what they could not write.
        again = tmp_path / "again"
        shutil.copytree(folder, again, ignore=shutil.ignore_patterns("*-tmp", "filler"))
        complete = [p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
        assert sorted(complete) == ["3", "6"]
    assert_same(run(again, **steps), expected)


def test_a_failed_save_is_noticed_without_waiting_for_the_next(tmp_path):
    with full_disk(tmp_path) as (fill, make_room):
        with (
            pytest.raises(CheckpointError, match="could not be written"),
            Checkpoints(tmp_path / "checkpoints") as checkpoints,
        ):
            fill()
            checkpoints.save(3, state_of(3))
            for _ in range(3000):
                checkpoints.check()
                time.sleep(0.01)
            pytest.fail("no check noticed the failed save within 30 s")
        make_room()


def test_a_save_that_fails_does_not_hide_what_ended_the_run(tmp_path, caplog):
    with full_disk(tmp_path) as (fill, make_room):

        def on_batch(step):
            if step == 5:
                while not (tmp_path / "checkpoints" / "3").exists():
                    time.sleep(0.01)
                fill()
            if step == 6:  # the save of step 6 is under way
                raise DataError("a broken file")

        with pytest.raises(DataError, match="a broken file"):
            run(tmp_path, on_batch=on_batch, log_every=12)
        make_room()
    assert "could not be written" in caplog.text


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))

    def refuse(step):
        raise AssertionError("a batch was asked for")

    with pytest.raises(CheckpointError, match="and the disk has 1e-07 GB free; make room"):
        run(tmp_path, on_batch=refuse)


def test_a_clock_that_runs_backwards_changes_nothing(tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    for path in (whole, folder):
        path.mkdir()
    expected = run(whole)
    clock = itertools.count(time.time(), step=-3600)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert_same(run(folder), expected)
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["12", "9"]


@pytest.mark.parametrize("lift", ["pmap", "mesh"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_batch_whose_loss_is_not_finite_is_dumped(tmp_path, lift, policy, caplog):
    def poisoned(step):
        batch = batch_at(step)
        batch["x"][5, 2] = np.inf if step in (6, 7) else 1
        return batch

    devices = Devices(lift, devices=jax.devices()[:2])
    if policy == "stop":
        with pytest.raises(UserError, match=r"step 7 \(error, grad_norm, loss\), its batch is in"):
            run(tmp_path, batches=poisoned, devices=devices)
        steps = [7]
    else:
        run(tmp_path, batches=poisoned, devices=devices, nonfinite="skip", log_every=4)
        assert caplog.text.count("its update was skipped") == 2
        rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
        strict = [json.loads(row, parse_constant=pytest.fail) for row in rows]
        assert [row["loss"] is None for row in strict] == [False, True, False]
        assert plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        steps = [7, 8]
    files = sorted(tmp_path.glob("nonfinite-step-*.npz"))
    assert [file.name for file in files] == [f"nonfinite-step-{step}.npz" for step in steps]
    for step, file in zip(steps, files, strict=True):
        dumped = np.load(file)
        for name, value in poisoned(step - 1).items():
            np.testing.assert_array_equal(dumped[f"batch.{name}"], value)
        assert not np.isfinite(dumped["metrics.loss"])


def test_a_step_that_was_skipped_before_a_stop_is_told_once(tmp_path, caplog):
    def poisoned(step):
        batch = batch_at(step)
        return {**batch, "x": batch["x"] * np.nan} if step == 2 else batch

    def stop(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"batches": poisoned, "nonfinite": "skip", "log_every": 10}
    with pytest.raises(Stopped):
        run(tmp_path, on_batch=stop, save_every=2, **settings)
    assert caplog.text.count("not finite at step 3") == 1
    assert (tmp_path / "nonfinite-step-3.npz").exists()
    run(tmp_path, **settings)
    assert caplog.text.count("not finite") == 1


def test_a_run_that_only_skips_does_not_fill_the_disk(tmp_path, caplog):
    def poisoned(step):
        return {**batch_at(step), "x": np.full((8, 4), np.nan, np.float32)}

    run(tmp_path, batches=poisoned, nonfinite="skip")
    assert caplog.text.count("its update was skipped") == STEPS
    assert len(list(tmp_path.glob("nonfinite-step-*.npz"))) == DUMPS


def test_too_little_memory_is_told_with_what_saves_some(tmp_path):
    told = r"out of memory \(RESOURCE_EXHAUSTED.*\): try less"
    with pytest.raises(UserError, match=told), memory_explained("try less"):
        run(tmp_path, on_batch=lambda step: jnp.ones((1 << 48,)))
