"""Every experiment file: resolved, checked, traced at full size; one of each kind is run."""

import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from minilm_jax.cli import load_experiment, parse
from minilm_jax.data.machine_docs import machine_documents
from minilm_jax.data.sources import TextSource
from minilm_jax.distill.student import check_start, init_student, student_encoder_config
from minilm_jax.encoder.encoder import init_params
from minilm_jax.encoder.heads import MaskedLM
from minilm_jax.jobs import distill
from minilm_jax.jobs.distill_config import ChainConfig, DistillConfig, check_settings
from minilm_jax.jobs.recipes import at_toy_size
from minilm_jax.train.optimizer import make_optimizer, make_schedule
from minilm_jax.train.state import create_state

ROOT = Path(__file__).parents[1]
FILES = sorted(
    str(path.relative_to(ROOT))
    for room in ("minilm_v1", "minilm_v2", "baselines", "ablations")
    for path in (ROOT / "experiments" / room).glob("*.py")
)


def stages(config):
    return config.stages() if isinstance(config, ChainConfig) else (config,)


@functools.cache
def teacher_shapes(shape, heads):
    return jax.eval_shape(lambda: teacher_params(shape, heads))


def teacher_params(shape, heads):
    params = {"encoder": init_params(jax.random.key(0), shape)}
    if "mlm" in heads:
        hidden = jnp.zeros((1, shape.hidden_size))
        table = jnp.zeros((shape.vocab_size, shape.hidden_size))
        params["mlm"] = MaskedLM(shape).init(jax.random.key(0), hidden, word_embeddings=table)[
            "params"
        ]
    return params


@pytest.mark.parametrize("file", FILES)
def test_an_experiment_resolves_and_fits(file):
    assert f"minilm-jax distill {file}" in (ROOT / file).read_text()
    for config in stages(load_experiment(str(ROOT / file))):
        assert isinstance(config, DistillConfig)
        check_settings(config, config.teacher.shape)


OF_THE_PAPERS = ("bert_base_3x384_assistant", "xlmr_base_12x384", "roberta_large_6x768")
"""Students of the papers that `make test` traces; it traces all baselines and ablations."""
TRACED = [
    pytest.param(file, marks=pytest.mark.slow)
    if "minilm_v" in file and Path(file).stem not in OF_THE_PAPERS
    else file
    for file in FILES
]


@pytest.mark.parametrize("file", TRACED)
def test_an_experiment_traces_at_full_size(file):
    """Start, optimizer and loss with the paper's shapes, as shapes only: no memory, no weights."""
    for config in stages(load_experiment(str(ROOT / file))):
        trace(config)


