"""Broken and hostile checkpoints, by number: one named error each, no output, bounded memory.

Every case goes through the command line; 39 to 50 also hold cases that must work, which are in
test_forms.py.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch_archive as ta
from small_models import save_weights, small_bert

from minilm_jax import cli
from minilm_jax.convert.folder import read_model, write_model
from minilm_jax.errors import CheckpointError

_SECONDS = 10.0
_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Bad:
    """One broken source: `build` breaks a good folder and may return what to pass instead."""

    number: int
    what: str
    says: str
    build: Callable[[Path], object]
    options: tuple[str, ...] = ()


CASES: list[Bad] = []


def bad(number: int, what: str, says: str, *options: str):
    def register(build):
        CASES.append(Bad(number, what, says, build, options))
        return build

    return register


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _raw(folder: Path, raw: bytes) -> None:
    _weights(folder).write_bytes(raw)


def _header(folder: Path, header: bytes | dict, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    _raw(folder, struct.pack("<Q", len(raw)) + raw + data)


def _entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# safetensors

bad(1, "empty file", "0 bytes")(lambda f: _raw(f, b""))
bad(1, "seven bytes", "7 bytes")(lambda f: _raw(f, b"1234567"))
bad(2, "header longer than the file", "has only")(lambda f: _raw(f, struct.pack("<Q", 999) + b"{}"))
bad(3, "header over 100 MB", "declares a header")(
    lambda f: _raw(f, struct.pack("<Q", 10**9) + b"{}")
)
bad(3, "header of 2^64-1 bytes", "declares a header")(lambda f: _raw(f, b"\xff" * 8 + b"{}"))
bad(4, "header not UTF-8", "not valid JSON")(lambda f: _header(f, b'{"\xff\xfe": 1}'))
bad(5, "header no object", "does not start with")(lambda f: _header(f, b"[1]"))
bad(5, "header no JSON", "not valid JSON")(lambda f: _header(f, b"{weights}"))
bad(6, "deep nesting", "nested too deeply")(
    lambda f: _header(f, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
)
bad(6, "100,000 entries", "declares a header")(
    lambda f: _header(f, {f"t{i}": _entry("F32", [1], 4 * i, 4 * i + 4) for i in range(100_000)})
)
bad(6, "25,000 entries", "names 25,000 tensors")(
    lambda f: _header(f, {f"t{i}": _entry("F32", [1], 4 * i, 4 * i + 4) for i in range(25_000)})
)
bad(7, "duplicate keys", "'a' stands twice")(
    lambda f: _header(f, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"1234")
)
bad(8, "dtype F8_E4M3", "'F8_E4M3'")(
    lambda f: _header(f, {"a": _entry("F8_E4M3", [4], 0, 4)}, b"1234")
)
bad(8, "dtype F4", "'F4'")(lambda f: _header(f, {"a": _entry("F4", [8], 0, 4)}, b"1234"))
bad(9, "negative offset", "data_offsets are")(
    lambda f: _header(f, {"a": _entry("F32", [1], -4, 0)}, b"1234")
)
bad(9, "reversed offsets", "data_offsets are")(
    lambda f: _header(f, {"a": _entry("F32", [1], 4, 0)}, b"1234")
)
bad(9, "overlap", "overlaps its neighbour")(
    lambda f: _header(f, {"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [2], 4, 12)}, b"1" * 12)
)
bad(9, "gap", "leaves a gap")(
    lambda f: _header(f, {"a": _entry("F32", [1], 0, 4), "b": _entry("F32", [1], 8, 12)}, b"1" * 12)
)
bad(10, "offsets behind the end", "truncated")(
    lambda f: _header(f, {"a": _entry("F32", [1000], 0, 4000)}, b"1234")
)
bad(11, "shape does not fit the bytes", "needs 8 bytes")(
    lambda f: _header(f, {"a": _entry("F32", [2], 0, 4)}, b"1234")
)
bad(12, "shape product overflows 64 bits", "impossible shape")(
    lambda f: _header(f, {"a": _entry("F32", [4194305, 4194305, 211106198978564], 0, 4)}, b"1234")
)
bad(13, "last bytes missing", "truncated")(lambda f: _raw(f, _weights(f).read_bytes()[:-3]))
bad(14, "bytes behind the end", "belong to no tensor")(
    lambda f: _raw(f, _weights(f).read_bytes() + b"PK\x05\x06" + b"\0" * 18)
)
bad(15, "empty tensors sharing a place", "impossible shape")(
    lambda f: _header(f, {"a": _entry("F32", [0], 0, 0), "b": _entry("F32", [0], 0, 0)})
)
bad(16, "metadata of numbers", "__metadata__")(lambda f: _header(f, {"__metadata__": {"a": 1}}))
bad(18, "Git LFS pointer", "Git LFS pointer")(
    lambda f: _raw(f, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
)
for _suffix in ("safetensors", "bin"):
    for _what, _start in (
        ("an HTML page", b"<!DOCTYPE html><html>404</html>"),
        ("a gzip archive", b"\x1f\x8b\x08" + b"\0" * 40),
        ("a 7z archive", b"7z\xbc\xaf\x27\x1c" + b"\0" * 40),
    ):

        def _disguise(folder: Path, suffix: str = _suffix, start: bytes = _start) -> None:
            _weights(folder).unlink()
            name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
            (folder / name).write_bytes(start)

        bad(19, f"{_what} named .{_suffix}", _what)(_disguise)


# pickle


def _bin(folder: Path, values: dict[str, bytes], storages: dict[str, bytes] | None = None, **more):
    _weights(folder).unlink()
    ta.archive(folder / "pytorch_model.bin", values, storages or {}, **more)


_GOOD = ta.tensor("0", 4, shape=(4,), strides=(1,))
_FOUR = {"0": b"\0" * 16}


@bad(20, "a pickle that runs a command", "'posix.system'")
def _(folder):
    evil = ta.name("posix", "system") + b"(" + ta.text(f"touch {folder}/executed") + b"tR"
    _bin(folder, {"a": evil})


@bad(20, "a pickle that calls eval by STACK_GLOBAL", "'builtins.eval'")
def _(folder):
    evil = ta.text("builtins") + ta.text("eval") + b"\x93(" + ta.text("1") + b"tR"
    _bin(folder, {"a": evil})


bad(20, "an instruction no state dict needs", "instruction INST")(
    lambda f: _bin(f, {"a": b"(iposix\nsystem\n"})
)


@bad(21, "legacy file whose second stream runs a command", "pytorch_model.bin")
def _(folder):
    if importlib.util.find_spec("torch"):
        import torch  # noqa: F401  Its import is neither the time nor the memory of reading.
    _weights(folder).unlink()
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    evil = (
        b"\x80\x02" + ta.name("posix", "system") + ta.text(f"touch {folder}/executed") + b"\x85R."
    )
    (folder / "pytorch_model.bin").write_bytes(magic + b"\x80\x02M\xe9\x03." + evil + evil)


@bad(22, "data.pkl twice", "twice")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def _(folder):
    with pytest.warns(UserWarning, match="Duplicate name"):
        _bin(folder, {"a": _GOOD}, _FOUR, extra={"archive/data.pkl": ta.program({})})


bad(22, "DATA.PKL beside data.pkl", "twice")(
    lambda f: _bin(f, {"a": _GOOD}, _FOUR, extra={"archive/DATA.PKL": ta.program({})})
)
bad(22, "data.pkl in two folders", "exactly one")(
    lambda f: _bin(f, {"a": _GOOD}, _FOUR, extra={"other/data.pkl": ta.program({})})
)
bad(23, "zip bomb", "is compressed")(
    lambda f: _bin(f, {"a": _GOOD}, {"0": b"\0" * 10**7}, compression=zipfile.ZIP_DEFLATED)
)


@bad(24, "bad checksum", "checksum")
def _(folder):
    _bin(folder, {"a": _GOOD}, {"0": b"ABCDEFGHIJKLMNOP"})
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes().replace(b"ABCDEFGH", b"ABCDEFGX"))


@bad(24, "encryption flag", "zip flags")
def _(folder):
    _bin(folder, {"a": _GOOD}, _FOUR)
    raw = bytearray((folder / "pytorch_model.bin").read_bytes())
    raw[raw.rindex(b"PK\x01\x02") + 8] |= 1
    (folder / "pytorch_model.bin").write_bytes(raw)


@bad(24, "bytes behind the archive", "behind its end")
def _(folder):
    _bin(folder, {"a": _GOOD}, _FOUR)
    with (folder / "pytorch_model.bin").open("ab") as file:
        file.write(b"trailing")


bad(25, "name that leads out", "leads out")(
    lambda f: _bin(f, {"a": _GOOD}, _FOUR, extra={"../evil": b""})
)
bad(25, "absolute name", "leads out")(lambda f: _bin(f, {"a": _GOOD}, _FOUR, extra={"/evil": b""}))
bad(26, "offset beyond the storage", "beyond its storage")(
    lambda f: _bin(f, {"a": ta.tensor("0", 4, offset=2, shape=(4,), strides=(1,))}, _FOUR)
)
bad(26, "strides beyond the storage", "beyond its storage")(
    lambda f: _bin(f, {"a": ta.tensor("0", 4, shape=(2, 2), strides=(100, 1))}, _FOUR)
)
bad(26, "terabytes of one number", "beyond its storage")(
    lambda f: _bin(f, {"a": ta.tensor("0", 4, shape=(10**6, 10**6), strides=(0, 0))}, _FOUR)
)
bad(26, "negative stride", "impossible strides")(
    lambda f: _bin(f, {"a": ta.tensor("0", 4, shape=(4,), strides=(-1,))}, _FOUR)
)
bad(26, "storage of another size", "its storage has")(
    lambda f: _bin(f, {"a": ta.tensor("0", 400, shape=(4,), strides=(1,))}, _FOUR)
)
bad(26, "missing storage", "which the archive lacks")(lambda f: _bin(f, {"a": _GOOD}))
for _kind in ("_rebuild_sparse_tensor", "_rebuild_qtensor"):
    bad(26, f"{_kind}", _kind)(
        lambda f, kind=_kind: _bin(
            f, {"a": ta.tensor("0", 4, shape=(4,), strides=(1,), rebuild=kind)}, _FOUR
        )
    )


def _stored_in(key: bytes) -> bytes:
    """Returns the instructions of a tensor whose storage is named by what `key` makes."""
    whole = ta.tensor("0", 4, shape=(4,), strides=(1,))
    return whole.replace(ta.text("0"), key)


def _twice(put: bytes, *, levels: int) -> bytes:
    """Returns instructions that `put` the value on the stack and itself into another, often."""
    return b"".join(b"q%ch%c" % (level, level) + put for level in range(levels))


for _what, _says, _value in (
    ("tuples", "nested more deeply", b")" + _twice(b"\x86", levels=60)),
    ("lists", "named by a list", b"](" * 60 + b"]" + _twice(b"e", levels=60)),
    ("200,000 tuples", "nested more deeply", b")" + b"\x85" * 200_000),
):
    bad(26, f"a storage whose name is nested {_what}", _says)(
        lambda f, value=_value: _bin(f, {"a": _stored_in(value)}, _FOUR)
    )
bad(26, "a shape of 1,000 numbers", "a tuple of 1,000 values")(
    lambda f: _bin(f, {"a": _GOOD.replace(ta.numbers((4,)), b"(" + b"K\x01" * 1000 + b"t")}, _FOUR)
)
bad(26, "a shape that is a list", "shape or strides that are no tuple")(
    lambda f: _bin(f, {"a": _GOOD.replace(ta.numbers((4,)), b"](K\x04e")}, _FOUR)
)
bad(27, "a number among the tensors", "'epoch' is a int")(
    lambda f: _bin(f, {"a": _GOOD, "epoch": ta.number(3)}, _FOUR)
)
_STATE = {
    "epoch": ta.number(3),
    "state_dict": b"}(" + ta.text("a") + _GOOD + b"u",
    "optimizer": b"}(K\x00" + _GOOD + b"u",
}
bad(27, "a trainer's state", "'epoch' is a int, .* save only the value of 'state_dict'")(
    lambda f: _bin(f, _STATE, _FOUR)
)
bad(27, "a whole module", "transformers.models.bert")(
    lambda f: _bin(f, {"a": ta.name("transformers.models.bert", "BertModel")})
)
bad(28, "TorchScript archive", "TorchScript")(
    lambda f: _bin(f, {"a": _GOOD}, _FOUR, extra={"archive/constants.pkl": b""})
)
bad(28, "exported program", "exported program")(
    lambda f: _bin(f, {"a": _GOOD}, _FOUR, extra={"archive/archive_format": b"pt2"})
)


# index and config


def _index(folder: Path, weight_map: dict | None = None, **more) -> dict[str, Path]:
    """Splits the folder's weights into two shards; returns nothing the index does not say."""
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(_weights(folder))
    _weights(folder).unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        safetensors.numpy.save_file({n: tensors[n] for n in held}, folder / shard)
    mapping = {n: shard for shard, held in shards.items() for n in held}
    index = {"weight_map": mapping | (weight_map or {})} | more
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {shard: folder / shard for shard in shards}


