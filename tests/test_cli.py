"""The command line: one clear sentence and status 2 for whatever a user gets wrong."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minilm_jax import __version__, cli
from minilm_jax.jobs import convert
from minilm_jax.signals import Stopped

EXPERIMENT = "experiments/quickstart.py"
CHAIN = "experiments/minilm_v1/bert_base_6x384_assistant.py"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["distil"], "did you mean 'distill'?"),
        (["distill"], "needs an experiment file"),
        (["distill", "experiments/quickstrat.py"], "did you mean 'experiments/quickstart.py'?"),
        (["distill", f"{EXPERIMENT}:confg"], "did you mean 'config'?"),
        (["distill", EXPERIMENT, "--teacher.source", "./missing"], "./missing does not exist"),
        (["distill", EXPERIMENT, "--student.num-attention-heads", "6"], "12 attention heads"),
        (
            ["distill", EXPERIMENT, "--batch.sequence-length", "2"],
            "sequence_length must be at least 3, got 2",
        ),
        (["distill", EXPERIMENT, "--text.corpora=c", "--text.source.paths=t"], "exactly one of"),
    ],
)
def test_a_mistake_gets_a_sentence_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("minilm-jax: ")
    assert "Traceback" not in error


def test_an_unknown_option_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", EXPERIMENT, "--train.stesp", "3"])
    assert stop.value.code == 2
    assert "--train.steps" in capsys.readouterr().err


def test_text_of_the_other_kind_takes_the_place_of_the_experiments():
    """Raw text for prepared corpora and the reverse, in one run, in a chain, in a plan."""
    _, config = cli.parse("distill", [EXPERIMENT, "--text.corpora", "a", "b"])
    assert config.text.source is None
    assert config.text.corpora == (Path("a"), Path("b"))
    _, plan = cli.parse("plan", [EXPERIMENT, "--text.corpora=a"])
    assert plan.run.text.source is None
    _, chain = cli.parse("distill", [CHAIN, "--student.text.source.paths", "my text"])
    assert chain.student.text.source.paths == ("my text",)
    assert not chain.student.text.corpora
    assert chain.assistant.text.corpora


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"text\tlabel\na good film\tpos\n", ", line 1, is not Python (invalid syntax"),
        (b"config = (\n", ", line 1, is not Python ("),
        (b"\0\0", " is not Python (source code string"),
    ],
    ids=["a table", "a bracket left open", "bytes"],
)
def test_what_is_no_experiment_is_said_to_be_none(content, said, tmp_path, capsys):
    file = tmp_path / "train.tsv"
    file.write_bytes(content)
    assert cli.main(["finetune", str(file)]) == 2
    assert f"experiment {file}{said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            "from minilm_jax.train.config import TrainConfig\n\nconfig = TrainConfig(stepz=3)\n",
            r", line 3: TypeError: .*'stepz'",
        ),
        ("import not_there\n", ", line 1: ModuleNotFoundError: No module named 'not_there'"),
        ("def f():\n    return 1 / 0\n\nconfig = f()\n", ", line 2: ZeroDivisionError: division"),
        ("import helper_of_mine\n", r", line 1: SyntaxError: invalid syntax \(helper_of_mine.py"),
    ],
    ids=["a field that is none", "a module that is none", "in its function", "what it imports"],
)
def test_an_experiment_that_fails_is_one_sentence_with_its_line(
    lines, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helper_of_mine.py").write_text("config = = 3\n")
    experiment = tmp_path / "mine.py"
    experiment.write_text(lines)
    assert cli.main(["distill", str(experiment)]) == 2
    err = capsys.readouterr().err
    assert re.search(re.escape(f"experiment {experiment}") + said, err)
    assert err.count("\n") == 1
    assert f"`python {experiment}` shows the traceback" in err


def test_an_experiment_can_import_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_mine.py").write_text("STEPS = 3\n")
    experiment = tmp_path / "mine.py"
    experiment.write_text("from beside_mine import STEPS\n\nconfig = STEPS\n")
    assert cli.load_experiment(str(experiment)) == cli.load_experiment(experiment) == 3


OWN = """from __future__ import annotations
import dataclasses
from minilm_jax.cli import load_experiment
from minilm_jax.distill.objective import Objective

@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Objective):
    weight: float = 1.0
    \"""How much it weighs.\"""

config = dataclasses.replace(load_experiment("{quickstart}"), objective=Own())
"""


