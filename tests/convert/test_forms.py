"""Every form and spelling of a checkpoint reads as the same model; every form out reads back."""

import dataclasses
import fnmatch
import inspect
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_archive as ta
from small_models import CONFIG, bert_weights, save_weights, small_bert

from minilm_jax import cli
from minilm_jax.convert import hub
from minilm_jax.convert.apply import outputs
from minilm_jax.convert.export import load_export, write_export
from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.convert.model import Model, flatten
from minilm_jax.convert.orbax_form import write_orbax
from minilm_jax.convert.sentence import SENTENCE_FILES, Sentence
from minilm_jax.convert.verify import check_round_trip, largest_difference, random_batch
from minilm_jax.data.tokenizers import TOKENIZER_FILES
from minilm_jax.errors import CheckpointError, ConfigError
from minilm_jax.jobs.convert import ConvertConfig, run


def _same(first: Model, second: Model) -> None:
    before, after = flatten(first.params), flatten(second.params)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


@pytest.fixture
def good(tmp_path) -> Model:
    return read_model(small_bert(tmp_path / "good"))


def _folder(tmp_path: Path, tensors: dict[str, np.ndarray] | None = None, **config) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if tensors is not None:
        save_weights(folder / "model.safetensors", tensors)
    return folder


# Names


@pytest.mark.parametrize(
    "prefix",
    [
        "bert.",
        "module.",
        "_orig_mod.",
        "model.",
        "0.auto_model.",
        "module.module.bert.",
        "bert.bert.",
        "student.",
        "encoder.",
        "_forward_module.student.bert.",
    ],
)
def test_44_prefixes(prefix, good, tmp_path):
    named = {prefix + name: tensor for name, tensor in bert_weights().items()}
    _same(good, read_model(_folder(tmp_path, named)))


def test_43_old_layer_norm_names(good, tmp_path):
    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        )

    _same(good, read_model(_folder(tmp_path, {old(n): t for n, t in bert_weights().items()})))


def test_position_buffers_are_left_out(good, tmp_path):
    buffers = {"embeddings.position_ids": np.arange(20)[None]}
    _same(good, read_model(_folder(tmp_path, bert_weights() | buffers)))


def _mlm(decoder: str) -> dict[str, np.ndarray]:
    weights = {f"bert.{n}": t for n, t in bert_weights().items() if "pooler" not in n}
    table = weights["bert.embeddings.word_embeddings.weight"]
    if decoder != "embedding":
        weights["cls.predictions.decoder.weight"] = table
    if decoder == "decoder":
        del weights["bert.embeddings.word_embeddings.weight"]
    bias = np.arange(40, dtype=np.float32)
    return weights | {
        "cls.predictions.bias": bias,
        "cls.predictions.decoder.bias": bias,
        "cls.predictions.transform.dense.weight": np.ones((16, 16), np.float32),
        "cls.predictions.transform.dense.bias": np.ones(16, np.float32),
        "cls.predictions.transform.LayerNorm.weight": np.ones(16, np.float32),
        "cls.predictions.transform.LayerNorm.bias": np.ones(16, np.float32),
    }


