"""The loop: exact resume, clean stops, a broken checkpoint, a loss that is not finite."""

import gc
import json
import math
import os
import signal
import time

import jax
import numpy as np
import pytest
from small_run import ADAM, STEPS, assert_same, batch_at, loss, run

from minilm_jax.errors import CheckpointError, ConfigError, UserError
from minilm_jax.signals import Stopped
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import GOODPUT, Goodput
from minilm_jax.train.loop import Evaluation
from minilm_jax.train.monitor import plot_loss
from minilm_jax.train.optimizer import with_average


@pytest.fixture
def whole(tmp_path):
    folder = tmp_path / "whole"
    return run(folder), (folder / "metrics.jsonl").read_text()


@pytest.mark.parametrize("interrupted", [0, 4, 7, 10, STEPS - 1])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, whole, interrupted):
    """SIGTERM while a batch is fetched: that step is finished and saved, the rest is the same."""

    def stop(step):
        if step == interrupted:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match=f"SIGTERM after step {interrupted + 1}"):
        run(tmp_path, on_batch=stop)
    state = run(tmp_path)
    assert_same(state, whole[0])
    assert (tmp_path / "metrics.jsonl").read_text() == whole[1]


def test_a_signal_while_the_last_checkpoint_is_written_stops_what_follows(
    tmp_path, whole, monkeypatch
):
    finish = Checkpoints.wait

    def wait(checkpoints):
        if checkpoints.latest() == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        finish(checkpoints)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", wait)
        with pytest.raises(Stopped, match=f"SIGTERM after step {STEPS}, which is saved"):
            run(tmp_path)
    assert_same(run(tmp_path), whole[0])


def test_a_gradient_that_is_exactly_0_is_told(tmp_path, caplog):
    run(tmp_path / "sound", steps=4)
    assert "gradient" not in caplog.text
    run(tmp_path / "constant", steps=4, loss=lambda *given: jax.lax.stop_gradient(loss(*given)))
    assert "the gradient is exactly 0 up to step 2: the loss does not depend" in caplog.text


def test_a_crash_resumes_from_the_last_checkpoint_and_rewrites_the_lost_rows(tmp_path, whole):
    def crash(step):
        if step == 10:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, on_batch=crash)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    state = run(tmp_path)
    assert_same(state, whole[0])
    assert (tmp_path / "metrics.jsonl").read_text() == whole[1]


def test_time_is_accounted_over_restarts(tmp_path):
    """Step 10 was logged and 9 saved: the next start does one step again and pays for it."""

    def crash(step):
        time.sleep(0.02)
        if step == 10:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, on_batch=crash)
    run(tmp_path, on_batch=lambda step: time.sleep(0.02))
    account = Goodput(tmp_path / GOODPUT).account()
    assert account.starts == 2
    assert account.seconds["data"] > 0.02 * 9
    assert 0.02 <= account.seconds["recomputed"] < account.seconds["data"]
    assert account.seconds["checkpoints"] > 0
    rows = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert all(0.5 < row["data_wait"] <= 1 for row in rows[1:5])
    assert all(row["flops_per_second"] > 0 for row in rows)


