"""Parity with PyTorch's transformers, every family and head, on files made by make_golden.py.

Outputs agree within 1e-5, gradients within 1e-5 of the model's largest. The files change only
with make_golden.py; the live comparison below says whether they still tell the truth.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from reference_models import CASES, Case, build, cotangents, last_outputs

from minilm_jax.convert.apply import outputs
from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.matching import match_names
from minilm_jax.convert.model import flatten

_GOLDEN = Path(__file__).parent / "golden"
_TOLERANCE = 1e-5


def _part(golden: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(f"{part}/"): v for k, v in golden.items() if k.startswith(f"{part}/")}


@functools.cache
def _load(name: str) -> dict[str, np.ndarray]:
    with np.load(_GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _folder(case: Case, folder: Path) -> Path:
    golden = _load(case.name)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(golden["config"].tobytes())
    safetensors.numpy.save_file(_part(golden, "weights"), folder / "model.safetensors")
    return folder


def test_every_family_and_head_has_a_golden_file():
    assert {p.stem for p in _GOLDEN.glob("*.npz")} == {case.name for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_equal_pytorch(case, tmp_path):
    golden = _load(case.name)
    _check_parity(case, _folder(case, tmp_path), golden)


def _check_parity(case: Case, folder: Path, golden: dict[str, np.ndarray]) -> None:
    model = read_model(folder)
    batch, theirs = _part(golden, "inputs"), _part(golden, "outputs")
    weights = cotangents(case, {name: y.shape for name, y in theirs.items()})

    def loss(params):
        ours = outputs(model.config, params, **batch)
        total = sum(jnp.sum(weights[name] * ours[name]) for name in last_outputs(set(theirs)))
        return total, ours

    # Not compiled as a whole: that takes seconds a model, and these models share every operation.
    (_, ours), gradients = jax.value_and_grad(loss, has_aux=True)(model.params)
    # BERT's pre-training classes compute the pooler's output and do not return it.
    assert set(ours) - set(theirs) <= {"pooler"} and set(theirs) <= set(ours)
    valid = batch["segments"] == 1
    for name, expected in theirs.items():
        per_token = expected.shape[:2] == valid.shape and name != "pooler"
        difference = np.abs(np.asarray(ours[name]) - expected)
        error = difference[valid].max() if per_token else difference.max()
        assert error < _TOLERANCE, f"{name}: {error}"
    _check_gradients(case, model, gradients, _part(golden, "gradients"))


def _check_gradients(case, model, gradients, theirs):
    ours = flatten(gradients)
    reading = match_names(
        {**{n: a.shape for n, a in _part(_load(case.name), "weights").items()}},
        config=model.config,
        file=case.name,
        architectures=[case.architecture],
    )
    largest = max(np.abs(g).max() for g in theirs.values())
    for match in reading.matches:
        mine = np.asarray(ours[match.ours])
        mine = mine.T if match.transform == "transpose" else mine
        if match.foreign not in theirs:
            # PyTorch leaves no gradient where none flows; ours must then be zero.
            assert not mine.any(), match.foreign
            continue
        expected = theirs[match.foreign]
        if case.tokenizer_pad is not None and match.ours.endswith("word/embedding"):
            # Multilingual-MiniLM: torch freezes <s>, whose id the config calls padding; we do not.
            assert not expected[0].any() and mine[0].any()
            mine, expected = mine[1:], expected[1:]
        error = np.abs(mine - expected).max() / largest
        assert error < _TOLERANCE, f"{match.foreign}: {error}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_round_trip_is_byte_identical(case, tmp_path):
    folder = _folder(case, tmp_path / "in")
    model = read_model(folder)
    write_model(model, tmp_path / "out", dtype="source")
    before = safetensors.numpy.load_file(folder / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    del old["transformers_version"]
    assert new == old | {"architectures": [case.architecture], "dtype": case.dtype}
    again = read_model(tmp_path / "out")
    assert again.config == model.config


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_live_pytorch_agrees(case, tmp_path):
    """What transformers computes today is what the golden files hold, weights and all."""
    pytest.importorskip("torch")
    from make_golden import compute

    build(case, tmp_path)
    found = compute(case, tmp_path)
    weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    found |= {f"weights/{name}": tensor for name, tensor in weights.items()}
    _check_parity(case, tmp_path, found)


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pytorch_loads_what_we_write(case, tmp_path):
    pytest.importorskip("torch")
    from minilm_jax.convert.torch_outputs import load_torch, torch_outputs

    write_model(read_model(_folder(case, tmp_path / "in")), tmp_path / "out")
    module = load_torch(tmp_path / "out", architecture=case.architecture)
    results = torch_outputs(module, _part(_load(case.name), "inputs"))
    for name, expected in _part(_load(case.name), "outputs").items():
        assert np.abs(results[name].detach().numpy() - expected).max() < _TOLERANCE
