"""The line a person reads, and the files: metrics by step, speed by start."""

import io
import json
from types import SimpleNamespace

import jax
import pytest

from minilm_jax.train.hardware import known_chip, peak_flops, peak_memory
from minilm_jax.train.monitor import Interval, Monitor, decimal, plot_loss

METRICS = {
    "loss": 0.21349,
    "qk": 0.11023,
    "vv": 0.10326,
    "qk_heads": [0.1, 0.2],
    "grad_norm": 0.4123,
    "learning_rate": 2.9e-4,
}


def device(kind, peak=None):
    statistics = None if peak is None else {"peak_bytes_in_use": peak}
    return SimpleNamespace(
        device_kind=kind, process_index=jax.process_index(), memory_stats=lambda: statistics
    )


def logged(tmp_path, *, metrics=METRICS, devices=(), **figures):
    stream = io.StringIO()
    monitor = Monitor(
        tmp_path / "metrics.jsonl", steps=2000, first_step=300, devices=devices, stream=stream
    )
    counts = {"tokens": 6e7, "documents": 5e5}
    figures = {"steps": 100, "counts": counts, "seconds": 50.0, "waited": 0.0, "flops": 0} | figures
    monitor.log(400, metrics, Interval(**figures))
    monitor.close()
    return stream.getvalue()


def test_the_line_of_an_interval(tmp_path):
    chips = [device("TPU v4", peak=1 << 30), device("TPU v4", peak=2 << 30)]
    line = logged(tmp_path, devices=chips, flops=round(0.4 * 2 * 275e12 * 50), waited=5.0)
    assert line == (
        "resumed after step 300 of 2,000\n"
        "step 400/2000  loss 0.2135 (qk 0.110 vv 0.103)  lr 0.00029  grad 0.41  1.2M tok/s  "
        "10k doc/s  220TFLOP/s 40% MFU  2.0 GiB  10% waiting for data  13:20 left\n"
    )


def test_what_is_not_known_is_left_out(tmp_path):
    line = logged(tmp_path, devices=[device("Abacus")], flops=10**12)
    assert "20GFLOP/s  13:20 left" in line
    assert "MFU" not in line
    assert "GiB" not in line
    assert "waiting" not in line


def test_many_terms_do_not_fill_the_terminal(tmp_path):
    many = {f"qk_{layer}": 0.1 for layer in range(24)}
    assert "qk_5 0.100 …)" in logged(tmp_path, metrics={"loss": 2.4, **many})


def test_a_name_may_have_brackets(tmp_path):
    line = logged(tmp_path, metrics={"loss": 2.4, "hidden[last]": 0.1, "x[/last]": 0.2})
    assert "(hidden[last] 0.100 x[/last] 0.200)" in line


def test_a_step_that_was_compiled_says_nothing_about_speed(tmp_path):
    line = logged(tmp_path, steps=0, counts={}, seconds=0.0)
    assert line.endswith("lr 0.00029  grad 0.41\n")
    assert (tmp_path / "speed.jsonl").read_text() == ""


def test_speed_is_no_part_of_the_metrics(tmp_path):
    """Metrics are functions of the run; how fast a start was is added by every start."""
    for seconds in (50.0, 25.0):
        logged(tmp_path, seconds=seconds)
    (row,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row == {"step": 400, **METRICS}
    speed = [json.loads(x) for x in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert [row["tokens_per_second"] for row in speed] == [1.2e6, 2.4e6]


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', "[]", "{}", "\0\0"])
def test_a_damaged_line_costs_its_own_row_alone(damage, tmp_path, caplog):
    metrics = tmp_path / "metrics.jsonl"
    rows = [f'{{"step": {step}, "loss": 0.5}}' for step in range(1, 5)]
    rows[1] = damage
    metrics.write_text("\n".join([*rows, '{"step": 5, "lo']))
    assert plot_loss(metrics, tmp_path / "loss.png")
    caplog.clear()
    Monitor(metrics, steps=9, first_step=4, stream=io.StringIO()).close()
    assert metrics.read_text().splitlines() == [rows[0], *rows[2:]]
    (warning,) = caplog.messages  # of the half line of a crash nothing is said
    assert "metrics.jsonl: skipped unreadable lines: 2" in warning
    Monitor(metrics, steps=9, first_step=3, stream=io.StringIO()).close()
    assert metrics.read_text().splitlines() == [rows[0], rows[2]]


@pytest.mark.parametrize(
    "kind,flops",
    [
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_the_peak_of_known_devices(kind, flops):
    assert known_chip(device(kind)).flops == flops
    assert peak_flops([device(kind)] * 4) == 4 * flops
    assert peak_flops([device(kind), device("Abacus")]) is None


def test_memory_is_that_of_the_fullest_device():
    assert peak_memory([device("x", peak=5), device("x", peak=7)]) == 7
    assert peak_memory([device("x")]) is None
    assert peak_memory(jax.devices()) is None  # a CPU keeps no statistics


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.0000"),
        (0.78468, "0.7847"),
        (0.001, "0.0010"),
        (0.00032, "3.2e-04"),
        (-3e-9, "-3.0e-09"),
    ],
)
def test_a_small_loss_is_no_zero(value, shown):
    assert decimal(value, 4) == shown
