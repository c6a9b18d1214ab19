"""The whole path on small official files: files, features, training, predictions, metric, table."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from official_files import write_glue, write_mlqa, write_squad, write_tsv, write_xnli
from tiny_models import write_tiny

from minilm_jax.convert.folder import read_model
from minilm_jax.convert.model import Model
from minilm_jax.convert.sentence import Sentence
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.errors import CheckpointError, ConfigError, DataError
from minilm_jax.jobs import (
    evaluate,
    evaluator,
    finetune,
    finetune_inputs,
    finetune_model,
    running,
    trained_model,
)
from minilm_jax.jobs.evaluate import EvaluateConfig
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig, SweepConfig
from minilm_jax.jobs.sweep import sweep_runs
from minilm_jax.signals import Stopped
from minilm_jax.tasks import losses
from minilm_jax.tasks.answers import AnswerConfig, AnswerOptions
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TASKS, Part, TaskData
from minilm_jax.tasks.features import LengthConfig, LengthOptions
from minilm_jax.tasks.tables import read_rows
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.optimizer import OptimizerConfig
from minilm_jax.train.trackers import Tracker

LENGTHS = LengthConfig(max_length=64, max_query_length=24, doc_stride=16)
FAST = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.0)
STEADY = dataclasses.replace(FAST, warmup_steps=10)  # for what must learn, whatever dropout draws


def quiet(_):
    pass


@pytest.fixture(scope="module", autouse=True)
def shared_programs(tmp_path_factory):
    """Most runs here compile the same programs: the second one takes them from a cache."""
    names = (
        ("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs"))),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    )
    before = {name: getattr(jax.config, name) for name, _ in names}
    for name, value in names:
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    real = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: real[:2])
    return real


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official")
    write_glue(folder)
    write_xnli(folder)
    write_mlqa(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """Multilingual-MiniLM's layout: a BERT with XLM-R's tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("models") / "minilm", family="minilm")


@pytest.fixture(scope="module")
def xlmr(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "xlmr", family="xlm-roberta")


def make(task, model, data, output, *, steps=2, **changes):
    schedule = ScheduleConfig(max_steps=steps, evaluate_every=steps)
    return FinetuneConfig(
        **{
            "task": task,
            "model": str(model),
            "data": TaskData(folder=data) if not isinstance(data, TaskData) else data,
            "output": output,
            "lengths": LENGTHS,
            "batch": RowConfig(batch_size=8, bucket=64),
            "optimizer": FAST,
            "schedule": schedule,
            "train": EngineConfig(log_every=1),
            **changes,
        }
    )


SUBMISSIONS = {
    "cola": ("CoLA.tsv", "index\tprediction\n0\t{0,1}"),
    "sst2": ("SST-2.tsv", "index\tprediction\n0\t{0,1}"),
    "mrpc": ("MRPC.tsv", "index\tprediction\n0\t{0,1}"),
    "stsb": ("STS-B.tsv", "index\tprediction\n0\t"),
    "qqp": ("QQP.tsv", "index\tprediction\n0\t{0,1}"),
    "mnli": ("MNLI-m.tsv", "index\tprediction\n0\t{entailment,neutral,contradiction}"),
    "qnli": ("QNLI.tsv", "index\tprediction\n0\t{entailment,not_entailment}"),
    "rte": ("RTE.tsv", "index\tprediction\n0\t{entailment,not_entailment}"),
    "wnli": ("WNLI.tsv", "index\tprediction\n0\t{0,1}"),
}


@pytest.mark.parametrize(
    "task",
    [
        # One of each kind: no header, pairs, three classes and two dev sets, scores.
        pytest.param(
            task, marks=() if task in ("cola", "mrpc", "mnli", "stsb") else pytest.mark.slow
        )
        for task in SUBMISSIONS
    ],
)
def test_every_glue_task_from_files_to_table_and_submission(official, bert, tmp_path, task):
    result = finetune.run(make(task, bert, official, tmp_path / "run"), say=quiet)
    assert set(result.scores) == ({"dev-en", "dev-mm-en"} if task == "mnli" else {"dev-en"})
    assert tuple(result.scores["dev-en"]) == TASKS[task].metrics
    card = (tmp_path / "run/best/README.md").read_text()
    assert f"| task | {task}, " in card and f"| fine-tuned from | {bert} |" in card
    assert re.search(r"\| selected by \| \w+ -?[\d.]+ on dev-en \|", card)
    # The name of every class is in the exported config.
    stored = json.loads((tmp_path / "run/best/config.json").read_text())
    named = tuple(stored["id2label"][str(i)] for i in range(len(stored["id2label"])))
    assert named == (TASKS[task].labels or ("score",))
    rows = evaluate.run(
        EvaluateConfig(
            task=task,
            models=(str(tmp_path / "run"),),
            data=TaskData(folder=official),
            output=tmp_path / "scores",
            splits=("dev", "test", "test-mm", "ax") if task == "mnli" else ("dev", "test"),
            batch=RowConfig(batch_size=16, layout="padded"),
        ),
        say=quiet,
    )
    # Another batch size and layout: the same predictions and figures as during training.
    name = f"{task}-dev.tsv"
    before, after = (
        [line.split("\t")[1] for line in (tmp_path / folder / name).read_text().splitlines()[1:]]
        for folder in ("run/predictions", "scores/predictions/run")
    )
    if task == "stsb":
        assert list(map(float, after)) == pytest.approx(list(map(float, before)), abs=0.0011)
    else:
        assert after == before
        found = {row.metric: row.value for row in rows if row.split == "dev"}
        assert found == pytest.approx(result.scores["dev-en"])
    name, expected = SUBMISSIONS[task]
    text = (tmp_path / "scores/predictions/run" / name).read_text()
    head, _, choices = expected.partition("{")
    assert text.startswith(head) and text.count("\n") == 6
    if choices:
        assert {line.split("\t")[1] for line in text.splitlines()[1:]} <= set(
            choices.rstrip("}").split(",")
        )
    if task == "mnli":
        assert (tmp_path / "scores/predictions/run/AX.tsv").exists()
    table = (tmp_path / "scores/tables.md").read_text()
    assert f"| run | {task} | dev | en |" in table
    column = {"sst2": "SST-2", "mnli": "MNLI-m", "cola": "CoLA"}.get(task)
    if column:
        assert "| MiniLM-L12xH384 (published) | 81.7 | 85.7 | 93.0 |" in table


