"""A whole fine-tuning by two processes of two devices, started as users start it."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from official_files import write_glue
from tiny_models import write_tiny

from minilm_jax.convert.folder import read_model
from minilm_jax.convert.model import flatten

EXPERIMENT = """
from pathlib import Path
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="rte",
    model="MODEL",
    data=TaskData(folder=Path("DATA")),
    output=Path("OUTPUT"),
    name="the same",
    lengths=LengthConfig(max_length=64, max_query_length=24, doc_stride=16),
    batch=RowConfig(batch_size=8, bucket=64),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, warmup_steps=0),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2, keep_models="all"),
    train=EngineConfig(log_every=1),
)
"""


def start(experiment, output, *, devices, options=()):
    command = [sys.executable, "-m", "minilm_jax", "finetune", str(experiment)]
    return subprocess.Popen(
        [*command, "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )


@pytest.mark.parametrize("lift", ["pmap", pytest.param("mesh", marks=pytest.mark.slow)])
def test_two_processes_fine_tune_the_model_of_one(tmp_path, lift):
    """Sharded over both processes, too; one of them writes."""
    write_glue(tmp_path / "glue")
    write_tiny(tmp_path / "bert")
    experiment = tmp_path / "experiment.py"
    text = EXPERIMENT.replace("MODEL", str(tmp_path / "bert"))
    experiment.write_text(text.replace("DATA", str(tmp_path / "glue")))
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    options = ["--train.lift", "mesh", "--train.fsdp", "4"] if lift == "mesh" else []
    hosts = [*options, "--train.hosts.start", "explicit", "--train.hosts.processes", "2"]
    hosts += ["--train.hosts.coordinator", f"127.0.0.1:{port}", "--train.hosts.process"]
    started = [start(experiment, tmp_path / "one", devices=4)]
    started += [
        start(experiment, tmp_path / "two", devices=2, options=[*hosts, str(process)])
        for process in (0, 1)
    ]
    said = []
    for process in started:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        said.append(out)
    assert "best at step" in said[1]
    assert not [word for word in ("best", "tables", "accuracy") if word in said[2]]
    for folder in ("step-2", "step-4", "best"):
        expected, found = (
            flatten(read_model(str(tmp_path / name / folder)).params) for name in ("one", "two")
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # A key's bias moves all logits of a row alike: its gradient is rounding.
            limit = 1e-7 if name.endswith("key/bias") else 1e-5 * np.abs(value).max()
            np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=name)
    for name in ("result.json", "evaluations.json"):
        one, two = (json.loads((tmp_path / path / name).read_text()) for path in ("one", "two"))
        if name == "result.json":
            one.pop("model"), two.pop("model")
        assert one == two
    one, two = (
        {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).glob("*/*")}
        for name in ("one", "two")
    )
    assert one == two
    # What one of them misses, both say, and neither waits for the other.
    (tmp_path / "empty").mkdir()
    refused = [
        start(
            experiment,
            tmp_path / "three",
            devices=2,
            options=[*hosts, str(process), *(["--data.folder", missing] if process else [])],
        )
        for process, missing in ((0, ""), (1, str(tmp_path / "empty")))
    ]
    for process in refused:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert str(tmp_path / "empty") in errors
