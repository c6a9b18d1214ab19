"""A whole distillation by two processes of four devices, started as users start it."""

import os
import socket
import subprocess
import sys

import numpy as np

from minilm_jax.convert.folder import read_model
from minilm_jax.convert.model import flatten
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource

EXPERIMENT = """
from pathlib import Path
from minilm_jax.data.batches import BatchConfig
from minilm_jax.distill.objectives import minilm
from minilm_jax.distill.student import StudentConfig
from minilm_jax.jobs.distill_config import DistillConfig, TeacherConfig, TextConfig
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = DistillConfig(
    output=Path("OUTPUT"),
    teacher=TeacherConfig(source="TEACHER"),
    student=StudentConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=4),
    text=TextConfig(corpora=(Path("CORPUS"),)),
    objective=minilm(),
    batch=BatchConfig(batch_size=8, sequence_length=32),
    optimizer=OptimizerConfig(name="sgd", learning_rate=0.1, warmup_steps=2),
    train=TrainConfig(steps=20, log_every=5, save_every=10),
)
"""


def start(experiment, output, *, devices, options=()):
    command = [sys.executable, "-m", "minilm_jax", "distill", str(experiment)]
    return subprocess.Popen(
        [*command, "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    )


def test_two_processes_train_the_student_of_one(tmp_path, tiny_teacher, text_file):
    prepare(
        TextSource(paths=(str(text_file),)),
        tokenizer=tiny_teacher,
        output=tmp_path / "corpus",
        holdout_fraction=0.2,
    )
    experiment = tmp_path / "experiment.py"
    text = EXPERIMENT.replace("TEACHER", str(tiny_teacher))
    experiment.write_text(text.replace("CORPUS", str(tmp_path / "corpus")))
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    hosts = ["--train.hosts.start", "explicit", "--train.hosts.processes", "2"]
    hosts += ["--train.hosts.coordinator", f"127.0.0.1:{port}", "--train.hosts.process"]
    started = [start(experiment, tmp_path / "one", devices=8)]
    started += [
        start(experiment, tmp_path / "two", devices=4, options=[*hosts, str(process)])
        for process in (0, 1)
    ]
    said = []
    for process in started:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        said.append(out)
    assert said[1].startswith("process 0 of 2: waiting for the others\nprocess 0 of 2 on ")
    assert "student  " in said[1]
    # The second one says which it is and leaves the rest to the first. Gloo's threads write to the
    # same stream and break each other's lines, so this looks for words rather than lines.
    assert said[2].count("process 1 of 2") == 2
    assert not [word for word in ("student  ", "loss", "held-out") if word in said[2]]
    expected, found = (
        flatten(read_model(str(tmp_path / name / "student")).params) for name in ("one", "two")
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A key's bias moves all logits of a row alike: its gradient is rounding, nothing else.
        limit = 1e-9 if name.endswith("key/bias") else 1e-6 * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=limit, err_msg=name)
    one, two = ((tmp_path / name / "config.json").read_text() for name in ("one", "two"))
    assert one == two
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["10", "20"]
    # A folder that only one of them sees would have the others wait for its checkpoints.
    apart = [
        start(experiment, tmp_path / f"apart{process}", devices=4, options=[*hosts, str(process)])
        for process in (0, 1)
    ]
    for process in apart:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "process 1 on" in errors and "--output must lie on storage" in errors
    assert not (tmp_path / "apart0" / ".seen-by-all").exists()
    # What one of them refuses for all, both say, and neither waits for the other.
    refused = [
        start(
            experiment,
            tmp_path / "two",
            devices=4,
            options=["--train.seed", "1", *hosts, str(process)],
        )
        for process in (0, 1)
    ]
    for process in refused:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "is finished, with other settings" in errors
        assert "train.seed: 0 -> 1" in errors