def test_a_task_that_can_be_learnt_is(official, bert, tmp_path):
    config = make("sst2", bert, official, tmp_path / "run", steps=120, optimizer=STEADY)
    schedule = dataclasses.replace(config.schedule, evaluate_every=40)
    result = finetune.run(dataclasses.replace(config, schedule=schedule), say=quiet)
    assert result.scores["dev-en"]["accuracy"] == 100.0
    records = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert [record["step"] for record in records] == [40, 80, 120]


@pytest.mark.parametrize("family", [pytest.param("minilm", marks=pytest.mark.slow), "xlmr"])
def test_xnli_selects_on_fifteen_languages_and_reports_the_test_sets(
    official, request, tmp_path, family
):
    model = request.getfixturevalue(family)
    config = make("xnli", model, official, tmp_path / "run", train_languages=("en", "de"))
    result = finetune.run(config, say=quiet)
    assert len(result.scores) == 15 and "test-ur" in result.scores
    (record,) = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert len(record["scores"]) == 15 and all(part.startswith("dev-") for part in record["scores"])
    joint = np.mean([scores["accuracy"] for scores in record["scores"].values()])
    assert result.selection == pytest.approx(joint)
    table = (tmp_path / "run/tables.md").read_text()
    assert "| XLM-R Base (published) | 74.5 | 84.6 | 78.4 |" in table
    (ours,) = [
        line for line in table.splitlines() if line.startswith("| run | ") and "xnli" not in line
    ]
    average = np.mean([scores["accuracy"] for scores in result.scores.values()])
    assert ours.split(" | ")[1] == f"{average:.1f}" and ours.count("|") == 18
    assert len((tmp_path / "run/predictions/test-ur.tsv").read_text().splitlines()) == 6


@pytest.mark.parametrize("task", ["squad1", "squad2"])
def test_squad_learns_its_own_questions(tmp_path, bert, task):
    data, version = write_squad(tmp_path / "squad"), {"squad1": "1.1", "squad2": "2.0"}[task]
    chosen = AnswerConfig(n_best=7, max_answer_length=12)
    config = make(task, bert, data, tmp_path / "run", steps=60, answers=chosen)
    result = finetune.run(config, say=quiet)
    scores = result.scores["dev-en"]
    assert scores["f1"] == scores["exact"] == 100.0
    folder = tmp_path / "run/predictions"
    predictions = json.loads((folder / f"{task}-dev-en-predictions.json").read_text())
    assert predictions["q1"] == "Denmark, Iceland and Norway"
    assert len(json.loads((folder / f"{task}-dev-en-nbest.json").read_text())["q0"]) > 3
    if task == "squad2":
        assert predictions["qx"] == ""
        assert scores["best_f1"] == 100.0 and "no_answer_f1" in scores
        odds = json.loads((folder / "squad2-dev-en-no-answer-odds.json").read_text())
        assert odds["qx"] > 0 > odds["q0"]
    assert "| total |" not in (tmp_path / "run/tables.md").read_text()
    shown = evaluator.describe_scores({"f1": 1.0, "best_f1_threshold": -2.0, "total": 3.0})
    assert shown == "f1 1.0"
    # The model is scored as the run scored it, wherever it lies and whatever the task is called.
    copied = shutil.copytree(tmp_path / "run/best", tmp_path / "copied")
    for asked in (task, "questions"):
        again = EvaluateConfig(
            task=asked,
            models=(str(copied),),
            data=TaskData(folder=data)
            if asked == task
            else TaskData(dev=data / f"dev-v{version}.json"),
            output=tmp_path / asked,
            batch=RowConfig(batch_size=8, bucket=64),
        )
        (row, *_) = evaluate.run(again, say=quiet)
        settings = json.loads(row.settings)
        assert settings["lengths"] == dataclasses.asdict(LENGTHS)
        assert settings["answers"] == dataclasses.asdict(chosen)
    written = tmp_path / task / "predictions/copied" / f"{task}-dev-en-nbest.json"
    assert written.read_text() == (folder / f"{task}-dev-en-nbest.json").read_text()
    # Unless other settings are given, or the model does not say.
    given = {"lengths": LengthOptions(doc_stride=20), "answers": AnswerOptions(n_best=2)}
    (row, *_) = evaluate.run(dataclasses.replace(again, **given), say=quiet)
    settings = json.loads(row.settings)
    assert settings["lengths"] == dataclasses.asdict(LENGTHS) | {"doc_stride": 20}
    assert settings["answers"] == dataclasses.asdict(chosen) | {"n_best": 2}
    # Refused before any model is scored.
    gap = {"lengths": LengthOptions(doc_stride=60), "output": tmp_path / "none"}
    with pytest.raises(ConfigError, match=r"doc_stride=60 is longer than the window"):
        evaluate.run(dataclasses.replace(again, **gap), say=quiet)
    assert not (tmp_path / "none").exists()
    stored = json.loads((copied / "config.json").read_text())
    stored["task_specific_params"][task]["lengths"]["max_length"] = 0
    (copied / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"copied: task_specific_params of its config.json: len"):
        evaluate.run(again, say=quiet)
    for foreign in ([task], {task: [1]}, {task: {"lengths": 3, "answers": {"beams": 2}}}, None):
        stored["task_specific_params"] = foreign
        (copied / "config.json").write_text(json.dumps(stored))
        with pytest.raises(ConfigError, match=r"max_length=384 is longer than the model's 128"):
            evaluate.run(again, say=quiet)
    stored["finetuning_task"] = [task]
    (copied / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"max_length=384 is longer than the model's 128"):
        evaluate.run(again, say=quiet)