for _what, _name in {
    "dots": "../outside.safetensors",
    "absolute": "/etc/passwd",
    "URL": "https://example.com/a.safetensors",
    "NUL": "a\0.safetensors",
    "backslash": "..\\a.safetensors",
    "an index": "model.safetensors.index.json",
}.items():
    bad(29, f"shard name with {_what}", "no plain file name")(
        lambda f, name=_name: _index(f, {"embeddings.word_embeddings.weight": name})
    )


@bad(29, "shard that links out of the folder", "leads out of the folder")
def _(folder):
    shards = _index(folder)
    outside = folder.parent / "outside.safetensors"
    shards["a.safetensors"].rename(outside)
    shards["a.safetensors"].symlink_to(outside)


bad(30, "missing shard", "b.safetensors is missing")(lambda f: _index(f)["b.safetensors"].unlink())


@bad(31, "tensor in two shards", "is in two shards")
def _(folder):
    import safetensors.numpy

    shards = _index(folder)
    both = {n: t for s in shards.values() for n, t in safetensors.numpy.load_file(s).items()}
    safetensors.numpy.save_file(both, shards["a.safetensors"])


bad(32, "listed but absent", "surprise is not in a.safetensors")(
    lambda f: _index(f, {"surprise": "a.safetensors"})
)


