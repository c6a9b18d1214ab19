"""The job: every target verified, a failed verification leaves nothing, progress is shown."""

import dataclasses
import json

import pytest
from small_models import small_bert

from minilm_jax.convert import verify
from minilm_jax.convert.folder import read_model
from minilm_jax.convert.model import flatten
from minilm_jax.errors import CheckpointError, ConfigError
from minilm_jax.jobs import convert as job
from minilm_jax.jobs.convert import ConvertConfig, run


@pytest.fixture
def config(tmp_path) -> ConvertConfig:
    source = small_bert(tmp_path / "source")
    return ConvertConfig(
        source=str(source), target=tmp_path / "target", tokenizer="none", verify=True
    )


@pytest.mark.torch
@pytest.mark.parametrize("to", ["huggingface", "orbax", "export"])
def test_verify_compares_every_layer_with_pytorch(to, config):
    pytest.importorskip("torch")
    lines: list[str] = []
    run(dataclasses.replace(config, to=to), report=lines.append)
    named = {line.split()[0] for line in lines}
    assert {"hidden_0", "hidden_1", "hidden_2", "pooler"} <= named
    if to != "export":
        assert "byte for byte: 39 tensors" in lines


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "source"])
def test_verify_holds_for_every_dtype(dtype, config):
    pytest.importorskip("torch")
    run(dataclasses.replace(config, dtype=dtype), report=lambda line: None)


@pytest.mark.torch
@pytest.mark.parametrize("to", ["huggingface", "orbax", "export"])
def test_failed_verification_leaves_nothing(to, config, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    right = verify.outputs

    def wrong(model_config, params, **batch):
        found = right(model_config, params, **batch)
        return found | {"hidden_1": found["hidden_1"] + 2e-5}

    monkeypatch.setattr(verify, "outputs", wrong)
    with pytest.raises(CheckpointError, match="verification failed: hidden_1 differs"):
        run(dataclasses.replace(config, to=to), report=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_verify_without_pytorch_says_so_and_compares_bytes(config, monkeypatch):
    monkeypatch.setattr(job, "has_torch", lambda: False)
    lines: list[str] = []
    run(config, report=lines.append)
    assert "byte for byte: 39 tensors" in lines
    assert any("PyTorch is not installed" in line for line in lines)


def test_nan_never_agrees():
    row = verify.Comparison(name="hidden_0", difference=float("nan"), magnitude=1.0)
    with pytest.raises(CheckpointError, match="hidden_0"):
        verify.refuse_disagreement([row], report=lambda line: None)
    with pytest.raises(CheckpointError, match="nothing was compared"):
        verify.refuse_disagreement([], report=lambda line: None)


def test_a_difference_is_measured_by_the_output():
    """PyTorch's fp32 logits of 8.1 are 1.5e-5 from its own in fp64; hidden states of 1 are not."""
    rows = [
        verify.Comparison(name="mlm", difference=1.5e-5, magnitude=8.1),
        verify.Comparison(name="hidden_1", difference=1.1e-5, magnitude=0.5),
    ]
    assert [row.agrees for row in rows] == [True, False]
    with pytest.raises(CheckpointError, match=r"failed: hidden_1 differs from PyTorch"):
        verify.refuse_disagreement(rows, report=lambda line: None)


@pytest.mark.torch
def test_verify_of_old_answering_models_with_a_pooler_of_no_use(tmp_path, capfd):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForQuestionAnswering

    from minilm_jax.convert.torch_outputs import load_torch

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    made = BertForQuestionAnswering(BertConfig(**shape, num_hidden_layers=1, vocab_size=50))
    folder = tmp_path / "qa"
    made.save_pretrained(folder)
    pooler = {"bert.pooler.dense.weight": torch.eye(16), "bert.pooler.dense.bias": torch.zeros(16)}
    save_file(made.state_dict() | pooler, folder / "model.safetensors", metadata={"format": "pt"})
    lines: list[str] = []
    config = ConvertConfig(
        source=str(folder), target=tmp_path / "out", tokenizer="none", verify=True
    )
    run(config, report=lines.append)
    assert any(line.startswith("span_start") for line in lines)
    with pytest.raises(
        CheckpointError, match=r"TokenClassification .*: classifier\..*--heads"
    ) as error:
        load_torch(folder, architecture="BertForTokenClassification")
    assert "\n" not in str(error.value)
    assert "LOAD REPORT" not in "".join(capfd.readouterr())


@pytest.mark.torch
def test_verify_of_what_transformers_cannot_load(config, tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "none"}))
    with pytest.raises(CheckpointError, match=r"cannot load the BertModel written: .*=\"none\""):
        run(config, report=lambda line: None)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_heads_are_chosen(config):
    out = run(dataclasses.replace(config, heads=(), verify=False), report=lambda line: None)
    assert set(read_model(out).params) == {"encoder"}
    manifest = json.loads((out / "minilm_jax.json").read_text())
    assert manifest["source"] == config.source


def test_progress_goes_to_stderr(config, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 3))
    monkeypatch.setattr(job.time, "monotonic", lambda: float(next(clock)))
    run(dataclasses.replace(config, verify=False), report=lambda line: None)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "read 0.00 of 0.00 GB (100%)" in printed.err and "written" in printed.err
    total = len(flatten(read_model(config.target).params))
    assert printed.err.count("\n") == 2 * total


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"to": "orbax", "dtype": "float16"}, "--dtype float16 is for --to huggingface"),
        ({"max_shard_gb": 0.0}, "max_shard_gb must be above 0"),
        ({"max_shard_gb": float("nan")}, "max_shard_gb must be above 0"),
        ({"max_shard_gb": 1e300}, "max_shard_gb must be above 0 and below 1,000,000, got 1e"),
    ],
)
def test_settings_that_fit_nothing(changes, says, config):
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(config, **changes)
