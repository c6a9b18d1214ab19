"""Where the time went: laps, several starts, work that a kill made worthless."""

import json

import pytest

from minilm_jax.train import goodput
from minilm_jax.train.goodput import Goodput, duration


class Clock:
    """Both clocks of the time module, moved by hand."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    time = monotonic

    def after(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def start(path, clock, *, first, last, each):
    """A start that computes from `first` to `last` and records there."""
    watch = Goodput(path)
    watch.begin(first)
    clock.after(5)
    watch.lap("startup")
    for _ in range(first, last):
        clock.after(0.5)
        watch.lap("data")
        clock.after(each)
        watch.lap("training")
    watch.record(last)
    return watch


def test_laps_add_up_to_the_time_that_passed(clock):
    watch = start(None, clock, first=0, last=4, each=2.0)
    account = watch.account()
    assert account.seconds == {"startup": 5.0, "data": 2.0, "training": 8.0}
    assert watch.interval() == account.seconds
    assert not watch.interval()
    assert str(account) == (
        "0:15: training 53.3%, start-up and compiling 33.3%, waiting for data 13.3%"
    )


def test_steps_that_a_later_start_does_again_are_no_progress(tmp_path, clock):
    path = tmp_path / "goodput.json"
    start(path, clock, first=0, last=10, each=2.0)
    clock.after(100)
    # Killed after step 10 with step 6 saved: four of ten steps were for nothing.
    account = start(path, clock, first=6, last=12, each=2.0).account()
    assert account.starts == 2
    assert account.seconds == pytest.approx(
        {"startup": 10, "training": 12 + 12, "data": 3 + 3, "recomputed": 10}
    )
    assert account.between_starts == 100
    assert "steps done twice 20.0%" in str(account)
    assert "2 starts" in str(account)
    assert "1:40 between starts" in str(account)


def test_a_restart_far_back_loses_all_of_the_starts_between(tmp_path, clock):
    path = tmp_path / "goodput.json"
    start(path, clock, first=0, last=4, each=1.5)
    start(path, clock, first=4, last=8, each=1.5)
    account = start(path, clock, first=2, last=8, each=1.5).account()
    assert account.seconds["recomputed"] == pytest.approx(2 * 2 + 4 * 2)
    assert account.seconds["training"] == pytest.approx((2 + 6) * 1.5)


@pytest.mark.parametrize("said", ['{"starts": [{"beg', "{}", "[]", '{"starts": 3}'])
def test_an_unreadable_account_is_begun_anew(said, tmp_path, clock):
    path = tmp_path / "goodput.json"
    path.write_text(said)
    assert start(path, clock, first=0, last=1, each=1.0).account().starts == 1
    assert len(json.loads(path.read_text())["starts"]) == 1


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (59.6, "1:00"),
        (7384.0, "2:03:04"),
        (71 * 3600.0, "71:00:00"),
        (100 * 3600.0, "4.17 days"),
        (2.4e8, "7.6 years"),
    ],
)
def test_a_duration_is_in_the_unit_that_is_read(seconds, said):
    assert duration(seconds) == said