@bad(32, "there but not listed", "not listed")
def _(folder):
    _index(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].popitem()
    file.write_text(json.dumps(index))


bad(33, "total_size too small", "total_size=12")(lambda f: _index(f, metadata={"total_size": 12}))
bad(33, "total_size no number", "total_size='big'")(
    lambda f: _index(f, metadata={"total_size": "big"})
)
for _changes, _says in (
    ({"hidden_size": 10**12}, "hidden_size"),
    ({"hidden_size": -16}, "hidden_size"),
    ({"hidden_size": 16.0}, "hidden_size=16.0 is not an integer"),
    ({"hidden_size": True}, "hidden_size=True is not an integer"),
    ({"hidden_size": "16"}, "hidden_size='16'"),
    ({"num_attention_heads": 3}, "does not divide"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
    ({"layer_norm_eps": "tiny"}, "layer_norm_eps='tiny'"),
    ({"layer_norm_eps": 0.0}, "layer_norm_eps"),
    ({"model_type": "gpt2"}, "model_type='gpt2'"),
    ({"model_type": ["bert"]}, "model_type="),
    ({"model_type": "distilbert"}, "config.json: dim is missing"),
    ({"hidden_act": "swish"}, "hidden_act='swish'"),
    ({"hidden_act": ["gelu"]}, "hidden_act="),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ({"is_decoder": True}, "is_decoder=True"),
    ({"architectures": 3}, "architectures=3"),
    ({"pad_token_id": 40}, "pad_token_id=40 is no row of the 40"),
    ({"id2label": ["no", "yes"]}, "id2label=.* is no object"),
    ({"architectures": ["RobertaModel"]}, "RobertaModel, a class of roberta, but .* is bert"),
):
    bad(34, f"config {_changes}", _says)(lambda f, changes=_changes: _edit_config(f, **changes))


@bad(26, "quantised weights", "quantization_config says that the weights are quantised")
def _(folder):
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    _edit_config(folder, quantization_config=settings)


@bad(41, "an adapter beside the model", "adapter_config.json: the folder holds an adapter")
def _(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@bad(41, "an adapter without its model", "adapter_config.json: the folder holds an adapter")
def _(folder):
    _weights(folder).rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder / "adapter_config.json")


@bad(34, "config with NaN", "NaN is not a JSON number")
def _(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace("1e-12", "NaN"))


@bad(34, "config with an infinite number", "layer_norm_eps=inf")
def _(folder):
    file = folder / "config.json"
    file.write_text(file.read_text().replace("1e-12", "1e999"))


for _what, _name, _says in (
    ("TensorFlow's", "tf_model.h5", "tf_model.h5 is TensorFlow's"),
    ("an export's", "model.jaxexport", "an exported function, which is not read back"),
    ("a variant's", "model.fp16.safetensors", "name one of its files instead: model.fp16.s"),
    ("a trainer's", "training_args.bin", r"flax_model.msgpack.index.json$"),
):
    bad(30, f"{_what} files alone", _says)(lambda f, name=_name: _weights(f).rename(f / name))


@bad(30, "a trainer's folder of checkpoints", "config.json cannot be .* instead: checkpoint-500")
def _(folder):
    (folder / "checkpoint-500").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "checkpoint-500" / name)


