"""Two processes on loopback: the numbers of one, and a sentence where one is missing."""

import jax
import numpy as np
import optax
import pytest
from processes import HERE, free_port, start
from ragged_problem import make_problem, ragged_loss

from minilm_jax.errors import ConfigError, UserError
from minilm_jax.train.devices import Devices
from minilm_jax.train.hosts import HostsConfig, any_process, join, writes
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_given, make_step


@pytest.mark.parametrize("lift,fsdp", [("pmap", 1), ("mesh", 2)])
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path, lift, fsdp):
    """20 steps of SGD with dropout on ragged rows; each process sees its own rows only."""
    port, target = free_port(), tmp_path / "found.npz"
    both = [start(HERE / "two_processes.py", i, port, lift, fsdp, target) for i in (0, 1)]
    for number, process in enumerate(both):
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert out.startswith(f"process {number} of 2")
        assert "4 of 8 devices" in out
    params, frozen, batches = make_problem(steps=20)
    devices, optimizer = Devices(lift, fsdp=fsdp), optax.sgd(0.01)
    step = devices.lift_step(make_step(ragged_loss, optimizer))
    state = devices.place(create_state(params, optimizer))
    given = devices.place(make_given(frozen, seed=3))
    for batch in batches:
        state, metrics = step(state, given, devices.place_batch(batch))
    expected = np.asarray(state.params["kernel"])
    found = np.load(target)
    np.testing.assert_allclose(
        found["kernel"], expected, rtol=0, atol=1e-6 * np.abs(expected).max()
    )
    np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)


@pytest.mark.parametrize("process", [0, 1])
def test_an_incomplete_start_ends_with_a_sentence(process):
    code = (
        "from minilm_jax.train.hosts import *\n"
        f"join(HostsConfig(start='explicit', coordinator='127.0.0.1:{free_port()}',"
        f" processes=2, process={process}, patience_s=2))"
    )
    alone = start("-c", code)
    out, errors = alone.communicate(timeout=60)
    assert alone.returncode == 2
    assert out.startswith(f"process {process} of 2: waiting")
    assert "did not find each other within 2 s: start the same command on every host" in errors
    assert "stack trace" not in errors


def test_one_process_says_so_and_writes():
    said = []
    join(HostsConfig(), say=said.append)
    assert not said  # a run of one has nobody to be told apart from
    assert writes()
    assert any_process(True)
    assert not any_process(False)
    assert Devices("pmap", devices=jax.devices()).rows(32) == slice(0, 32)
    with pytest.raises(UserError, match="2 processes were expected and 1 came"):
        join(HostsConfig(processes=2), say=said.append)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"start": "explicit", "processes": 2}, "needs hosts.coordinator and hosts.process"),
        ({"processes": 2, "process": 2}, "hosts.process must be from 0 to 1"),
        ({"patience_s": 0}, "patience_s"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        HostsConfig(**settings)


def test_a_coordinator_without_a_port_is_refused():
    config = HostsConfig(start="explicit", coordinator="head", processes=2, process=0)
    with pytest.raises(ConfigError, match="host:port"):
        join(config, say=lambda _: None)