def test_mlqa_trains_on_squad_selects_on_english_and_reports_seven_languages(
    official, minilm, tmp_path
):
    result = finetune.run(make("mlqa", minilm, official, tmp_path / "run"), say=quiet)
    assert list(result.scores) == [f"test-{c}" for c in ("en", "es", "de", "ar", "hi", "vi", "zh")]
    (record,) = json.loads((tmp_path / "run/evaluations.json").read_text())
    assert list(record["scores"]) == ["dev-en"]
    rows = evaluate.run(
        EvaluateConfig(
            task="mlqa",
            models=(str(tmp_path / "run"),),
            data=TaskData(folder=official),
            output=tmp_path / "scores",
            name="ours",
            splits=("test",),
            pairs="all",
            batch=RowConfig(batch_size=8, bucket=64),
        ),
        say=quiet,
    )
    assert len(rows) == 49 * 2
    table = (tmp_path / "scores/tables.md").read_text()
    assert "| mMiniLM-L12xH384 (published) | 63.2/44.7 | 79.4/66.5 |" in table
    assert "## G-XLT of ours (MLQA test, F1)" in table
    names = {p.name for p in (tmp_path / "scores/predictions/ours").iterdir()}
    assert {"mlqa-test-zh-en-predictions.json", "mlqa-test-zh-predictions.json"} <= names


# The run


def test_selection_early_stopping_and_the_best_kept(official, bert, tmp_path, monkeypatch):
    config = make("sst2", bert, official, tmp_path / "run", steps=12)
    schedule = dataclasses.replace(config.schedule, evaluate_every=2, patience=2, keep_models="all")
    figures = iter([50.0, 70.0, 60.0, 65.0, 99.0])
    real = evaluator.Evaluator.score

    def scored(self, params, data):
        result = real(self, params, data)
        return dataclasses.replace(result, scores={"accuracy": next(figures)})

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "score", scored)
        result = finetune.run(
            dataclasses.replace(config, schedule=schedule, report="none"), say=quiet
        )
    # 60 and 65 are two evaluations without improvement on 70.
    assert (result.steps, result.best_step, result.selection) == (8, 4, 70.0)
    assert {p.name for p in (tmp_path / "run").glob("step-*")} == {
        "step-2", "step-4", "step-6", "step-8",
    }  # fmt: skip
    best, kept = (read_model(tmp_path / "run" / name) for name in ("best", "step-4"))
    assert best.fingerprint == kept.fingerprint
    assert best.fingerprint != read_model(tmp_path / "run/step-8").fingerprint
    config = EvaluateConfig(
        task="sst2",
        models=tuple(str(p) for p in sorted((tmp_path / "run").glob("step-*"))),
        data=TaskData(folder=official),
        output=tmp_path / "scores",
        batch=RowConfig(batch_size=8),
    )
    # One that would be refused is, before the first is scored.
    with pytest.raises(ConfigError, match=r"has no sequence classifier; fine-tune it on sst2"):
        evaluate.run(dataclasses.replace(config, models=(*config.models, str(bert))), say=quiet)
    assert not (tmp_path / "scores").exists()
    rows = evaluate.run(config, say=quiet)
    assert [row.name for row in rows] == ["step-2", "step-4", "step-6", "step-8"]
    # Another call into the same output: the table would show one model's figure as the other's.
    before = (tmp_path / "scores/predictions/step-2/sst2-dev.tsv").read_bytes()
    other = dataclasses.replace(config, models=config.models[-1:], name="step-2")
    with pytest.raises(ConfigError, match=r"step-2 'step-2' on sst2, so .*step-8 needs another"):
        evaluate.run(other, say=quiet)
    assert (tmp_path / "scores/predictions/step-2/sst2-dev.tsv").read_bytes() == before
    assert read_rows(tmp_path / "scores/results.csv") == rows


def test_models_are_named_by_what_tells_them_apart(tmp_path):
    config = EvaluateConfig(
        task="rte", models=("runs/a",), data=TaskData(folder=tmp_path), output=tmp_path
    )

    def names(*models, **changes):
        return evaluate.model_names(dataclasses.replace(config, models=models, **changes))

    assert names("runs/a") == ["a"] and names("runs/a", name="ours") == ["ours"]
    assert names("runs/a/student", "runs/b/student/") == ["a/student", "b/student"]
    assert names("p/a/x", "p/b/x", "q/b/x") == ["p/a/x", "p/b/x", "q/b/x"]
    for models, changes, message in [
        ((), {}, "give at least one"),
        (("runs/a", "./runs/a/"), {}, "holds a model twice"),
        (("a", "b"), {"name": "ours"}, "name=ours cannot name 2 models"),
    ]:
        with pytest.raises(ConfigError, match=message):
            names(*models, **changes)
    with pytest.raises(ConfigError, match="limit must be at least 0, got -1"):
        dataclasses.replace(config, limit=-1)


def test_a_run_cut_off_anywhere_ends_with_the_same_model(official, bert, tmp_path, monkeypatch):
    config = make("rte", bert, official, tmp_path / "whole", steps=6)
    config = dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, evaluate_every=3),
        train=dataclasses.replace(config.train, save_every=2),
    )
    whole = finetune.run(config, say=quiet)
    config = dataclasses.replace(config, output=tmp_path / "cut", name="whole")

    def cut(owner, name, at, how):
        real = getattr(owner, name)

        def called(self, *rest):
            if at is None or at == rest[0]:
                how()
            return real(self, *rest)

        patch.setattr(owner, name, called)

    def power_cut():
        raise RuntimeError("power cut")

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    for owner, name, at, how, message in [
        (
            finetune_inputs,
            "_training_examples",
            None,
            terminate,
            "by SIGTERM; run the same command",
        ),
        (finetune._Training, "_score", 3, terminate, "SIGTERM after step 3, which is saved"),
        (finetune._Training, "_batch", 4, terminate, "SIGTERM after step [456], which is saved"),
        (finetune._Training, "_score", 6, power_cut, "power cut"),
        (finetune._Training, "_score", 6, terminate, "SIGTERM after step 6, which is saved"),
        (finetune, "_report", None, terminate, "by SIGTERM; run the same command"),
    ]:
        with monkeypatch.context() as patch:
            cut(owner, name, at, how)
            with pytest.raises((Stopped, RuntimeError), match=message):
                finetune.run(config, say=quiet)
        assert signal.getsignal(signal.SIGTERM) is handler
    again = finetune.run(config, say=quiet)
    assert again.scores == whole.scores and again.best_step == whole.best_step
    models = [read_model(tmp_path / name / "best").fingerprint for name in ("whole", "cut")]
    assert models[0] == models[1]
    said = []
    assert finetune.run(config, say=said.append) == again
    assert "is finished (6 steps)" in said[0]
    moved = dataclasses.replace(config, output=config.output.rename(tmp_path / "moved"))
    assert finetune.run(moved, say=quiet).model == str(tmp_path / "moved" / "best")
    moved.output.rename(config.output)
    for name in ("result.json", "evaluations.json"):
        (tmp_path / "cut" / name).unlink()
    rest = finetune.run(config, say=quiet)
    assert (rest.best_step, rest.steps) == (6, 6)
    with pytest.raises(ConfigError, match=r"is finished, with other settings(.|\n)*learning_rate"):
        changed = dataclasses.replace(FAST, learning_rate=1e-5)
        finetune.run(dataclasses.replace(config, optimizer=changed), say=quiet)