@bad(30, "a run's folder, whose config is the run's", "holds none of .* folders instead: best$")
def _(folder):
    (folder / "best").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "best" / name)
    (folder / "config.json").write_text('{"task": "rte", "model": "m"}')


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
bad(18, "Git LFS pointer for a config", "config.json does not match .* Git LFS pointer")(
    lambda f: (f / "config.json").write_bytes(_LFS)
)
bad(
    18, "LFS for a tokenizer", "bpe.model does not match .* Git LFS pointer", "--tokenizer", "copy"
)(lambda f: (f / "sentencepiece.bpe.model").write_bytes(_LFS))
bad(34, "config of 17 MB", "too large")(
    lambda f: (f / "config.json").write_bytes(b'{"a":"' + b"x" * 17 * 2**20 + b'"}')
)
bad(34, "no config", "no such file; copy it from where the weights came$")(
    lambda f: (f / "config.json").unlink()
)


@bad(30, "the checkpoints of a run", "it holds training states, .* the folder student/ or best/")
def _(folder):
    for file in folder.iterdir():
        file.unlink()
    (folder / "1000").mkdir()
    (folder / "1000/_CHECKPOINT_METADATA").write_text("{}")


bad(35, "byte order mark", "byte order mark")(
    lambda f: (f / "config.json").write_bytes(b"\xef\xbb\xbf" + (f / "config.json").read_bytes())
)
bad(35, "duplicate key in config", "'hidden_size' stands twice")(
    lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().replace("{", '{"hidden_size": 8, ', 1)
    )
)
bad(36, "vocabulary smaller than its table", r"embeddings.word_embeddings.weight: \[40, 16\]")(
    lambda f: _edit_config(f, vocab_size=39)
)
bad(37, "no tokenizer", "has no tokenizer", "--tokenizer", "copy")(lambda f: None)
bad(
    37,
    "tokenizer of another model",
    "the model only 40 .*; --tokenizer none",
    "--tokenizer",
    "copy",
)(
    lambda f: (f / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(90))])
    )
)