@pytest.mark.parametrize("decoder", ["embedding", "decoder", "both"])
def test_42_tied_decoder(decoder, tmp_path):
    settings = {"architectures": ["BertForMaskedLM"]}
    model = read_model(_folder(tmp_path, _mlm(decoder), **settings))
    assert set(model.params) == {"encoder", "mlm"}
    table = bert_weights()["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(model.params["encoder"]["embeddings"]["word"]["embedding"], table)


def test_42_an_encoder_that_was_trained_with_an_untied_decoder(tmp_path):
    settings = {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False}
    untied = {"cls.predictions.decoder.weight": np.ones((40, 16), np.float32)}
    folder = _folder(tmp_path, _mlm("both") | untied, **settings)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings=False .* an empty --heads"):
        read_model(folder)
    out = write_model(read_model(folder, heads=()), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_41_heads_are_read_as_asked(tmp_path):
    folder = _folder(tmp_path, _mlm("both"))
    assert set(read_model(folder).params) == {"encoder", "mlm"}
    assert set(read_model(folder, heads=()).params) == {"encoder"}
    with pytest.raises(CheckpointError, match=r"model\.safetensors has no pooler head"):
        read_model(folder, heads=("pooler",))


def test_41_next_sentences_are_told_from_the_pooler(good, tmp_path):
    """Without it the class in PyTorch would draw one at random."""
    head = {"kernel": np.ones((16, 2), np.float32), "bias": np.ones(2, np.float32)}
    both = dataclasses.replace(good, params=good.params | {"next_sentence": {"output": head}})
    kept = {"encoder", "pooler", "next_sentence"}
    for write in (write_model, write_orbax):
        folder = write(both, tmp_path / write.__name__)
        assert set(read_model(folder, heads=("next_sentence",)).params) == kept
    alone = {part: both.params[part] for part in ("encoder", "next_sentence")}
    with pytest.raises(CheckpointError, match="good has no pooler"):
        write_model(dataclasses.replace(good, params=alone), tmp_path / "out")
    weights = safetensors.numpy.load_file(tmp_path / "write_model" / "model.safetensors")
    unpooled = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    with pytest.raises(CheckpointError, match=r"missing pooler\.dense\.weight"):
        read_model(_folder(tmp_path, unpooled))


def test_41_the_encoder_alone_of_a_file_that_holds_more(good, tmp_path, capsys):
    more = {"foo.bar": np.ones(3, np.float32)}
    folder = _folder(tmp_path, bert_weights() | more, architectures=["BertForMaskedLM"])
    command = ["convert", str(folder), str(tmp_path / "out"), "--tokenizer", "none"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert "unknown foo.bar" in said and "convert it with an empty --heads" in said
    assert cli.main([*command, "--heads"]) == 0
    params = {"encoder": good.params["encoder"]}
    _same(dataclasses.replace(good, params=params), read_model(tmp_path / "out"))


@pytest.mark.parametrize(
    "name", ["embeddings.scale", "encoder.layer.0.gate.bias", "bert.foo.bar", "module.bert.foo.bar"]
)
def test_41_what_is_unknown_in_the_encoder_is_never_left_out(name, tmp_path):
    folder = _folder(tmp_path, bert_weights() | {name: np.ones(3, np.float32)})
    for heads in (None, ()):
        with pytest.raises(CheckpointError, match=f"unknown {name}") as refused:
            read_model(folder, heads=heads)
        assert "--heads" not in str(refused.value)


def test_one_classifier_name_for_two_heads(tmp_path):
    head = {
        "classifier.weight": np.ones((3, 16), np.float32),
        "classifier.bias": np.ones(3, np.float32),
    }
    folder = _folder(tmp_path, bert_weights() | head, architectures=[])
    with pytest.raises(
        CheckpointError, match="may belong to sequence_classifier or token_classifier"
    ):
        read_model(folder)
    found = read_model(folder, heads=("sequence_classifier",)).params
    assert found["sequence_classifier"]["output"]["kernel"].shape == (16, 3)
    assert set(read_model(folder, heads=("token_classifier", "pooler")).params) == {
        "encoder",
        "pooler",
        "token_classifier",
    }
    labels = {"id2label": {"0": "no", "1": "yes"}}
    (folder / "config.json").write_text(json.dumps(CONFIG | labels))
    with pytest.raises(CheckpointError, match="id2label has 2 labels, the sequence_classifier 3"):
        read_model(folder, heads=("sequence_classifier",))
    labels = {"id2label": {"0": "no", "1": "yes", "3": "perhaps"}}
    (folder / "config.json").write_text(json.dumps(CONFIG | labels))
    with pytest.raises(
        CheckpointError, match=r"id2label has keys '0', '1', '3'; .* are '0' to '2'"
    ):
        read_model(folder, heads=("sequence_classifier",))


def test_two_heads_fit_no_class(good, tmp_path):
    dense = {"kernel": np.ones((16, 3), np.float32), "bias": np.ones(3, np.float32)}
    span = {"kernel": np.ones((16, 2), np.float32), "bias": np.ones(2, np.float32)}
    params = good.params | {"token_classifier": {"output": dense}, "span": {"output": span}}
    two = Model(config=good.config, params=params)
    with pytest.raises(CheckpointError, match="at once: write one of them"):
        write_model(two, tmp_path / "out")
    lost = Model(config=good.config, params={"encoder": {}})
    with pytest.raises(CheckpointError, match="missing encoder/embeddings/word/embedding"):
        write_model(lost, tmp_path / "out")


def test_a_source_whose_path_is_no_text(good, tmp_path):
    """Names of files are bytes; the model card has what it can of them."""
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    (tmp_path / "good").rename(source)
    out = write_model(read_model(source), tmp_path / "out")
    _same(good, read_model(out))
    assert f"{tmp_path}/?" in (out / "README.md").read_text("utf-8")


# Dtypes


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, "mixed"])
def test_40_stored_dtypes(dtype, tmp_path):
    def store(index: int, tensor: np.ndarray) -> np.ndarray:
        mixed = (np.float32, np.float16, ml_dtypes.bfloat16)
        return tensor.astype(mixed[index % 3] if dtype == "mixed" else dtype)

    weights = {n: store(i, t) for i, (n, t) in enumerate(bert_weights().items())}
    model = read_model(_folder(tmp_path, weights))
    assert all(leaf.dtype == np.float32 for leaf in flatten(model.params).values())
    write_model(model, tmp_path / "out", dtype="source")
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in weights.items():
        expected = tensor.astype(np.float32) if tensor.dtype == np.float64 else tensor
        assert after[name].dtype == expected.dtype and after[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_written_dtypes(dtype, good, tmp_path):
    write_model(good, tmp_path / "out", dtype=dtype)
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for t in found.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    again = read_model(tmp_path / "out")
    assert check_round_trip(good, again) == 39
    again.params["encoder"]["layer_0"]["ffn"]["up"]["bias"][0] += 1
    with pytest.raises(CheckpointError, match="layer_0/ffn/up/bias reads back differently"):
        check_round_trip(good, again)


@pytest.mark.parametrize("to", ["huggingface", "orbax", "export"])
def test_39_nonfinite_weights_by_request(to, tmp_path):
    """Verified: what is NaN here and in PyTorch is no difference, what is so in one of them is."""
    weights = bert_weights()
    weights["pooler.dense.bias"][3] = np.nan
    folder = _folder(tmp_path, weights)
    run(
        ConvertConfig(
            source=str(folder),
            target=tmp_path / "out",
            to=to,
            tokenizer="none",
            allow_nonfinite=True,
            verify=True,
        ),
        report=lambda line: None,
    )
    x = np.float32([1, np.nan, np.inf])
    assert largest_difference(x, x) == 0
    assert np.isnan(largest_difference(x, np.float32([1, 1, np.inf])))
    assert largest_difference(x, np.float32([1, np.nan, -np.inf])) == np.inf
    if to != "huggingface":
        return
    after = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert after["pooler.dense.bias"].tobytes() == weights["pooler.dense.bias"].tobytes()


def test_nonfinite_parameters_are_not_written_unasked(good, tmp_path):
    """They were, and read_model refused the folder."""
    good.params["encoder"]["layer_0"]["ffn"]["up"]["bias"][0] = np.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinite in encoder/layer_0/ffn/up/bias"):
        write_model(good, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_model(good, tmp_path / "out", nonfinite="keep")


def test_a_choice_that_is_none_is_refused(good, tmp_path):
    write, read = map(inspect.unwrap, (write_model, read_model))  # from the types the tests check
    with pytest.raises(ConfigError, match=r"dtype is 'bf16', which is none of float32"):
        write(good, tmp_path / "out", dtype="bf16")
    with pytest.raises(ConfigError, match=r"nonfinite is 'kept', which is none of refuse, keep"):
        read(tmp_path, nonfinite="kept")


# Containers


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_other_names_of_torch_archives(suffix, good, tmp_path):
    file = _folder(tmp_path) / f"best{suffix}"
    ta.save(file, bert_weights())
    _same(good, read_model(file))


@pytest.mark.torch
def test_a_trainers_state_of_older_torch_says_what_to_save(tmp_path):
    torch = pytest.importorskip("torch")
    file = _folder(tmp_path) / "pytorch_model.bin"
    state = {"epoch": 3, "state_dict": {"a": torch.ones(4)}}
    torch.save(state, file, _use_new_zipfile_serialization=False)
    with pytest.raises(
        CheckpointError, match=r"'epoch' is a int, .* only the value of 'state_dict'"
    ):
        read_model(file)


def test_torch_archive_without_torch(good, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = _folder(tmp_path)
    ta.save(folder / "pytorch_model.bin", bert_weights())
    _same(good, read_model(folder))


@pytest.mark.torch
@pytest.mark.parametrize("form", ["zip", "protocol 4", "legacy", "transposed", "parameters"])
def test_torch_wrote_it(form, good, tmp_path):
    torch = pytest.importorskip("torch")
    state = {n: torch.tensor(t) for n, t in bert_weights().items()}
    if form == "transposed":
        state = {n: t.T.contiguous().T if t.ndim == 2 else t for n, t in state.items()}
    if form == "parameters":
        state = {n: torch.nn.Parameter(t) for n, t in state.items()}
    options = {"protocol 4": {"pickle_protocol": 4}}.get(form, {})
    folder = _folder(tmp_path)
    zipped = form != "legacy"
    torch.save(
        state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped, **options
    )
    _same(good, read_model(folder))


def test_bare_bin_with_its_config_and_vocabulary(good, tmp_path):
    """As Microsoft released MiniLM: three files with one stem, and a config without model_type."""
    folder = tmp_path / "release"
    folder.mkdir()
    config = {k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")}
    (folder / "minilm-config.json").write_text(json.dumps(config))
    ta.save(folder / "minilm.bin", {f"bert.{n}": t for n, t in bert_weights().items()})
    _vocabulary(folder / "minilm-vocab.txt")
    _same(good, read_model(folder / "minilm.bin"))
    out = run(
        ConvertConfig(source=str(folder / "minilm.bin"), target=tmp_path / "out"),
        report=lambda line: None,
    )
    assert (out / "vocab.txt").read_text() == (folder / "minilm-vocab.txt").read_text()
    assert json.loads((out / "config.json").read_text())["model_type"] == "bert"


def _vocabulary(file: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghi")]
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]) + "\n")


@pytest.mark.parametrize("wrapped", ["bare", "params"])
def test_old_flax_model(wrapped, good, tmp_path):
    from flax.serialization import msgpack_serialize

    tree: dict = {}
    for name, tensor in bert_weights().items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if "embeddings" in parents[-1]:
            node["embedding"] = tensor
        elif last == "weight" and tensor.ndim == 2:
            node["kernel"] = np.ascontiguousarray(tensor.T)
        else:
            node["scale" if last == "weight" else last] = tensor
    folder = _folder(tmp_path)
    raw = msgpack_serialize({"params": tree} if wrapped == "params" else tree)
    (folder / "flax_model.msgpack").write_bytes(raw)
    _same(good, read_model(folder))
    (folder / "flax_model.msgpack").write_bytes(raw[:-1])
    with pytest.raises(CheckpointError, match=r"flax_model\.msgpack"):
        read_model(folder)


def test_shards_out_and_in(good, tmp_path):
    write_model(good, tmp_path / "out", max_shard_bytes=4000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "out" / "model.safetensors").exists()
    assert all(f"-of-{len(shards):05}." in shard.name for shard in shards)
    again = read_model(tmp_path / "out")
    _same(good, again)
    assert again.fingerprint == read_model(tmp_path / "out", sha256=again.fingerprint).fingerprint
    shards[0].write_bytes(shards[0].read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(CheckpointError, match="it is not the file you meant"):
        read_model(tmp_path / "out", sha256=again.fingerprint)


def test_an_index_may_name_a_single_shard(good, tmp_path):
    folder = write_model(good, tmp_path / "out")
    shard = folder / "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(shard)
    index = {"weight_map": dict.fromkeys(safetensors.numpy.load_file(shard), shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _same(good, read_model(folder))


@pytest.mark.torch
def test_pytorch_loads_shards(good, tmp_path):
    pytest.importorskip("torch")
    from minilm_jax.convert.verify import compare_with_torch

    write_model(good, tmp_path / "out", max_shard_bytes=4000)
    found = compare_with_torch(good, tmp_path / "out", architecture="BertModel")
    assert len(found) == 4 and all(row.agrees for row in found)


def test_orbax_both_ways(good, tmp_path):
    write_orbax(good, tmp_path / "orbax")
    again = read_model(tmp_path / "orbax")
    _same(good, again)
    assert again.config == good.config
    with pytest.raises(CheckpointError, match="expected 00"):
        read_model(tmp_path / "orbax", sha256="00")
    assert set(read_model(tmp_path / "orbax", heads=()).params) == {"encoder"}
    # One break that is met before anything is read: reads that fail at once in many threads leave
    # exceptions behind in orbax's event loop.
    (tmp_path / "orbax" / "params" / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match="params cannot be read"):
        read_model(tmp_path / "orbax")


def test_39_nonfinite_weights_of_an_orbax_folder(good, tmp_path):
    good.params["encoder"]["layer_0"]["ffn"]["up"]["bias"][0] = np.nan
    write_orbax(good, tmp_path / "orbax")
    with pytest.raises(
        CheckpointError, match=r"orbax holds NaN .* encoder/layer_0/ffn/up/bias \(1 "
    ):
        read_model(tmp_path / "orbax")
    _same(good, read_model(tmp_path / "orbax", nonfinite="keep"))


def test_export_is_free_in_batch_and_length(good, tmp_path):
    write_export(good, tmp_path / "export")
    function = load_export(tmp_path / "export")
    for rows, length in ((1, 1), (3, 20)):
        batch = random_batch(good, rows=rows, length=length)
        found = function(batch)
        for name, expected in outputs(good.config, good.params, **batch).items():
            np.testing.assert_allclose(found[name], expected, atol=1e-5)
    # A sentence model's export embeds, and what makes its ids lies beside it.
    sentence = Sentence(pooling="mean", normalize=True, max_length=12)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n")
    write_export(
        dataclasses.replace(good, sentence=sentence),
        tmp_path / "sentences",
        tokenizer_files=(vocabulary,),
    )
    found = load_export(tmp_path / "sentences")(batch)
    last, kept = found[f"hidden_{good.config.num_hidden_layers}"], batch["segments"] > 0
    for row, embedding in enumerate(found["embedding"]):
        mean = np.asarray(last)[row][kept[row]].mean(0)
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-5)
    assert (tmp_path / "sentences/vocab.txt").read_text() == "[PAD]\n"
    readme = (tmp_path / "sentences/README.md").read_text()
    assert "embedding" in readme and '"max_length": 12}' in readme and "lower()" not in readme
    other = dataclasses.replace(sentence, lower_case=True, include_prompt=False)
    write_export(
        dataclasses.replace(good, sentence=other), tmp_path / "other", tokenizer_files=(vocabulary,)
    )
    readme = (tmp_path / "other/README.md").read_text()
    assert "tokenizer([text.lower() for text in texts], **settings" in readme
    assert "leaves those of a prompt out" in readme
    (tmp_path / "export" / "model.jaxexport").write_bytes(b"not a function")
    with pytest.raises(CheckpointError, match="is no exported function"):
        load_export(tmp_path / "export")


def test_a_cards_licence_travels_along(good, tmp_path):
    write_model(good, tmp_path / "first")
    head = "license: mit\nlanguage:\n- en\n- de\ntags:\n  - bert\n"
    card = tmp_path / "first/README.md"
    card.write_text(
        f"---\nwidget: [a]\n{head}model-index:\n- a: 1\nco2: 3\n# note\nlibrary_name: x\n---\n# A\n"
    )
    write_model(read_model(tmp_path / "first"), tmp_path / "second")
    assert (
        (tmp_path / "second/README.md")
        .read_text()
        .startswith(f"---\nlibrary_name: transformers\n{head}---\n")
    )
    write_orbax(read_model(tmp_path / "first"), tmp_path / "orbax")
    write_model(read_model(tmp_path / "orbax"), tmp_path / "back")
    assert f"\n{head}---\n" in (tmp_path / "back/README.md").read_text()
    # What was trained from them has their licence, and a card that says what it is.
    trained, origin = read_model(tmp_path / "first"), {"task": "a | b", "steps": "3"}
    write_model(trained, tmp_path / "third", origin=origin)
    card = (tmp_path / "third/README.md").read_text()
    assert "\nlicense: mit\nlanguage:\n- en\n- de\n---\n" in card and "| source |" not in card
    write_model(read_model(tmp_path / "third"), tmp_path / "fourth")
    card = (tmp_path / "fourth/README.md").read_text()
    assert f"| source | {tmp_path}/third |" in card
    assert "| task | a \\| b |\n| steps | 3 |\n| written by |" in card


# Configurations


def test_46_roberta_numbers_positions_from_pad_plus_one(tmp_path):
    roberta = _folder(
        tmp_path, bert_weights(), model_type="roberta", architectures=["RobertaModel"]
    )
    config = read_model(roberta).config
    assert (config.position_offset, config.max_length, config.pad_token_id) == (1, 19, 0)


def test_46_xlm_r_under_the_name_of_roberta(tmp_path):
    promised = ["XLMRobertaForQuestionAnswering"]
    folder = _folder(tmp_path, bert_weights(), model_type="roberta", architectures=promised)
    with pytest.raises(CheckpointError, match=r"missing qa_outputs\.weight"):
        read_model(folder)


def test_47_one_token_type(tmp_path):
    weights = bert_weights()
    weights["embeddings.token_type_embeddings.weight"] = np.ones((1, 16), np.float32)
    assert read_model(_folder(tmp_path, weights, type_vocab_size=1)).config.type_vocab_size == 1


def test_48_padded_vocabulary_that_config_knows(tmp_path):
    weights = bert_weights()
    weights["embeddings.word_embeddings.weight"] = np.ones((48, 16), np.float32)
    folder = _folder(tmp_path, weights, vocab_size=48)
    _vocabulary(folder / "vocab.txt")
    out = run(ConvertConfig(source=str(folder), target=tmp_path / "out"), report=lambda line: None)
    assert read_model(out).config.vocab_size == 48


def test_settings_that_say_no_shape_travel_along(good, tmp_path):
    folder = _folder(tmp_path, bert_weights(), task_specific_params={"a": 1}, _name_or_path="x/y")
    write_model(read_model(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["task_specific_params"] == {"a": 1} and "_name_or_path" not in config


# Tokenizers


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    words = ["the", "small", "student", "learns", "from", "a", "large", "teacher", "attention"]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 9)) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=120,
        model_type="unigram",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "sentencepiece.bpe.model"


def test_multilingual_minilm_layout(sentencepiece_model, tmp_path):
    """A BERT with XLM-R's tokenizer: AutoTokenizer alone gives a vocabulary of five entries."""
    from transformers import AutoTokenizer

    weights = bert_weights()
    table = np.random.default_rng(1).normal(size=(60, 16)).astype(np.float32)
    weights["embeddings.word_embeddings.weight"] = table
    folder = _folder(tmp_path, weights, vocab_size=60)
    (folder / "sentencepiece.bpe.model").write_bytes(sentencepiece_model.read_bytes())
    out = run(ConvertConfig(source=str(folder), target=tmp_path / "out"), report=lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "the small student learns from a large teacher"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) > 25 and tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.model_max_length == 20

    from minilm_jax.data.tokenizers import load_tokenizer

    ours = load_tokenizer(out, vocab_size=60)
    assert ours.build(ours.encode([text])[0]).ids == ids
    assert (tokenizer.pad_token_id, read_model(out).config.pad_token_id) == (1, 0)


def test_written_tokenizer_is_the_source(tmp_path):
    from transformers import AutoTokenizer

    folder = _folder(tmp_path, bert_weights())
    _vocabulary(folder / "vocab.txt")
    out = run(ConvertConfig(source=str(folder), target=tmp_path / "out"), report=lambda line: None)
    assert AutoTokenizer.from_pretrained(out).tokenize("Abc") == ["a", "##b", "##c"]


def test_a_tokenizer_of_other_rules_travels_along(tmp_path):
    folder = _folder(tmp_path, bert_weights())
    _vocabulary(folder / "vocab.txt")
    settings = '{"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}'
    (folder / "tokenizer_config.json").write_text(settings)
    out = run(ConvertConfig(source=str(folder), target=tmp_path / "out"), report=lambda line: None)
    for name in ("vocab.txt", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


# Sentence embeddings


@pytest.mark.parametrize("through", [write_model, write_orbax])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_settings_travel_along(through, pooling, normalize, good, tmp_path):
    sentence = Sentence(
        pooling=pooling,
        normalize=normalize,
        max_length=12,
        lower_case=normalize,
        include_prompt=not normalize,
        settings={"prompts": {"query": "query: "}, "similarity_fn_name": "dot"},
    )
    write_model(dataclasses.replace(good, sentence=sentence), tmp_path / "out")
    again = read_model(through(read_model(tmp_path / "out"), tmp_path / "between"))
    assert again.sentence == sentence
    write_model(again, tmp_path / "again")
    for name in SENTENCE_FILES:
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_limits_of_older_sentence_transformers(good, tmp_path):
    sentence = Sentence(pooling="mean", normalize=False, max_length=12, lower_case=True)
    out = write_model(dataclasses.replace(good, sentence=sentence), tmp_path / "out")
    (out / "sentence_bert_config.json").rename(out / "sentence_roberta_config.json")
    assert read_model(out).sentence == sentence
    (out / "sentence_roberta_config.json").write_text('{"do_lower_case": "no"}')
    with pytest.raises(CheckpointError, match=r"roberta_config\.json: do_lower_case='no' is not"):
        read_model(out)


@pytest.mark.parametrize("said, length", [(12, 12), (10**30, 20), (1e30, 20), (None, 20)])
def test_without_a_limit_the_tokenizers_holds(good, tmp_path, said, length):
    """As sentence-transformers looks for one."""
    sentence = Sentence(pooling="mean", normalize=False, max_length=16)
    out = write_model(dataclasses.replace(good, sentence=sentence), tmp_path / "out")
    (out / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
    assert read_model(out).sentence.max_length == 16
    (out / "sentence_bert_config.json").unlink()
    assert read_model(out).sentence.max_length == length


def test_unknown_pooling_is_refused(good, tmp_path):
    sentence = Sentence(pooling="mean", normalize=False, max_length=12)
    out = write_model(dataclasses.replace(good, sentence=sentence), tmp_path / "out")
    file = out / "1_Pooling" / "config.json"
    file.write_text(
        file.read_text().replace(
            '"pooling_mode_max_tokens": false', '"pooling_mode_max_tokens": true'
        )
    )
    with pytest.raises(CheckpointError, match="is neither mean nor cls alone"):
        read_model(out)
    (out / "modules.json").write_text('[{"type": "evil.Module", "path": ""}]')
    with pytest.raises(CheckpointError, match="delete the file to convert the encoder alone"):
        read_model(out)


# The Hub


def test_partial_snapshot_is_refused(tmp_path, monkeypatch):
    """Without a network the library hands out what an interrupted download left."""
    import huggingface_hub

    folder = _folder(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors"):
        read_model("org/name")
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks model-1.safetensors: an earlier download"):
        read_model("org/name")


def test_hub_cache_links_to_its_blobs(good, tmp_path, monkeypatch):
    import huggingface_hub

    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    write_model(good, snapshot, max_shard_bytes=4000)
    (cache / "blobs").mkdir()
    for index, file in enumerate(sorted(snapshot.iterdir())):
        blob = cache / "blobs" / str(index)
        file.rename(blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    calls = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _same(good, read_model("org/name@main"))
    ((name, revision, patterns),) = calls
    assert (name, revision) == ("org/name", "main")
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in patterns)


def test_a_hub_id_gives_what_its_folder_gives(good, tmp_path, monkeypatch):
    """Everything that reading uses is fetched, and no more."""
    import huggingface_hub

    settings = {"prompts": {"query": "query: "}}
    sentence = Sentence(pooling="cls", normalize=True, max_length=12, settings=settings)
    hosted = write_model(dataclasses.replace(good, sentence=sentence), tmp_path / "hosted")
    for name in (*TOKENIZER_FILES, "modeling.py", "pytorch_model.bin", "onnx.model"):
        (hosted / name).touch()

    def download(name, *, revision, allow_patterns):
        fetched = tmp_path / "fetched"
        for file in hosted.rglob("*"):
            relative = file.relative_to(hosted)
            if any(fnmatch.fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (fetched / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, fetched / relative)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = read_model("org/name")
    _same(good, model)
    assert model.sentence == sentence
    assert model.tokenizer_folder is not None
    there = {str(f.relative_to(tmp_path / "fetched")) for f in model.tokenizer_folder.rglob("*.*")}
    expected = {"config.json", "model.safetensors", "README.md"}
    assert there == {*expected, *TOKENIZER_FILES, *SENTENCE_FILES}


def test_a_hub_ids_tokenizer_is_fetched_without_its_weights(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(name, *, revision, allow_patterns):
        calls.append((name, revision, set(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve_tokenizer(Path("org/name@v2")) == tmp_path
    assert calls == [("org/name", "v2", set(TOKENIZER_FILES))]
    assert hub.resolve_tokenizer(tmp_path) == tmp_path and len(calls) == 1
    with pytest.raises(CheckpointError, match="does not exist, and is not an id"):
        hub.resolve_tokenizer(tmp_path / "none")


def test_offline_hub_is_one_sentence(monkeypatch):
    import huggingface_hub
    import huggingface_hub.errors

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"cannot be fetched from the Hub: no connection$"):
        hub.resolve("org/name")


def test_what_cannot_be_a_path_is_one_sentence(good, tmp_path):
    for source, said in (
        ("", "the source is empty"),
        ("x" * 5000, r"x+ cannot be looked for: File name too long"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=said) as error:
            read_model(source)
        assert len(str(error.value)) < 300
    for target, said in (("a\0b", "cannot be a folder"), ("x" * 5000, "cannot be written")):
        with pytest.raises(CheckpointError, match=said):
            write_model(good, tmp_path / target)


def test_threads_that_write_one_folder_do_so_in_turn(good, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_model(good, tmp_path / "out"), range(8)))
    _same(good, read_model(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "out"]


@pytest.mark.parametrize(
    "source", ["no/such/folder/here", "./nothing", "/nothing", "~nobody/x", "~no such user/x"]
)
def test_what_is_no_hub_id_is_not_looked_up(source):
    with pytest.raises(CheckpointError, match="does not exist"):
        hub.resolve(source)