def test_a_run_belongs_to_all_of_its_data(bert, tmp_path):
    """Else evaluations.json would hold figures of two dev sets, and choose between them."""
    rows = [("good film", "Like"), ("bad film", "Dislike")] * 4
    files = {
        split: write_tsv(tmp_path / f"{split}.tsv", ("text", "label"), *rows)
        for split in ("train", "dev", "test")
    }
    config = make("texts", bert, TaskData(**files), tmp_path / "run")
    result = finetune.run(config, say=quiet)
    for split, file in files.items():
        before = file.read_bytes()
        file.write_bytes(before + b"plain film\tLike\n")
        with pytest.raises(ConfigError, match=rf"fingerprints.data.{split}\S*: \"\w+\" -> "):
            finetune.run(config, say=quiet)
        file.write_bytes(before)
    assert finetune.run(config, say=quiet) == result
    # And to its model, wherever that lies: the same weights may be another model's.
    elsewhere = shutil.copytree(bert, tmp_path / "elsewhere")
    moved = dataclasses.replace(config, model=str(elsewhere))
    assert finetune.run(moved, say=quiet) == result
    vocabulary = elsewhere / "vocab.txt"
    words = vocabulary.read_text().splitlines()
    vocabulary.write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    with pytest.raises(ConfigError, match=r"fingerprints.tokenizer: "):
        finetune.run(moved, say=quiet)
    vocabulary.write_text("\n".join(words) + "\n")
    stored = json.loads((elsewhere / "config.json").read_text())
    (elsewhere / "config.json").write_text(json.dumps(stored | {"hidden_act": "relu"}))
    with pytest.raises(ConfigError, match=r"fingerprints.model_config: "):
        finetune.run(moved, say=quiet)


def test_examples_become_rows_once_and_those_of_a_finished_run_never(
    official, bert, tmp_path, monkeypatch
):
    tokenized = []
    for job in (evaluator, finetune_inputs):
        real = job.text_features

        def counted(examples, *rest, real=real, **options):
            tokenized.append(examples[0].origin.split("/")[-1])
            return real(examples, *rest, **options)

        monkeypatch.setattr(job, "text_features", counted)
    config = make("rte", bert, official, tmp_path / "run")  # its dev set selects and is reported
    result = finetune.run(config, say=quiet)
    assert tokenized == ["train.tsv:2", "dev.tsv:2"]
    assert finetune.run(config, say=quiet) == result
    assert tokenized == ["train.tsv:2", "dev.tsv:2"]
    # All runs of a sweep share them, and each is what it would be by itself.
    traced = []
    task_loss = losses.TaskModel.loss
    monkeypatch.setattr(
        losses.TaskModel, "loss", lambda *given: traced.append(given) or task_loss(*given)
    )
    several = SweepConfig(seeds=(config.train.seed + 1, config.train.seed))
    found = finetune.run(make("rte", bert, official, tmp_path / "sweep", sweep=several), say=quiet)
    assert tokenized == 2 * ["train.tsv:2", "dev.tsv:2"]
    assert (found[1].selection, found[1].scores) == (result.selection, result.scores)
    weights = [Path(r.model, "model.safetensors").read_bytes() for r in (result, *found)]
    assert weights[0] == weights[2] != weights[1]
    assert len(traced) == 1


def test_it_is_watched_as_any_training_is(official, bert, tmp_path, monkeypatch):
    """The devices too are a setting of the run that is no part of what it computes."""
    shown = []
    monkeypatch.setattr(running, "check_trackers", lambda names: shown.append(list(names)))
    monkeypatch.setattr(
        running,
        "open_trackers",
        lambda names, folder, *, config, first_step: (
            Tracker("shown", lambda: Shown(shown, first_step, config)),
        ),
    )
    config = make("rte", bert, official, tmp_path / "run", steps=4)
    config = dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, evaluate_every=2),
        train=EngineConfig(log_every=1, devices=1, trackers=("tensorboard",), profile=(2, 1)),
    )
    finetune.run(config, say=quiet)
    names, *rest = shown
    assert names == ["tensorboard"]
    assert [step for _, _, step in rest] == [1, 2, 3, 4]
    assert {first for first, _, _ in rest} == {0}  # one session, evaluations and all
    assert {described["task"] for _, described, _ in rest} == {"rte"}
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["train"]["log_every"] == 1
    assert not {"hosts", "devices", "trackers", "profile"} & stored["train"].keys()


class Shown:
    """A service that keeps (first step of the start, config, step)."""

    def __init__(self, shown, first_step, config):
        self.shown, self.of = shown, (first_step, config)

    def log(self, step, values):
        self.shown.append((*self.of, step))

    def close(self):
        pass


def test_a_sweep_keeps_close_learning_rates_apart(tmp_path):
    rates = (5e-5, 0.0012345678, 0.0012345679)
    sweep = SweepConfig(learning_rates=rates, seeds=(1, 2))
    runs = sweep_runs(make("cola", "model", tmp_path, tmp_path / "sweep", sweep=sweep))
    configs = [config for found in runs.values() for config in found]
    assert [config.optimizer.learning_rate for config in configs] == [
        r for r in rates for _ in "12"
    ]
    assert len({config.output for config in configs}) == 6
    assert len({config.name for config in configs}) == 3
    assert configs[0].output.name == "lr5e-05-epochs3-seed1"