@bad(38, "custom code", "never executed")
def _(folder):
    _edit_config(folder, auto_map={"AutoModel": "evil.Model"})
    (folder / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")


# semantics


def _edit(folder: Path, change: Callable[[dict], dict]) -> None:
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(_weights(folder))
    save_weights(_weights(folder), change(tensors))


_QUERY = "encoder.layer.1.attention.self.query"


def _spoil(value: float) -> Callable[[dict], dict]:
    def change(tensors: dict) -> dict:
        tensors[f"{_QUERY}.weight"][0, :3] = value
        return tensors

    return change


bad(39, "NaN weights", r"query.weight \(3 of 256\)")(lambda f: _edit(f, _spoil(np.nan)))
bad(39, "infinite weights", r"query.weight \(3 of 256\)")(lambda f: _edit(f, _spoil(-np.inf)))
bad(40, "too large for fp16", "too large for float16", "--dtype", "float16")(
    lambda f: _edit(f, _spoil(1e6))
)
bad(40, "fp64 too large for fp32", "too large for float32")(
    lambda f: _edit(f, lambda t: t | {f"{_QUERY}.bias": np.full(16, 1e300)})
)
bad(40, "integer weights", "is I32, weights must be")(
    lambda f: _edit(f, lambda t: t | {f"{_QUERY}.bias": np.ones(16, np.int32)})
)
bad(41, "missing tensor", f"missing {_QUERY}.bias")(
    lambda f: _edit(f, lambda t: {n: a for n, a in t.items() if n != f"{_QUERY}.bias"})
)
bad(41, "a head that config.json promises", "missing classifier.weight")(
    lambda f: _edit_config(f, architectures=["BertForSequenceClassification"])
)
bad(41, "a head that was asked for", "has no span head", "--heads", "span")(lambda f: None)
bad(41, "a head that does not exist", "do not exist in this family", "--heads", "lm")(
    lambda f: None
)


@bad(41, "a head of a class that is not known", "RobertaForMultipleChoice, which is not read")
def _(folder):
    """Its tensors are named as those of a head that tells tokens apart."""
    _edit_config(folder, model_type="roberta", architectures=["RobertaForMultipleChoice"])
    head = {
        "classifier.weight": np.ones((1, 16), np.float32),
        "classifier.bias": np.ones(1, np.float32),
    }
    _edit(folder, lambda t: t | head)


bad(41, "unknown tensors", "unknown adapters.0.weight")(
    lambda f: _edit(f, lambda t: t | {"adapters.0.weight": np.ones(3, np.float32)})
)
bad(41, "another position buffer", "other than the usual ones")(
    lambda f: _edit(f, lambda t: t | {"embeddings.position_ids": np.arange(20)[None] + 2})
)


def _mlm() -> dict[str, np.ndarray]:
    shapes = {
        "decoder.weight": (40, 16),
        "bias": (40,),
        "transform.dense.weight": (16, 16),
        "transform.dense.bias": (16,),
        "transform.LayerNorm.weight": (16,),
        "transform.LayerNorm.bias": (16,),
    }
    return {f"cls.predictions.{name}": np.ones(s, np.float32) for name, s in shapes.items()}


bad(42, "decoder that is not the embedding", "must be the same tensor")(
    lambda f: _edit(f, lambda t: t | _mlm())
)


@bad(42, "untied by config", "tie_word_embeddings=False .* empty --heads")
def _(folder):
    _edit(folder, lambda t: t | {n: a for n, a in _mlm().items() if "decoder" not in n})
    _edit_config(folder, tie_word_embeddings=False)


bad(43, "gamma and weight at once", "twice embeddings.LayerNorm.weight")(
    lambda f: _edit(f, lambda t: t | {"embeddings.LayerNorm.gamma": np.ones(16, np.float32)})
)
bad(44, "with and without prefix at once", f"twice {_QUERY}.bias")(
    lambda f: _edit(f, lambda t: t | {f"bert.{_QUERY}.bias": np.ones(16, np.float32)})
)
bad(44, "student and teacher in one file", "several encoders: names begin with 's.' and with 't.'")(
    lambda f: _edit(f, lambda t: {f"{a}.{n}": x for a in "st" for n, x in t.items()})
)
bad(44, "names of nothing we know", "(?s)missing.* more missing.*unknown.* more unknown")(
    lambda f: _edit(f, lambda t: {n.replace("e", "E"): x for n, x in t.items()})
)
bad(45, "transposed kernel", r"transposed\?")(
    lambda f: _edit(
        f,
        lambda t: (
            t
            | {
                "encoder.layer.0.output.dense.weight": np.ascontiguousarray(
                    t["encoder.layer.0.output.dense.weight"].T
                )
            }
        ),
    )
)
bad(46, "RoBERTa with fewer positions than its offset", "position_offset=20")(
    lambda f: _edit_config(f, model_type="roberta", pad_token_id=19)
)
bad(47, "one token type instead of two", "token_type_embeddings")(
    lambda f: _edit_config(f, type_vocab_size=1)
)
bad(48, "table padded to a multiple of 8 behind the config's back", r"\[48, 16\]")(
    lambda f: _edit(
        f,
        lambda t: t | {"embeddings.word_embeddings.weight": np.ones((48, 16), np.float32)},
    )
)
bad(49, "fused query, key and value", "unknown encoder.layer.1.attention.self.qkv.weight")(
    lambda f: _edit(
        f,
        lambda t: (
            {n: a for n, a in t.items() if not n.startswith(_QUERY)}
            | {"encoder.layer.1.attention.self.qkv.weight": np.ones((48, 16), np.float32)}
        ),
    )
)


@pytest.fixture
def convert():
    """Returns the command."""
    return lambda *arguments: cli.main(["convert", *map(str, arguments)])


def test_every_number_has_a_case():
    elsewhere = {17, 50}  # the two below
    assert {case.number for case in CASES} | elsewhere == set(range(1, 51))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.what}")
