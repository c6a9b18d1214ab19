"""Two processes, one of which is told to stop or dies: the run ends and continues as one."""

import re
import signal
import time

import numpy as np
import pytest
from processes import HERE, free_port, start

STEPS = 40


def start_both(folder, *, heartbeat_s=100):
    script, port = HERE / "two_process_run.py", free_port()
    return [start(script, process, port, folder, heartbeat_s) for process in (0, 1)]


def finish(process):
    out, errors = process.communicate(timeout=150)
    return process.returncode, out, errors


def run_to_the_end(folder):
    """Returns the step that the run took up."""
    both = [finish(process) for process in start_both(folder)]
    for code, _, errors in both:
        assert code == 0, errors
    return int(re.search(r"resumed at (\d+)", both[0][1]).group(1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run_to_the_end(folder) == 0
    return folder


def assert_ended_as(whole, folder):
    expected, found = (np.load(path / "state.npz") for path in (whole, folder))
    assert expected.files == found.files
    for name in expected.files:
        np.testing.assert_array_equal(found[name], expected[name])
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def complete_steps(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_a_signal_to_one_stops_both_after_the_same_step(tmp_path, whole):
    both = start_both(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), both[0])
    both[1].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in both]
    assert [code for code, _, _ in ended] == [75, 75], ended
    stopped = {
        re.search(r"stopped by SIGTERM after step (\d+)", out).group(1) for _, out, _ in ended
    }
    (last,) = map(int, stopped)
    assert last < STEPS
    assert complete_steps(tmp_path)[-1] == last
    assert run_to_the_end(tmp_path) == last
    assert_ended_as(whole, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_and_the_run_continues(tmp_path, whole, victim):
    """And where the last checkpoint is damaged too, one of them sets it aside for both."""
    both = start_both(tmp_path, heartbeat_s=10)
    wait_for(lambda: len(complete_steps(tmp_path)) == 2, both[0])
    began = time.monotonic()
    both[victim].kill()
    both[victim].communicate()
    code, _, errors = finish(both[1 - victim])
    print(f"process {1 - victim} ended with {code} after {time.monotonic() - began:.1f} s")
    assert code != 0, errors
    *_, before, latest = complete_steps(tmp_path)
    files = (tmp_path / "checkpoints" / str(latest)).rglob("*/d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert run_to_the_end(tmp_path) == before
    assert (tmp_path / "checkpoints" / f"unreadable-{latest}").exists()
    assert_ended_as(whole, tmp_path)