@pytest.mark.slow
def test_a_sweep_gives_mean_and_deviation_and_the_best_setting(official, bert, tmp_path):
    config = make(
        "cola",
        bert,
        official,
        tmp_path / "sweep",
        sweep=SweepConfig(learning_rates=(1e-6, 3e-3), epochs=(4,), seeds=(1, 2)),
        schedule=ScheduleConfig(evaluate_every=8),
    )
    results = finetune.run(config, say=quiet)
    assert len(results) == 4
    found = json.loads((tmp_path / "sweep/sweep.json").read_text())
    values = [s["selection"] for s in found["settings"]]
    assert [s["learning_rate"] for s in found["settings"]] == [1e-6, 3e-3]
    for setting, seeds in zip(found["settings"], values, strict=True):
        assert setting["mean"] == pytest.approx(np.mean(seeds))
        assert setting["deviation"] == pytest.approx(np.std(seeds, ddof=1))
    assert found["best"]["mean"] == max(np.mean(values, axis=1))
    rows = read_rows(tmp_path / "sweep/results.csv")
    assert {(row.seed, row.metric) for row in rows} == {
        (s, m) for s in "12" for m in ("matthews", "accuracy")
    }
    assert json.loads(rows[0].settings)["schedule"]["epochs"] == 4
    assert "±" in (tmp_path / "sweep/tables.md").read_text()


@pytest.mark.slow
def test_any_number_of_devices_trains_the_same(official, bert, tmp_path, monkeypatch, two_devices):
    """12 examples in batches of 8: the last batch is neither dropped nor counted twice."""
    curves = []
    for count, lift in ((4, "pmap"), (1, "pmap"), (4, "mesh")):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda count=count: two_devices[:count])
            output = tmp_path / f"{count}{lift}"
            config = make("stsb", bert, official, output, steps=4, report="none")
            train = dataclasses.replace(config.train, lift=lift)
            finetune.run(dataclasses.replace(config, train=train), say=quiet)
        lines = (output / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-4)


def test_scores_depend_on_neither_devices_nor_layout(official, bert, two_devices):
    model, tokenizer = trained_model.load(str(bert))
    task = TASKS["mnli"]
    params = losses.init_head(
        jax.random.key(0), model.config, "classes", classes=3, params=model.params
    )
    found = []
    for count, lift, layout, size in (
        (1, "pmap", "padded", 5),
        (8, "pmap", "bucketed", 8),
        (2, "mesh", "bucketed", 4),
    ):
        scorer = evaluator.Evaluator(
            task,
            model,
            tokenizer,
            labels=task.labels,
            devices=Devices(lift, devices=two_devices[:count]),
            lengths=LENGTHS,
            answers=AnswerConfig(),
            batch=RowConfig(batch_size=size, layout=layout, bucket=8),
            compute=Compute(),
        )
        data = scorer.read(TaskData(folder=official), Part(split="dev"))
        found.append(np.stack(scorer.logits(params, data.features)))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5)
    # The largest of NaNs would be the first class.
    broken = jax.tree.map(lambda x: x * np.nan, params)
    with pytest.raises(CheckpointError, match=r"NaN for (\d+) of \1 rows"):
        scorer.logits(broken, data.features)


# A user's own data


def test_own_texts_keep_their_class_names(bert, tmp_path):
    rows = [("good film", "Like"), ("bad film", "Dislike"), ("plain film", "Other")] * 4
    train = write_tsv(tmp_path / "train.tsv", ("text", "label"), *rows)
    test = write_tsv(tmp_path / "test.tsv", ("text", "label"), *rows[:5])
    data = TaskData(train=train, dev=train, test=test)
    config = make("texts", bert, data, tmp_path / "run", steps=300, optimizer=STEADY)
    result = finetune.run(config, say=quiet)
    assert result.scores == {"test": {"accuracy": 100.0, "macro_f1": 100.0}}
    text = (tmp_path / "run/predictions/texts-test.tsv").read_text()
    gold = ["Like", "Dislike", "Other", "Like", "Dislike"]
    assert text == "id\tprediction\tlabel\n" + "".join(
        f"{row}\t{label}\t{label}\n" for row, label in enumerate(gold)
    )
    shares = json.loads((tmp_path / "run/predictions/texts-test-probabilities.json").read_text())
    assert [max(found, key=found.get) for found in shares.values()] == gold
    assert list(map(sum, map(dict.values, shares.values()))) == pytest.approx([1.0] * 5)
    # Each language by itself, where that is asked for.
    spoken = [(*row, "fr" if row[1] == "Other" else "de") for row in rows[:5]]
    dev = write_tsv(tmp_path / "dev.tsv", ("text", "label", "language"), *spoken)
    scored = EvaluateConfig(
        task="texts",
        models=(str(tmp_path / "run"),),
        data=TaskData(dev=dev),
        output=tmp_path / "scores",
        languages=("de", "fr"),
        batch=RowConfig(batch_size=8),
    )
    figures = evaluate.run(scored, say=quiet)
    found = [(row.language, row.examples) for row in figures if row.metric == "accuracy"]
    assert found == [("de", 4), ("fr", 1)]
    folder = tmp_path / "scores/predictions/run"
    assert (folder / "texts-dev-fr.tsv").read_text() == "id\tprediction\tlabel\n2\tOther\tOther\n"
    assert len((folder / "texts-dev-de.tsv").read_text().splitlines()) == 5
    whole = evaluate.run(dataclasses.replace(scored, languages=()), say=quiet)
    assert [(row.language, row.examples) for row in whole] == [("", 5), ("", 5)]
    assert (
        "| run | texts | dev | all | accuracy | 100.0 | 5 |"
        in (tmp_path / "scores/tables.md").read_text()
    )
    before = (tmp_path / "scores/results.csv").read_bytes()
    # Refused before the first part is scored, whichever is wrong.
    with pytest.raises(DataError, match=r"dev.tsv: no row has language 'it'; it has de, fr"):
        evaluate.run(dataclasses.replace(scored, languages=("de", "it")), say=quiet)
    assert (tmp_path / "scores/results.csv").read_bytes() == before