def test_an_average_of_the_parameters_is_resumed_too(tmp_path):
    optimizer = with_average(ADAM, 0.9)

    def stop(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    expected = run(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", optimizer=optimizer, on_batch=stop)
    state = run(tmp_path / "stopped", optimizer=optimizer)
    assert state.opt_state.average.count == STEPS
    assert_same(state, expected)


def heldout_of(*losses):
    """Held-out losses by step, with everything else as it is."""
    return lambda state: Evaluation(
        heldout=dict(enumerate(losses, start=1)).get(int(state.step) // 3, math.nan)
    )


def saved_steps(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def test_the_best_is_kept_and_the_latest_resumed(tmp_path):
    evaluate = heldout_of(0.5, 0.1, 0.4, 0.3)

    def crash(step):
        if step == 10:
            raise RuntimeError("power cut")

    whole = run(tmp_path / "whole", evaluate=evaluate, evaluate_every=3, keep=1)
    assert saved_steps(tmp_path / "whole") == [6, STEPS]
    folder = tmp_path / "cut"
    with pytest.raises(RuntimeError):
        run(folder, evaluate=evaluate, evaluate_every=3, keep=1, on_batch=crash)
    assert saved_steps(folder) == [6, 9]
    asked = []
    state = run(folder, evaluate=evaluate, evaluate_every=3, keep=1, on_batch=asked.append)
    assert asked[0] == 9  # the latest, though step 6 is better
    assert_same(state, whole)
    assert saved_steps(folder) == [6, STEPS]
    metrics = (folder / "metrics.jsonl").read_text()
    assert metrics == (tmp_path / "whole" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in metrics.splitlines()]
    heldout = {row["step"]: row["heldout"] for row in rows if "heldout" in row}
    assert heldout == {3: 0.5, 6: 0.1, 9: 0.4, 12: 0.3}
    with Checkpoints(folder / "checkpoints", keep=1, keep_best=True) as checkpoints:
        step, best = checkpoints.restore_best(state, Devices().shardings(state))
    assert step == best.step == 6
    assert not np.array_equal(best.params["kernel"], state.params["kernel"])
    assert plot_loss(folder / "metrics.jsonl", folder / "loss.png")
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    account = Goodput(folder / GOODPUT).account()
    assert account.seconds["evaluation"] > 0


def test_a_heldout_loss_that_is_not_finite_is_said_and_never_the_best(tmp_path, caplog):
    run(tmp_path, evaluate=heldout_of(0.5, math.nan, math.inf, 0.7), evaluate_every=3, keep=1)
    assert [r.getMessage() for r in caplog.records] == [
        f"the held-out loss after step {step} is not finite" for step in (6, 9)
    ]
    assert saved_steps(tmp_path) == [3, STEPS]


def test_an_evaluation_may_end_the_run(tmp_path, whole):
    state = run(
        tmp_path,
        evaluate=lambda state: Evaluation(enough=int(state.step) == 4),
        evaluate_every=4,
        keep=1,
    )
    assert state.step == 4 and saved_steps(tmp_path) == [4]
    # Nothing else is different: the rest can be added.
    assert_same(run(tmp_path), whole[0])


def test_without_evaluations_there_is_no_best(tmp_path, whole):
    with (
        Checkpoints(tmp_path / "whole" / "checkpoints", keep_best=True) as checkpoints,
        pytest.raises(CheckpointError, match="no checkpoint with a held-out loss"),
    ):
        checkpoints.restore_best(whole[0], Devices().shardings(whole[0]))
    with pytest.raises(ConfigError, match=r"needs train\.evaluate_every"):
        TrainConfig(export="best")
    with pytest.raises(ConfigError, match=r"keep_models=all needs train\.evaluate_every"):
        TrainConfig(keep_models="all")


def test_a_profile_is_a_file_and_changes_nothing(tmp_path, whole):
    assert_same(run(tmp_path, profile=(5, 2)), whole[0])
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_that_would_never_begin_is_refused():
    with pytest.raises(ConfigError, match="begins at step 13, and the run ends at 12"):
        TrainConfig(steps=12, profile=(13, 1))
    assert TrainConfig(steps=12, profile=(12, 1)).profile == (12, 1)


def test_a_profiler_that_fails_is_a_warning(tmp_path, whole, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("only one profile may be run at a time")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    assert_same(run(tmp_path, profile=(5, 2)), whole[0])
    assert "no profile of this run (only one profile" in caplog.text


def test_a_finished_run_takes_no_step(tmp_path, whole):
    run(tmp_path)

    def refuse(step):
        raise AssertionError("a batch was asked for")

    assert_same(run(tmp_path, on_batch=refuse), whole[0])


# Orbax leaves the reads beside the failed one unfinished; their clean-up complains when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_latest_checkpoint_gives_way_to_the_one_before(tmp_path, whole, damage, caplog):
    def crash(step):
        if step == 10:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run(tmp_path, on_batch=crash)
    saved = sorted((tmp_path / "checkpoints").iterdir(), key=lambda p: p.name)
    assert [path.name for path in saved] == ["6", "9"]
    data = [
        p for p in (tmp_path / "checkpoints" / "9").rglob("*") if p.is_file() and "/d/" in str(p)
    ]
    assert data
    for path in data:
        content = bytearray(path.read_bytes())
        if damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
        else:
            path.unlink()
    state = run(tmp_path)
    gc.collect()  # here, where the complaint is expected
    assert "step 9 is damaged" in caplog.text
    assert_same(state, whole[0])


def test_leftovers_of_a_killed_save_are_removed(tmp_path, whole):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert_same(run(tmp_path), whole[0])
    assert not (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    def poisoned(step):
        batch = batch_at(step)
        return {**batch, "x": np.full_like(batch["x"], np.nan)} if step == 7 else batch

    with pytest.raises(UserError, match="not finite at step 8"):
        run(tmp_path, batches=poisoned)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path):
    def poisoned(step):
        batch = batch_at(step)
        return {**batch, "x": np.full_like(batch["x"], np.nan)} if step == 7 else batch

    state = run(tmp_path, batches=poisoned, nonfinite="skip")
    assert np.isfinite(state.params["kernel"]).all()


def test_other_devices_restore_the_same_state(tmp_path, whole):
    run(tmp_path)
    for devices in (Devices("pmap"), Devices("mesh", fsdp=4)):
        assert_same(jax.device_get(run(tmp_path, devices=devices)), jax.device_get(whole[0]))


@pytest.mark.parametrize("resumed", [False, True])
def test_no_device_holds_whole_what_is_divided_over_all(tmp_path, resumed):
    """What the run starts from, kept on one device, would take what dividing it saves."""
    devices, width, held = Devices("mesh", fsdp=8), 1024, []

    def batches(step):
        return {**batch_at(step), "x": np.ones((8, width), np.float32)}

    def measure(state):
        on_first = {
            shard.data.unsafe_buffer_pointer(): shard.data.nbytes
            for x in jax.live_arrays()
            for shard in x.addressable_shards
            if shard.device == devices.devices[0]
        }
        held.append(sum(on_first.values()))
        return Evaluation()

    settings = {"devices": devices, "batches": batches, "width": width}
    if resumed:
        run(tmp_path, steps=1, **settings)
    gc.collect()
    measure(None)
    run(tmp_path, steps=2, evaluate=measure, evaluate_every=1, **settings)
    before, *during = held
    each = 4 * width**2  # of kernel, two moments and the frozen kernel
    assert len(during) == 2 - resumed
    # An eighth of each, and of three of them once more while they are saved.
    assert max(during) < before + each