def trace(config):
    shape, objective = config.teacher.shape, config.objective
    student = student_encoder_config(config.student, shape)
    objective.check(shape, student)
    optimizer = make_optimizer(config.optimizer)
    make_schedule(config.optimizer, steps=config.train.steps)

    def start(frozen):
        key = jax.random.key(0)
        encoder = init_student(key, config.student, shape, frozen["encoder"])
        extra = objective.new_params(key, shape, student)
        return create_state({"encoder": encoder, **extra}, optimizer)

    frozen = teacher_shapes(shape, tuple(objective.teacher_heads()))
    state = jax.eval_shape(start, frozen)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, config.batch.sequence_length), jnp.int32)
    batch = {
        "input_ids": tokens,
        "segments": tokens,
        "labels": tokens,
        "rows": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    loss = objective.make_loss(shape, student, config.compute)
    found = jax.eval_shape(loss, state.params, frozen, batch, key)
    assert found.terms and all(mean.total.shape == () for mean in found.terms.values())


def test_every_student_of_both_papers_has_a_file():
    names = {Path(file).stem for file in FILES if "minilm_v" in file}
    assert {f"bert_base_{n}x384" for n in (3, 4, 6)} <= names
    assert {f"bert_base_{n}x384_assistant" for n in (3, 4, 6)} <= names
    assert {"unilmv2_12x384", "unilmv2_6x384_assistant"} <= names
    assert {"xlmr_base_12x384", "xlmr_base_6x384_assistant"} <= names
    for teacher in ("bert_base", "bert_large", "roberta_large"):
        assert {f"{teacher}_{s}" for s in ("6x768", "6x384", "12x384")} <= names
    assert {"xlmr_large_12x384", "xlmr_large_6x384"} <= names


@pytest.fixture(scope="module")
def some_docs(tmp_path_factory):
    """The first of what the smoke variants read, enough for their vocabularies."""
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    lines = (json.dumps({"text": d.text}) for d in itertools.islice(machine_documents(), 1000))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    "file",
    [
        "minilm_v1/bert_base_3x384_assistant",
        pytest.param("minilm_v2/xlmr_large_6x384", marks=pytest.mark.slow),
        pytest.param("minilm_v2/roberta_large_12x384", marks=pytest.mark.slow),
        pytest.param("baselines/bert_base_6x768_distilbert", marks=pytest.mark.slow),
        pytest.param("baselines/bert_base_6x384_mlm", marks=pytest.mark.slow),
        pytest.param("baselines/bert_base_6x384_tinybert", marks=pytest.mark.slow),
        pytest.param("baselines/bert_base_6x384_soft_labels", marks=pytest.mark.slow),
        pytest.param("ablations/bert_base_6x384_value_mse", marks=pytest.mark.slow),
        pytest.param("ablations/bert_base_6x384_layer_to_layer", marks=pytest.mark.slow),
    ],
)
def test_a_smoke_variant_runs_to_its_student(file, tmp_path, some_docs):
    config = load_experiment(str(ROOT / "experiments" / f"{file}.py:smoke"))

    def here(stage):
        # Eight emulated devices compute the same, and a short text is read as a long one, faster.
        train = dataclasses.replace(stage.train, devices=1)
        text = dataclasses.replace(stage.text, source=TextSource(paths=(str(some_docs),)))
        return dataclasses.replace(stage, output=tmp_path / stage.output, train=train, text=text)

    if isinstance(config, ChainConfig):
        config = ChainConfig(assistant=here(config.assistant), student=here(config.student))
    else:
        config = here(config)
    result = distill.run(config, say=lambda _: None)
    assert (Path(result.student) / "model.safetensors").exists()
    assert all(abs(value) < 1e3 for value in result.heldout.values())
    if isinstance(config, ChainConfig):
        # A chain that was moved goes on, though its second run had its teacher elsewhere.
        (config.student.output / "result.json").unlink()
        (tmp_path / "runs").rename(tmp_path / "moved")
        moved = {
            stage: dataclasses.replace(
                run, output=tmp_path / "moved" / run.output.relative_to(tmp_path / "runs")
            )
            for stage, run in vars(config).items()
        }
        assert distill.run(ChainConfig(**moved), say=lambda _: None).heldout == result.heldout


@pytest.mark.parametrize(
    "output, smoke",
    [("runs/a/b", "runs/smoke/a/b"), ("/disk/a", "runs/smoke/disk/a"), ("a", "runs/smoke/a")],
)
def test_a_run_at_toy_size_has_a_folder_of_its_own_wherever_the_run_lies(output, smoke):
    config = load_experiment(str(ROOT / "experiments" / "minilm_v2" / "bert_base_6x384.py"))
    toy = at_toy_size(dataclasses.replace(config, output=Path(output)))
    assert toy.output == Path(smoke)


def test_a_student_cut_from_its_teacher_is_one_at_toy_size():
    config = load_experiment(str(ROOT / "experiments" / "minilm_v2" / "bert_base_6x384.py"))
    cut = dataclasses.replace(
        config.student, init="teacher", teacher_layers=(1, 2, 3, 4, 5, 12), intermediate_size=1536
    )
    toy = at_toy_size(dataclasses.replace(config, student=cut))
    check_start(toy.student, toy.teacher.shape)


def test_an_objective_of_ones_own_needs_one_file(tmp_path, tiny_teacher, text_file):
    """experiments/own_objective.py, its options included, on a small teacher."""
    options = ["--objective.weight", "2.0", "--output", str(tmp_path / "run")]
    options += ["--teacher.source", str(tiny_teacher), "--teacher.sha256", "None"]
    options += ["--text.source.format", "auto", "--text.source.paths", str(text_file)]
    options += ["--text.heldout", "0.2", "--student.num-hidden-layers", "2"]
    options += ["--student.hidden-size", "48", "--student.num-attention-heads", "4"]
    options += ["--student.intermediate-size", "96", "--batch.batch-size", "8"]
    options += ["--batch.sequence-length", "32", "--train.steps", "20"]
    options += ["--optimizer.warmup-steps", "2", "--optimizer.learning-rate", "3e-3"]
    job, config = parse("distill", [str(ROOT / "experiments" / "own_objective.py"), *options])
    assert config.objective.weight == 2.0
    result = job.run(config, say=lambda _: None)
    assert result.heldout["after"] < 0.9 * result.heldout["before"]
    # A changed formula is told when the run goes on: settings do not show it.
    formula = (ROOT / "experiments" / "own_objective.py").read_bytes()
    versions = json.loads((tmp_path / "run/versions.json").read_text())
    assert versions["own_objective.py"] == hashlib.sha256(formula).hexdigest()