@pytest.mark.parametrize(
    "option,shown,status", [("--help", "weighs. (default", 0), ("--objective.wait=3", "meant", 2)]
)
def test_an_objective_of_the_experiments_own_has_its_options_in_the_help(
    option, shown, status, tmp_path, capsys
):
    file = tmp_path / "own.py"
    file.write_text(OWN.replace("{quickstart}", EXPERIMENT))
    with pytest.raises(SystemExit) as ended:
        cli.parse("distill", [str(file), option])
    assert ended.value.code == status
    printed = capsys.readouterr()
    assert "--objective.weight FLOAT" in printed.out + printed.err
    assert shown in printed.out + printed.err


def test_an_experiment_of_another_kind_is_refused(tmp_path, capsys):
    experiment = tmp_path / "other.py"
    experiment.write_text("config = {'a': 1}\n")
    assert cli.main(["distill", str(experiment)]) == 2
    assert "gives a dict" in capsys.readouterr().err
    others = str(Path(EXPERIMENT).parent / "finetune/glue.py")
    for command in ("distill", "plan"):
        assert cli.main([command, others]) == 2
        said = capsys.readouterr().err
        assert "gives a FinetuneConfig, not a DistillConfig" in said
        assert said.endswith("; it is for minilm-jax finetune\n")
    assert cli.main(["transmogrify"]) == 2
    assert "'transmogrify'; there are distill, finetune, evaluate, " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["distill", "finetune", "plan"])
def test_help_without_an_experiment_shows_the_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"minilm-jax {command} EXPERIMENT" in said
    assert "--train.accumulate" in said


def test_help_is_instant_because_nothing_heavy_is_imported():
    began = time.monotonic()
    code = (
        "import sys; from minilm_jax import cli; cli.main(['--help']); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "distill EXPERIMENT" in done.stdout
    assert done.stdout.endswith("False\n")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("signum,status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_stopped_run_has_a_status_of_its_own(monkeypatch, capsys, signum, status):
    def stop(config):
        raise Stopped("stopped after step 3, which is saved", signum)

    monkeypatch.setattr(convert, "run", stop)
    assert cli.main(["convert", "source", "target"]) == status
    assert capsys.readouterr().err == "minilm-jax: stopped after step 3, which is saved\n"


def test_a_job_cut_short_because_nobody_reads_it_is_not_done(monkeypatch):
    def unread(config):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(convert, "run", unread)
    assert cli.main(["convert", "source", "target"]) == 141


def test_a_full_disk_is_told_in_a_sentence(monkeypatch, capsys):
    def fill(config):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(convert, "run", fill)
    assert cli.main(["convert", "source", "target"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minilm-jax: metrics.jsonl: No space left on device; repair the disk")


def test_a_file_that_may_not_be_read_is_told_in_a_sentence(monkeypatch, capsys):
    def refuse(config):
        raise PermissionError(errno.EACCES, "Permission denied", "dev.tsv")

    monkeypatch.setattr(convert, "run", refuse)
    assert cli.main(["convert", "source", "target"]) == 2
    assert capsys.readouterr().err == "minilm-jax: dev.tsv: Permission denied\n"


def test_a_terminal_without_unicode_is_written_to_all_the_same():
    said = subprocess.run(
        [sys.executable, "-m", "minilm_jax", "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert said.returncode == 0
    assert b"usage: minilm-jax COMMAND ?" in said.stdout


def test_a_command_can_be_given_from_a_thread(tmp_path, capsys):
    status = []
    arguments = ["inspect", str(tmp_path / "none")]
    thread = threading.Thread(target=lambda: status.append(cli.main(arguments)))
    thread.start()
    thread.join()
    assert status == [2] and "does not exist" in capsys.readouterr().err


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_compiled_programs_are_kept_where_they_can_be(monkeypatch, tmp_path, capsys):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    kept, locked = tmp_path / "new" / "cache", tmp_path / "locked"
    locked.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and access(path, mode))
    for cache, expected in (("", None), (kept, f"{kept}/minilm_jax/xla"), (locked, None)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        assert cli.main(["distil"]) == 2
        assert "did you mean 'distill'" in capsys.readouterr().err
        assert os.environ.get("JAX_COMPILATION_CACHE_DIR") == expected


@pytest.mark.parametrize("name", ["distill", "finetune", "plan"])
def test_help_without_an_experiment_says_that_there_is_more(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert f"minilm-jax {name} FILE --help shows" in capsys.readouterr().out