def test_own_scores(bert, tmp_path):
    rows = [("so good", "0.75"), ("so bad", "-0.5"), ("so so", "0.1")] * 4
    file = write_tsv(tmp_path / "a.csv", ("text", "label"), *rows)
    file.write_text(file.read_text().replace("\t", ","))
    hidden = write_tsv(tmp_path / "b.tsv", ("text",), ("so good",), ("so bad",))
    data = TaskData(train=file, dev=file, test=hidden)
    result = finetune.run(make("scores", bert, data, tmp_path / "run", steps=100), say=quiet)
    assert result.selection > 99 and result.scores == {"test": {}}
    found = (tmp_path / "run/predictions/scores-test.tsv").read_text().splitlines()
    assert found[0] == "id\tprediction"
    good, bad = (float(line.split("\t")[1]) for line in found[1:])
    assert abs(good - 0.75) < 0.2 and abs(bad + 0.5) < 0.2
    scored = EvaluateConfig(
        task="scores", models=(result.model,), data=TaskData(test=file), output=tmp_path / "scores"
    )
    with pytest.raises(ConfigError, match=r"'dev': give data.dev, or --splits test for data.test"):
        evaluate.run(scored, say=quiet)
    with pytest.raises(ConfigError, match=r"scores has no split 'foo'; it has train, dev, test"):
        evaluate.run(dataclasses.replace(scored, splits=("foo",)), say=quiet)
    figures = evaluate.run(dataclasses.replace(scored, splits=("test",)), say=quiet)
    assert [row.metric for row in figures] == ["pearson", "spearman"] and figures[0].value > 99
    with pytest.raises(ConfigError, match=r"has learnt a number, which texts does not ask for"):
        evaluate.run(dataclasses.replace(scored, task="texts", splits=("test",)), say=quiet)
    short = dataclasses.replace(scored, lengths=LengthOptions(max_length=4), splits=("test",))
    with pytest.raises(ConfigError, match=r"max_length=4 leaves no room for text"):
        evaluate.run(short, say=quiet)


def test_own_questions(bert, tmp_path):
    context = "The cat is on the table."
    rows = [
        {"id": "a", "question": "Where?", "context": context,
         "answers": [{"text": "on the table", "answer_start": 11}]},
        {"id": "b", "question": "Who flies?", "context": context, "answers": []},
    ]  # fmt: skip
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    # What the test file hides is predicted, and not taken for unanswerable.
    test = tmp_path / "test.jsonl"
    hidden = [{k: v for k, v in row.items() if k != "answers"} for row in rows]
    test.write_text("\n".join(map(json.dumps, hidden)))
    data = TaskData(train=file, dev=file, test=test)
    result = finetune.run(make("questions", bert, data, tmp_path / "run", steps=40), say=quiet)
    assert result.selection == 100.0 and result.scores == {"test": {}}
    predictions = tmp_path / "run/predictions/questions-test-predictions.json"
    assert json.loads(predictions.read_text()) == {"a": "on the table", "b": ""}
    with pytest.raises(DataError, match=r"test.jsonl:1: answers is missing beside id, question, c"):
        wrong = TaskData(train=test, dev=file)
        finetune.run(make("questions", bert, wrong, tmp_path / "wrong"), say=quiet)


# Bad input


