"""Every recipe can be loaded, and its smoke variant runs on the tests' own data and model."""

import dataclasses
import importlib
import runpy
from pathlib import Path

import pytest
from official_files import write_glue, write_mlqa, write_squad, write_tsv, write_xnli
from tiny_models import write_tiny

from minilm_jax.jobs import finetune
from minilm_jax.jobs.finetune_config import FinetuneConfig
from minilm_jax.tasks.catalog import TaskData

FOLDER = Path(__file__).parents[2] / "experiments" / "finetune"
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_is_a_config(name):
    variables = runpy.run_path(str(FOLDER / f"{name}.py"))
    configs = {k: v for k, v in variables.items() if isinstance(v, FinetuneConfig)}
    assert {"config", "smoke"} <= set(configs)
    for word in ("command", "hardware", "expected"):
        assert f"\n{word}" in variables["__doc__"]
    assert len({(c.task, c.model) for c in configs.values()}) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke_variants_run(name, tmp_path):
    config = runpy.run_path(str(FOLDER / f"{name}.py"))["smoke"]
    family = "minilm" if name in ("xnli", "mlqa") else "bert"
    model = write_tiny(tmp_path / "model", family=family)
    write = {"xnli": write_xnli, "mlqa": write_mlqa, "glue": write_glue}.get(name, write_squad)
    data = TaskData(folder=write(tmp_path / "data"))
    if config.task == "texts":
        rows = [("good film", "a"), ("bad film", "b")] * 4
        file = write_tsv(tmp_path / "own.tsv", ("text", "label"), *rows)
        data = TaskData(train=file, dev=file)
    elif config.task == "questions":
        assert data.folder is not None
        data = TaskData(train=data.folder / "train-v2.0.json", dev=data.folder / "dev-v2.0.json")
    config = dataclasses.replace(config, model=str(model), data=data, output=tmp_path / "run")
    lengths = dataclasses.replace(config.lengths, max_length=min(config.lengths.max_length, 96))
    result = finetune.run(dataclasses.replace(config, lengths=lengths), say=lambda _: None)
    assert result.scores and (tmp_path / "run/best/model.safetensors").is_file()


def test_the_paragraphs_of_a_document_stay_in_one_split(tmp_path):
    experiment = runpy.run_path(str(FOLDER / "machine_docs.py"))
    counts = experiment["write_data"](tmp_path)
    areas = {key.split()[1] for key in counts}
    assert areas == {*experiment["AREAS"], "language"}
    own = importlib.import_module("minilm_jax.tasks.own")
    texts = {
        split: {e.text for e in own.read_texts(tmp_path / f"{split}.jsonl")}
        for split in ("train", "dev", "test")
    }
    assert not texts["train"] & (texts["dev"] | texts["test"])
    assert len(texts["train"]) > 1000 and len(texts["test"]) > 200
