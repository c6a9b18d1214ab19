import threading
import time
import traceback
import types

import pytest

from minilm_jax.data import prefetch
from minilm_jax.data.prefetch import Prefetch
from minilm_jax.errors import DataError


def square(step):
    return step * step


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_the_order_does_not_depend_on_the_workers(workers):
    def make(step):
        time.sleep(0.002 * (step % 3))
        return step

    with Prefetch(make, start=5, stop=25, workers=workers, ahead=3) as batches:
        assert list(batches) == list(range(5, 25))


def test_no_more_is_made_than_may_wait():
    made = []
    with Prefetch(made.append, workers=2, ahead=3) as batches:
        for _ in range(4):
            next(batches)
        time.sleep(0.05)
    assert len(made) <= 4 + 3


def test_no_wake_up_is_lost_on_a_consumer_that_dawdles(monkeypatch):
    """It does so right after it has taken a batch, when a worker looks whether there is room."""
    real = time.monotonic

    def dawdling():
        time.sleep(0.01)
        return real()

    monkeypatch.setattr(prefetch, "time", types.SimpleNamespace(monotonic=dawdling))
    with Prefetch(square, stop=4, ahead=1, patience_s=0.5) as batches:
        assert list(batches) == [0, 1, 4, 9]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_at_its_step_with_its_traceback(workers):
    def broken_reader(step):
        if step == 3:
            raise OSError("disk gone")
        return step

    with Prefetch(broken_reader, workers=workers) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="disk gone") as caught:
            next(batches)
    assert "broken_reader" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_a_worker_that_hangs_is_noticed():
    release = threading.Event()
    with Prefetch(lambda step: release.wait(), patience_s=0.2) as batches:
        with pytest.raises(DataError, match=r"step 0: no batch for 0\.2 s"):
            next(batches)
        release.set()


def test_a_worker_that_dies_is_noticed(monkeypatch):
    monkeypatch.setattr(Prefetch, "_work", lambda self: None)
    with Prefetch(square) as batches, pytest.raises(DataError, match="died"):
        next(batches)


def test_waiting_is_measured_and_overlaps_with_work():
    def slow(step):
        time.sleep(0.02)
        return step

    with Prefetch(slow, stop=5, workers=0) as batches:
        list(batches)
    assert batches.data_wait_s >= 0.1
    with Prefetch(slow, stop=5, workers=1, ahead=2) as batches:
        for _ in batches:
            time.sleep(0.04)
    assert batches.data_wait_s < 0.08


def test_closing_leaves_no_thread():
    before = threading.active_count()
    batches = Prefetch(square, workers=3)
    next(batches)
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)