def test_bad_input_is_one_named_error(case, convert, tmp_path, capsys):
    import re

    folder = small_bert(tmp_path / "source")
    case.build(folder)
    before = sorted(tmp_path.iterdir())
    options = (
        case.options if "--tokenizer" in case.options else (*case.options, "--tokenizer", "none")
    )
    tracemalloc.start()
    started = time.monotonic()
    status = convert(folder, tmp_path / "target", *options)
    seconds = time.monotonic() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith("minilm-jax: ") and "Traceback" not in message
    assert re.search(case.says, message), message
    # The file is named, unless it is the option that is at fault.
    assert str(folder) in message or case.number == 40, message
    assert sorted(tmp_path.iterdir()) == before  # no target, nothing half-written beside it
    assert not (folder / "executed").exists()
    assert seconds < _SECONDS and peak < _BYTES, (seconds, peak)


def test_17_file_that_changes_while_it_is_read(tmp_path):
    folder = small_bert(tmp_path / "source")

    def touch(name, done, total):
        os.utime(_weights(folder), ns=(1, 1))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_model(folder, on_tensor=touch)

    folder = small_bert(tmp_path / "other")

    def cut(name, done, total):
        os.truncate(_weights(folder), 100)

    with pytest.raises(CheckpointError, match=r"became shorter|changed while"):
        read_model(folder, on_tensor=cut)


