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
    total = len(list(flatten(read_model(config.target).params)))
    assert printed.err.count("\n") == 2 * total


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"to": "orbax", "dtype": "float16"}, "--dtype float16 is for --to huggingface"),
        ({"max_shard_gb": 0.0}, "--max-shard-gb must be positive"),
    ],
)
def test_settings_that_fit_nothing(changes, says, config):
    with pytest.raises(ConfigError, match=says):
        dataclasses.replace(config, **changes)
