"""Trackers: what they are told, and that no failure of theirs reaches the run."""

import importlib.machinery
import sys
import threading
import types

import pytest

from minilm_jax.errors import ConfigError
from minilm_jax.train.trackers import Tracker, check_trackers, open_trackers


class Service:
    """One that fails where it is told to."""

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []
        self._call("connect")

    def _call(self, name, *arguments):
        self.calls.append((name, *arguments))
        if self.fails == name:
            raise RuntimeError("503\nService Unavailable")

    def log(self, step, values):
        self._call("log", step, values)

    def close(self):
        self._call("close")


def test_a_service_gets_every_step_and_its_end():
    made = []
    tracker = Tracker("fake", lambda: made.append(Service()) or made[0])
    tracker.log(1, {"loss": 0.5, "qk_heads": [0.1, 0.2]})
    tracker.log(2, {"loss": 0.4})
    tracker.close()
    assert made[0].calls == [
        ("connect",),
        ("log", 1, {"loss": 0.5, "qk_heads/0": 0.1, "qk_heads/1": 0.2}),
        ("log", 2, {"loss": 0.4}),
        ("close",),
    ]


@pytest.mark.parametrize("fails", ["connect", "log", "close"])
def test_a_failure_is_one_warning(fails, caplog):
    tracker = Tracker("fake", lambda: Service(fails))
    for step in range(5):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    (record,) = caplog.records
    assert record.getMessage() == (
        "fake stopped showing this run (RuntimeError: 503); training goes on"
    )


@pytest.mark.parametrize("hangs", ["connect", "log", "close"])
def test_one_that_hangs_is_left_behind(hangs, caplog):
    released = threading.Event()

    class Hanging(Service):
        def _call(self, name, *arguments):
            if name == hangs:
                released.wait(60)

    tracker = Tracker("fake", Hanging, patience_s=0.2)
    for step in range(1100):  # more than wait in line
        tracker.log(step, {"loss": 0.5})
        if hangs == "close" and step == 3:
            break
    tracker.close()
    released.set()
    assert len(caplog.records) == 1
    assert ("behind" if hangs != "close" else "within 0.2 s") in caplog.text


def test_what_is_asked_for_and_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'minilm_jax\[wandb\]'"):
        check_trackers(["wandb"])
    check_trackers([])


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that remembers what it was told."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.started, module.logged = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: module.logged.append((step, values)), finish=lambda: None
    )
    module.init = lambda **settings: module.started.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_the_next_start_continues_the_same_run_of_weights_and_biases(wandb, tmp_path):
    check_trackers(["wandb"])
    for first in (0, 5):
        (tracker,) = open_trackers(["wandb"], tmp_path, config={"seed": 1}, first_step=first)
        tracker.log(first + 1, {"loss": 0.5})
        tracker.close()
    assert wandb.logged == [(1, {"loss": 0.5}), (6, {"loss": 0.5})]
    first, second = wandb.started
    assert first == second
    assert first["config"] == {"seed": 1}
    assert first["resume"] == "allow"


def test_tensorboard_reads_what_was_logged(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    (tracker,) = open_trackers(["tensorboard"], tmp_path, config={}, first_step=0)
    tracker.log(3, {"loss": 0.25})
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), []
    while content:
        # A record: length (8), its checksum (4), the event, its checksum (4).
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        content = content[16 + size :]
    assert found == [(3, "loss", 0.25)]