def test_what_cannot_work_is_said_before_the_first_step(official, bert, tmp_path):
    config = make("sst2", bert, official, tmp_path / "run")
    for changes, error, message in [
        ({"lengths": LengthConfig(max_length=512)}, ConfigError, "longer than the model's 128"),
        ({"batch": RowConfig(batch_size=7)}, ConfigError, "batch_size=7 does not divide over 2"),
        ({"data": TaskData(folder=tmp_path)}, DataError, "no such file"),
        ({"task": "squad1"}, DataError, "doc_stride|train-v1.1|no such file"),
        ({"train_languages": ("de",)}, ConfigError, "sst2 has no language 'de'"),
        ({"task": "texts"}, ConfigError, "needs a file for split 'train'"),
        ({"optimizer": OptimizerConfig(warmup_steps=9)}, ConfigError, "warmup_steps=9 must be"),
        ({"train": EngineConfig(profile=(9, 1))}, ConfigError, "profile begins at step 9, and the"),
        ({"task": "mlqa", "train_languages": ("de",)}, ConfigError, "no language 'de' to train on"),
    ]:
        data = tmp_path if "task" in changes and changes["task"] == "squad1" else official
        wrong = dataclasses.replace(config, **{"data": TaskData(folder=data), **changes})
        with pytest.raises(error, match=message):
            finetune.run(wrong, say=quiet)
        assert not (tmp_path / "run").exists()
    for wrong in ({"learning_rates": (3e-5, 0.00003)}, {"epochs": (1, 1)}, {"seeds": (1, 2, 1)}):
        with pytest.raises(ConfigError, match=rf"sweep.{next(iter(wrong))} has a value twice"):
            SweepConfig(**wrong)
    with pytest.raises(ConfigError, match=r"sweep\.seeds must be at least 0, got -1"):
        SweepConfig(seeds=(1, -1))
    for wrong in ({"epochs": 0}, {"patience": -1}, {"warmup_ratio": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ScheduleConfig(**wrong)
    with pytest.raises(ConfigError, match="limit must be at least 0, got -1"):
        dataclasses.replace(config, limit=-1)
    for name in ("train_languages", "select_languages"):
        with pytest.raises(ConfigError, match=rf"{name} has a value twice \(en, en\); give each"):
            dataclasses.replace(config, **{name: ("en", "en")})
    for name in ("splits", "languages"):
        with pytest.raises(ConfigError, match=rf"{name} has a value twice \(dev, dev\); give each"):
            EvaluateConfig(
                task="rte", models=("m",), data=config.data, output=tmp_path, **{name: ("dev",) * 2}
            )
    with pytest.raises(ConfigError, match=r"sweep\.epochs changes nothing beside .*max_steps=2"):
        dataclasses.replace(config, sweep=SweepConfig(epochs=(1, 2)))


def test_no_run_of_a_sweep_begins_where_another_would_be_refused(official, bert, tmp_path):
    def start(name, sweep, **changes):
        config = make("rte", bert, official, tmp_path / name, sweep=sweep, **changes)
        finetune.run(config, say=quiet)

    late = {"schedule": ScheduleConfig(), "optimizer": OptimizerConfig(warmup_steps=3)}
    with pytest.raises(ConfigError, match=r"warmup_steps=3 must be below the run's steps=2"):
        start("late", SweepConfig(epochs=(2, 1)), **late)
    assert not (tmp_path / "late").exists()
    other = tmp_path / "other/lr0.003-epochs3-seed2"
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"task": "sst2"}')
    (other / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r'seed2/config.json was written .*\n  task: "sst2" -> '):
        start("other", SweepConfig(seeds=(1, 2)))
    assert not (tmp_path / "other/lr0.003-epochs3-seed1").exists()


def test_a_sweep_takes_nobodys_tables(official, bert, tmp_path):
    seeds = SweepConfig(seeds=(1, 2))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.csv").write_text("a,b\n")
    for name, said in (("config.json", "is a run by itself"), ("notes", "holds no run of a sweep")):
        (folder / name).write_text("{}")
        with pytest.raises(ConfigError, match=rf"output .*run {said}|is not empty and {said}"):
            finetune.run(make("rte", bert, official, folder, sweep=seeds), say=quiet)
        assert {path.name for path in folder.iterdir()} == {name, "results.csv"}
        (folder / name).unlink()
    # What was evaluated into the sweep's own folder stays when the sweep goes on.
    sweep = make("rte", bert, official, tmp_path / "sweep", sweep=seeds)
    said: list[str] = []
    first, second = finetune.run(sweep, say=said.append)
    (added,) = evaluate.run(
        mine := EvaluateConfig(
            task="rte",
            models=(first.model,),
            data=TaskData(folder=official),
            output=sweep.output,
            name="mine",
            batch=RowConfig(batch_size=8),
        ),
        say=quiet,
    )
    # And what was evaluated into a run's stays there.
    inner = Path(first.model).parent
    evaluate.run(dataclasses.replace(mine, output=inner, name="inner"), say=quiet)
    finetune.run(dataclasses.replace(sweep, sweep=SweepConfig(seeds=(1, 2, 3))), say=quiet)
    rows = read_rows(sweep.output / "results.csv")
    assert [row.seed for row in rows] == ["1", "2", "3", ""] and rows[-1] == added
    assert "| mine | rte |" in (sweep.output / "tables.md").read_text()
    # Its folder may be scored again when another of its runs is the best.
    whole = dataclasses.replace(mine, models=(str(sweep.output),), name="", output=tmp_path / "all")
    record = json.loads((sweep.output / "sweep.json").read_text())
    for run in sweep.output.glob("lr*"):
        record["best"]["best_run"] = run.name
        (sweep.output / "sweep.json").write_text(json.dumps(record))
        (row,) = evaluate.run(whole, say=quiet)
        assert row.model == str(run / "best")
    # The folder stands for its best model, wherever it lies; without its record for none.
    best = max((first, second), key=lambda result: result.selection)
    assert said[-1] == f"best model {best.model}"
    record["best"]["best_run"] = Path(best.model).parent.name
    (sweep.output / "sweep.json").write_text(json.dumps(record))
    moved = sweep.output.rename(tmp_path / "moved")
    model, _ = trained_model.load(str(moved))
    assert model.source == str(moved / Path(best.model).relative_to(sweep.output))
    moved.rename(sweep.output)
    (sweep.output / "sweep.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"name one of its folders instead: lr0.*seed1/best"):
        trained_model.load(str(sweep.output))


def test_a_model_is_not_scored_on_classes_it_does_not_name(official, bert, tmp_path):
    def score(model, task="rte", **changes):
        config = EvaluateConfig(
            task=task,
            models=(str(model),),
            data=TaskData(folder=official),
            output=tmp_path / "scores",
            batch=RowConfig(batch_size=8),
            **changes,
        )
        return evaluate.run(config, say=quiet)

    with pytest.raises(ConfigError, match=r"has no sequence classifier; fine-tune it on rte"):
        score(bert)
    with pytest.raises(ConfigError, match=r"has no span; fine-tune it on squad1"):
        score(bert, task="squad1")
    assert not (tmp_path / "scores").exists()
    finetune.run(make("rte", bert, official, tmp_path / "run"), say=quiet)
    with pytest.raises(ConfigError, match=r"calls its classes entailment, not_entailment; mnli"):
        score(tmp_path / "run", task="mnli")
    with pytest.raises(ConfigError, match=r"has learnt 2 classes, which stsb does not ask for"):
        score(tmp_path / "run", task="stsb")
    expected = score(tmp_path / "run")
    labels = ("entailment", "not_entailment")
    with pytest.raises(ConfigError, match=r"has them in another order, entailment, not_entail"):
        score(tmp_path / "run", labels=labels[::-1])
    with pytest.raises(ConfigError, match=r"two classes have one name in entailment, Entailment"):
        score(tmp_path / "run", labels=("entailment", "Entailment"))
    # Upper case is a spelling; names in another order are another order.
    config_file = tmp_path / "run/best/config.json"
    stored = json.loads(config_file.read_text())
    stored["id2label"] = {"0": "ENTAILMENT", "1": "NOT_ENTAILMENT"}
    config_file.write_text(json.dumps(stored))
    assert score(tmp_path / "run")[0].value == expected[0].value
    stored["id2label"] = {"0": "not_entailment", "1": "entailment"}
    config_file.write_text(json.dumps(stored))
    assert score(tmp_path / "run")[0].value == pytest.approx(100 - expected[0].value)
    stored["id2label"] = {"no": "not_entailment", "yes": "entailment"}
    config_file.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match=r"id2label has keys 'no', 'yes'; .* '0' to '1'"):
        score(tmp_path / "run")
    stored["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    config_file.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"calls its classes LABEL_0, LABEL_1; rte has"):
        score(tmp_path / "run")
    assert score(tmp_path / "run", labels=labels)[0].value == expected[0].value
    with pytest.raises(ConfigError, match=r"labels: 3 names given for the model's 2 classes"):
        score(tmp_path / "run", labels=(*labels, "x"))


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_loaded(official, tmp_path):
    (tmp_path / "file").write_text("")
    for output in ("file", "file/x"):
        config = EvaluateConfig(
            task="rte",
            models=("no/model",),
            data=TaskData(folder=official),
            output=tmp_path / output,
        )
        with pytest.raises(ConfigError, match=rf"{output}: .*file is a file, .*--output"):
            evaluate.run(config, say=quiet)


def test_results_are_not_added_to_somebody_elses_file(official, bert, tmp_path):
    finetune.run(make("rte", bert, official, tmp_path / "run"), say=quiet)
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"results.csv: is no results file of ours"):
        evaluate.run(
            EvaluateConfig(
                task="rte",
                models=(str(tmp_path / "run"),),
                data=TaskData(folder=official),
                output=tmp_path / "scores",
                batch=RowConfig(batch_size=8),
            ),
            say=quiet,
        )


def test_what_a_head_starts_from(bert):
    """A pooler becomes BERT's first classifier layer; a head that fits goes on; no other does."""
    model, _ = trained_model.load(str(bert))
    key = jax.random.key(0)
    encoder = model.params["encoder"]

    def start(kind, classes=3, **params):
        params = {"encoder": encoder, **params}
        return losses.init_head(key, model.config, kind, classes=classes, params=params)

    fresh = start("classes")["sequence_classifier"]
    pooler = {"dense": jax.tree.map(np.ones_like, fresh["dense"])}
    pooled = start("classes", pooler=pooler)["sequence_classifier"]
    assert (pooled["dense"]["kernel"] == 1).all()
    np.testing.assert_array_equal(pooled["output"]["kernel"], fresh["output"]["kernel"])
    head = jax.tree.map(np.ones_like, fresh)
    assert (
        start("classes", sequence_classifier=head)["sequence_classifier"]["output"]["kernel"] == 1
    ).all()
    other = start("classes", classes=2, sequence_classifier=head)["sequence_classifier"]
    assert other["output"]["kernel"].shape == (32, 2) and not (other["output"]["kernel"] == 1).any()
    assert (other["dense"]["kernel"] == 1).all()
    span = start("span")["span"]
    assert (
        start("span", span=jax.tree.map(np.ones_like, span))["span"]["output"]["kernel"] == 1
    ).all()


@pytest.mark.parametrize(
    ("family", "settings", "classes", "span"),
    [
        ("bert", {}, 0.25, 0.0),
        ("bert", {"classifier_dropout": 0.3, "qa_dropout": 0.4}, 0.3, 0.0),
        ("xlm-roberta", {"classifier_dropout": None}, 0.25, 0.0),
        ("distilbert", {}, 0.2, 0.1),
        ("distilbert", {"seq_classif_dropout": 0.0, "qa_dropout": 0.4}, 0.0, 0.4),
        ("xlm", {}, 0.1, 0.0),
    ],
)
def test_heads_drop_at_the_rates_of_transformers(family, settings, classes, span):
    config = EncoderConfig(model_type=family, hidden_dropout_prob=0.25)
    model = Model(config=config, params={}, hf_config=settings)
    assert finetune_model.head_dropout(model, "classes") == classes
    assert finetune_model.head_dropout(model, "score") == classes
    assert finetune_model.head_dropout(model, "span") == span


@pytest.mark.parametrize("kind", ["classes", "span"])
def test_a_head_drops_in_training_alone(bert, kind):
    model, _ = trained_model.load(str(bert))
    config = dataclasses.replace(
        model.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    params = losses.init_head(
        jax.random.key(0), config, kind, classes=3, params={"encoder": model.params["encoder"]}
    )
    batch = {
        "input_ids": jnp.full((2, 8), 7),
        "segments": jnp.ones((2, 8), jnp.int32),
        "rows": jnp.arange(2),
    }

    def logits(rate, key):
        head = losses.TaskModel(config, kind, classes=3, head_dropout=rate)
        return np.asarray(head.logits(params, batch, key))

    key = jax.random.key(1)
    plain = logits(0.0, None)
    np.testing.assert_array_equal(logits(0.5, None), plain)
    np.testing.assert_allclose(logits(0.0, key), plain, atol=1e-6)
    assert np.abs(logits(0.5, key) - plain).max() > 1e-3


@pytest.mark.parametrize("kind", ["classes", "score", "span"])
def test_scores_that_bf16_would_make_equal_stay_apart(bert, kind):
    """Around 4 it has steps of 1/32, and rows of a small model differ by less."""
    model, _ = trained_model.load(str(bert))
    params = losses.init_head(
        jax.random.key(0),
        model.config,
        kind,
        classes=1,
        params={"encoder": model.params["encoder"]},
    )
    head = "span" if kind == "span" else "sequence_classifier"
    output = params[head]["output"]
    params[head] = {**params[head], "output": {**output, "bias": output["bias"] + 4.0}}
    batch = {
        "input_ids": jnp.arange(5, 65).reshape(15, 4),
        "segments": jnp.ones((15, 4), jnp.int32),
        "rows": jnp.arange(15),
    }
    compute = Compute(dtype="bfloat16")
    logits = losses.TaskModel(model.config, kind, classes=1, compute=compute).logits(params, batch)
    assert logits.dtype == jnp.float32
    first = np.asarray(logits).reshape(15, -1)[:, 0]
    assert np.ptp(first) < 1.0 and len(np.unique(first)) == 15


def test_outputs_of_other_classes_are_no_start(official, bert, tmp_path):
    """RTE's classes stand in WNLI's order reversed: the names decide what is kept."""
    finetune.run(make("rte", bert, official, tmp_path / "rte", report="none"), say=quiet)
    source, _ = trained_model.load(str(tmp_path / "rte"))
    config = make("wnli", tmp_path / "rte", official, tmp_path / "wnli")
    labels = finetune_model.class_names(TASKS["wnli"], source, [])
    assert labels == ("entailment", "not_entailment")  # the checkpoint's order, not the task's
    source = dataclasses.replace(
        source, sentence=Sentence(pooling="mean", normalize=True, max_length=64)
    )
    model = finetune_model.start_model(config, TASKS["wnli"], source, labels)
    assert model.sentence is None  # a classifier embeds no sentences
    kept = model.params["sequence_classifier"]["output"]["kernel"]
    np.testing.assert_array_equal(kept, source.params["sequence_classifier"]["output"]["kernel"])
    labels = finetune_model.class_names(TASKS["sst2"], source, [])
    assert labels == ("negative", "positive")
    model = finetune_model.start_model(config, TASKS["sst2"], source, labels)
    fresh = model.params["sequence_classifier"]["output"]["kernel"]
    assert (fresh != source.params["sequence_classifier"]["output"]["kernel"]).any()