def test_21_legacy_file_without_torch_says_what_to_install(tmp_path, monkeypatch):
    folder = small_bert(tmp_path / "source")
    _weights(folder).unlink()
    magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
    (folder / "pytorch_model.bin").write_bytes(magic + b"\0" * 100)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r"torch < 1.6; reading it needs torch ≥ 2.10: pip"):
        read_model(folder)


@pytest.mark.parametrize("to", ["huggingface", "orbax", "export"])
def test_50_target_is_the_source(to, convert, tmp_path, capsys):
    """Also where it is an untouched output of ours, which another source would replace."""
    folder = write_model(read_model(small_bert(tmp_path / "source")), tmp_path / "ours")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for target in (folder, tmp_path / "link"):
        assert convert(folder, target, "--tokenizer", "none", "--to", to) == 2
        assert f"{target} is the source itself: choose another" in capsys.readouterr().err
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_50_target_is_a_link(convert, tmp_path, capsys):
    folder = small_bert(tmp_path / "source")
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    link.symlink_to(real)
    for dtype in ("float16", "bfloat16"):
        assert convert(folder, link, "--tokenizer", "none", "--dtype", dtype) == 0
        assert f"written to {link}" in capsys.readouterr().out
    assert link.readlink() == real
    assert read_model(real).stored_dtypes.popitem()[1] == "BF16"
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    link.unlink()
    link.symlink_to(link)
    assert convert(folder, link, "--tokenizer", "none") == 2
    assert f"{link} cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "source"]


@pytest.mark.parametrize("target", [".", "./", "..", "/"])
def test_50_target_holds_the_current_directory(target, convert, tmp_path, capsys, monkeypatch):
    folder = small_bert(tmp_path / "source")
    here = tmp_path / "parent" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert convert(folder, target, "--tokenizer", "none") == 2
    assert "holds the current directory" in capsys.readouterr().err
    assert [list(here.iterdir()), list(here.parent.iterdir())] == [[], [here]]


def test_50_target_holds_somebodys_work(convert, tmp_path, capsys):
    folder = small_bert(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.tex").write_text("three years")
    assert convert(folder, target, "--tokenizer", "none") == 2
    assert "no unmodified output of this command" in capsys.readouterr().err
    assert [f.name for f in target.iterdir()] == ["thesis.tex"]


def test_50_the_target_is_looked_at_before_gigabytes_are_read(convert, tmp_path, capsys):
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.tex").write_text("three years")
    assert convert(tmp_path / "no source", target) == 2
    assert "no unmodified output of this command" in capsys.readouterr().err


def test_50_own_output_is_replaced_until_it_was_touched(tmp_path):
    model = read_model(small_bert(tmp_path / "source"))
    write_model(model, tmp_path / "target", dtype="float16")
    write_model(model, tmp_path / "target", dtype="bfloat16")
    assert read_model(tmp_path / "target").stored_dtypes.popitem()[1] == "BF16"
    (tmp_path / "target" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no unmodified output"):
        write_model(model, tmp_path / "target")


@pytest.mark.parametrize("stage", ["config.json", "README.md", "minilm_jax.json", "rename"])
def test_50_crash_in_the_middle_leaves_the_old_output(stage, tmp_path, monkeypatch):
    model = read_model(small_bert(tmp_path / "source"))
    target = write_model(model, tmp_path / "target")
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    write_text, rename = Path.write_text, Path.rename

    def full_disk(self, text, *args, **kwargs):
        if self.name == stage:
            raise OSError(28, "No space left on device")
        return write_text(self, text, *args, **kwargs)

    def broken_rename(self, other):
        if stage == "rename" and ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "write_text", full_disk)
    monkeypatch.setattr(Path, "rename", broken_rename)
    with pytest.raises(CheckpointError, match=r"target cannot be written: (No space|Input/output)"):
        write_model(model, target, dtype="float16")
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def _dead() -> int:
    """Returns the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_50_what_killed_writes_left_is_put_right(tmp_path):
    """One was killed between its two renames, one in the middle; process ids come again."""
    host = socket.gethostname()
    model = read_model(small_bert(tmp_path / "source"))
    target = write_model(model, tmp_path / "target")
    before = {f.name: f.read_bytes() for f in target.iterdir()}
    dead = _dead()
    target.rename(tmp_path / f".target.old-{host}-{dead}")
    for process in (dead, os.getpid()):
        (tmp_path / f".target.partial-{host}-{process}").mkdir()
        (tmp_path / f".target.partial-{host}-{process}" / "config.json").touch()
    (tmp_path / ".target.old-thesis").mkdir()

    def fails(folder):
        raise CheckpointError("verification failed")

    with pytest.raises(CheckpointError, match="verification failed"):
        write_model(model, target, dtype="float16", check=fails)
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [".target.old-thesis", "source", "target"]


def test_50_what_others_are_writing_is_left_alone(tmp_path):
    """They run beside this process, or on a host that shares the disk."""
    model = read_model(small_bert(tmp_path / "source"))
    running = f"{socket.gethostname()}-{os.getppid()}"
    for process in (running, f"elsewhere-{_dead()}"):
        for state in ("partial", "old"):
            (tmp_path / f".target.{state}-{process}").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    write_model(model, tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == before | {"target"}


def test_50_of_two_writes_at_once_the_last_stays(tmp_path):
    model = read_model(small_bert(tmp_path / "source"))
    target = tmp_path / "target"

    def meanwhile(folder):
        code = (
            "import sys; from pathlib import Path; from minilm_jax.convert.output import *\n"
            "def fill(f): write_json(f / 'a.json', {}); write_manifest(f, source='', sha256='')\n"
            "replace_folder(Path(sys.argv[1]), fill)"
        )
        subprocess.run([sys.executable, "-c", code, target], check=True)
        assert (target / "a.json").is_file()

    write_model(model, target, check=meanwhile)
    assert (target / "model.safetensors").is_file() and not (target / "a.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_50_what_appeared_meanwhile_is_not_replaced(tmp_path):
    model = read_model(small_bert(tmp_path / "source"))
    target = tmp_path / "target"

    def meanwhile(folder):
        target.mkdir()
        (target / "thesis.tex").write_text("three years")

    with pytest.raises(CheckpointError, match="no unmodified output of this command"):
        write_model(model, target, check=meanwhile)
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_50_disk_too_small_for_orbax(convert, tmp_path, capsys, monkeypatch):
    """That is seen before it writes: its storage fails in many lines."""
    folder = small_bert(tmp_path / "source")
    enough = shutil.disk_usage(tmp_path)
    for free, status in ((5216 * 4 - 1, 2), (5216 * 4, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, f=free: enough._replace(free=f))
        command = (folder, tmp_path / "target", "--to", "orbax", "--tokenizer", "none")
        assert convert(*command) == status
        assert ("No space left on device" in capsys.readouterr().err) == bool(status)
        assert (tmp_path / "target").exists() != bool(status)


def test_50_disk_that_fills_up_beneath_orbax(convert, tmp_path, capsys, monkeypatch):
    """What its storage raises then, shortened."""
    import orbax.checkpoint as ocp

    folder = small_bert(tmp_path / "source")
    said = "RESOURCE_EXHAUSTED: Error writing \"params/0\": Failed to write [os_error_code='28']"

    def full(self):
        raise ValueError(said)

    monkeypatch.setattr(ocp.StandardCheckpointer, "wait_until_finished", full)
    assert convert(folder, tmp_path / "target", "--to", "orbax", "--tokenizer", "none") == 2
    assert capsys.readouterr().err.endswith("target cannot be written: No space left on device\n")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    said = "a bug"
    with pytest.raises(ValueError, match="a bug"):
        convert(folder, tmp_path / "target", "--to", "orbax", "--tokenizer", "none")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_50_target_that_cannot_be_written(convert, tmp_path, capsys):
    folder = small_bert(tmp_path / "source")
    (tmp_path / "file").write_text("")
    assert convert(folder, tmp_path / "file" / "target", "--tokenizer", "none") == 2
    assert "cannot be written" in capsys.readouterr().err
