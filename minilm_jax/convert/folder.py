"""Hugging Face folders: read into a Model, and written so that `transformers` loads them as is."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minilm_jax.convert.card import CARD, model_card
from minilm_jax.convert.files import DTYPES, FLOATS, OnTensor
from minilm_jax.convert.hf_config import from_hf_config, to_hf_config
from minilm_jax.convert.hub import refuse_adapter, resolve
from minilm_jax.convert.matching import ENCODER_ALONE, Match, match_names, write_names
from minilm_jax.convert.model import Model, flatten, nest
from minilm_jax.convert.names import with_needed
from minilm_jax.convert.orbax_form import is_orbax, read_orbax
from minilm_jax.convert.output import replace_folder, write_json, write_manifest
from minilm_jax.convert.safetensors_file import write_safetensors
from minilm_jax.convert.sentence import read_sentence, write_sentence
from minilm_jax.convert.strict_json import read_json
from minilm_jax.convert.weights import (
    WEIGHT_FILES,
    Weights,
    find_weights,
    instead,
    open_weights,
)
from minilm_jax.data.tokenizers import SENTENCEPIECE_FILE, TOKENIZER_FILES
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.errors import CheckpointError, MissingHeadError
from minilm_jax.settings import check as check_setting

Dtype = Literal["float32", "float16", "bfloat16", "source"]
Nonfinite = Literal["refuse", "keep"]
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_HF_DTYPES = {"F64": "float64", **{code: name for name, code in _CODES.items()}}


def read_model(
    source: str | Path,
    *,
    sha256: str | None = None,
    heads: Iterable[str] | None = None,
    nonfinite: Nonfinite = "refuse",
    on_tensor: OnTensor | None = None,
) -> Model:
    """Returns the model in a Hugging Face folder, a weight file beside its config, or on the Hub.

    Parameters come back as fp32 NumPy arrays, read one tensor at a time; nothing is executed and
    nothing is initialised.

    Args:
      source: folder (Hugging Face's or our Orbax form), weight file or Hub id.
      sha256: the fingerprint the weights must have; checked before they are parsed.
      heads: heads to read; None reads every head there is, () the encoder alone.
      nonfinite: whether NaN and infinities in the weights are an error.
      on_tensor: called after each tensor with its name, bytes done, and bytes in all.

    Raises:
      CheckpointError: anything is missing, unknown, misshaped, broken or not finite;
        MissingHeadError where there is nothing of a head that is to be read.
      ConfigError: config.json asks for an impossible shape.
    """
    check_setting("nonfinite", nonfinite, Nonfinite)
    path = resolve(source)
    if path.is_dir() and is_orbax(path):
        model = keep_heads(read_orbax(path, sha256=sha256), heads)
        leaves = flatten(model.params)
        if nonfinite == "refuse":
            _refuse_sick([x for name in leaves for x in _sick(name, leaves[name])], path)
        _check_labels(model.hf_config, leaves, path / "config.json")
        return model
    if path.is_dir():
        refuse_adapter(path)
    folder = path if path.is_dir() else path.parent
    config_file = _find_config(path)
    # Before the config is read: the folder of a run has one too, which says no shape.
    weights_file = find_weights(path) if path.is_dir() else path
    hf_config = read_json(config_file)
    config = from_hf_config(hf_config, name=str(config_file))
    with open_weights(weights_file, sha256=sha256) as weights:
        reading = match_names(
            weights.shapes,
            config=config,
            file=str(weights_file),
            architectures=_architectures(hf_config, config_file),
            heads=heads,
        )
        if any(match.ours.startswith("mlm/") for match in reading.matches):
            _refuse_untied(hf_config, config_file)
        for name in reading.buffers:
            _check_buffer(weights, name)
        leaves, dtypes = _read_leaves(weights, reading.matches, nonfinite, on_tensor)
        fingerprint = weights.fingerprint
    _check_labels(hf_config, leaves, config_file)
    return Model(
        config=config,
        params=nest(leaves),
        hf_config=hf_config,
        source=str(source),
        fingerprint=fingerprint,
        folder=folder,
        sentence=read_sentence(folder, max_length=config.max_length),
        stored_dtypes=dtypes,
    )


def is_model(folder: Path) -> bool:
    """Returns whether weights that `read_model` reads lie in the folder itself."""
    return is_orbax(folder) or any((folder / name).is_file() for name in WEIGHT_FILES)


def keep_heads(model: Model, heads: Iterable[str] | None) -> Model:
    """Returns `model` with these heads and what they compute on alone; None keeps all.

    Raises:
      MissingHeadError: it lacks one of them.
    """
    wanted = {"encoder"} | with_needed(model.params if heads is None else heads)
    missing = wanted - set(model.params)
    if missing:
        raise MissingHeadError(
            f"{model.source or 'the model to write'} has no {', '.join(sorted(missing))}"
        )
    kept = {part: model.params[part] for part in sorted(wanted)}
    return dataclasses.replace(model, params=kept)


def _find_config(path: Path) -> Path:
    if path.is_dir():
        file = path / "config.json"
        if not file.exists():
            way_out = "; copy it from where the weights came" if is_model(path) else instead(path)
            raise CheckpointError(f"{file} cannot be read: there is no such file{way_out}")
        return file
    # Microsoft released minilm-l12-h384-uncased.bin beside minilm-l12-h384-uncased-config.json.
    stem = path.name.split(".")[0]
    for name in (f"{stem}-config.json", f"{stem}_config.json", "config.json"):
        if (path.parent / name).exists():
            return path.parent / name
    raise CheckpointError(f"{path} needs its config beside it: {stem}-config.json or config.json")


def _architectures(hf_config: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    found = hf_config.get("architectures") or ()
    if not isinstance(found, list | tuple) or not all(isinstance(a, str) for a in found):
        raise CheckpointError(f"{file}: architectures={found!r:.80} is not a list of names")
    return tuple(found)


def _refuse_untied(hf_config: Mapping[str, Any], file: Path) -> None:
    # Only the masked LM has a decoder to tie.
    for key in ("tie_word_embeddings", "tie_weights_"):
        value = hf_config.get(key, True)
        if value not in (True, None):
            raise CheckpointError(
                f"{file}: {key}={value!r:.80} is not supported with a masked LM; {ENCODER_ALONE}"
            )


def _read_leaves(
    weights: Weights,
    matches: Iterable[Match],
    nonfinite: Nonfinite,
    on_tensor: OnTensor | None,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    # In the file's order, so that a disk reads forward.
    ordered = sorted(
        matches,
        key=lambda m: (str(weights.owners[m.foreign].path), weights.stored(m.foreign).offset),
    )
    total = sum(weights.stored(match.foreign).nbytes for match in ordered)
    leaves, dtypes, sick, done = {}, {}, [], 0
    for match in ordered:
        stored = weights.stored(match.foreign)
        where = f"{weights.owners[match.foreign].path}: tensor {match.foreign!r}"
        if stored.dtype not in FLOATS:
            raise CheckpointError(f"{where} is {stored.dtype}, weights must be {', '.join(FLOATS)}")
        array = weights.owners[match.foreign].read(match.foreign)
        for twin in match.twins:
            if not np.array_equal(array, weights.owners[twin].read(twin), equal_nan=True):
                raise CheckpointError(
                    f"{where} and {twin!r} must be the same tensor and differ: untied embeddings "
                    f"are not supported; {ENCODER_ALONE}"
                )
        sick += _sick(match.foreign, array)
        leaves[match.ours] = narrow(array, np.dtype(np.float32), where=where)
        if match.transform == "transpose":
            leaves[match.ours] = np.require(leaves[match.ours].T, requirements="C")
        dtypes[match.ours] = stored.dtype
        done += stored.nbytes
        if on_tensor is not None:
            on_tensor(match.foreign, done, total)
    if nonfinite == "refuse":
        _refuse_sick(sick, weights.path)
    return leaves, dtypes


def _sick(name: str, array: np.ndarray) -> list[str]:
    """Returns "name (so many of so many)" where numbers are not finite, nothing where all are."""
    bad = _count(lambda piece: ~np.isfinite(piece), array)
    return [f"{name} ({bad:,} of {array.size:,})"] if bad else []


def _refuse_sick(sick: list[str], path: Path) -> None:
    if sick:
        raise CheckpointError(
            f"{path} holds NaN or infinite weights in {', '.join(sick[:10])}"
            f"{' …' if len(sick) > 10 else ''}: "
            f"the checkpoint is broken; convert it with --allow-nonfinite to keep them"
        )


def narrow(array: np.ndarray, dtype: np.dtype, *, where: str) -> np.ndarray:
    """Returns `array` in `dtype`, rounded to nearest.

    Raises:
      CheckpointError: a finite number would become infinite.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    lost = _count(np.isinf, result) - _count(np.isinf, array)
    if lost:
        raise CheckpointError(
            f"{where}: {lost:,} numbers are too large for {dtype.name} (largest "
            f"{float(np.max(np.abs(array))):.3g}): choose float32 or bfloat16"
        )
    return result


def _count(test: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> int:
    # In pieces: the answers of a whole table of 250,000 rows would fill a quarter of a gigabyte.
    flat = array.ravel(order="K")
    step = 2**22
    return sum(int(test(flat[i : i + step]).sum()) for i in range(0, flat.size, step))


def _check_buffer(weights: Weights, name: str) -> None:
    # Leaving it out is right only while it says what every model of the family says.
    array = weights.owners[name].read(name).reshape(-1)
    expected = np.zeros_like(array) if "token_type" in name else np.arange(array.size)
    if not np.array_equal(array, expected):
        raise CheckpointError(
            f"{weights.owners[name].path}: buffer {name!r} has values other than the usual ones; "
            "this model computes something else"
        )


def _check_labels(
    hf_config: Mapping[str, Any], leaves: Mapping[str, np.ndarray], file: Path
) -> None:
    labels = hf_config.get("id2label")
    if labels is None:
        return
    if not isinstance(labels, dict):
        raise CheckpointError(f"{file}: id2label={labels!r:.80} is no object of names by number")
    for part in ("sequence_classifier", "token_classifier"):
        bias = leaves.get(f"{part}/output/bias")
        if bias is not None and len(labels) != bias.size:
            raise CheckpointError(
                f"{file}: id2label has {len(labels)} labels, the {part} {bias.size} outputs"
            )
        if bias is not None and set(labels) != {str(i) for i in range(bias.size)}:
            raise CheckpointError(
                f"{file}: id2label has keys {', '.join(map(repr, labels))}; the outputs of the "
                f"{part} are '0' to '{bias.size - 1}': give each its name"
            )


def write_model(
    model: Model,
    folder: str | Path,
    *,
    dtype: Dtype = "float32",
    nonfinite: Nonfinite = "refuse",
    max_shard_bytes: int = 2 * 10**9,
    tokenizer_files: Iterable[Path] | None = None,
    origin: Mapping[str, str] | None = None,
    on_tensor: OnTensor | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Returns `folder`, now a Hugging Face folder that `transformers` loads with no extra step.

    Written beside and renamed at the end (`output.replace_folder`). An existing folder is replaced
    only if it is an earlier, untouched output.

    Args:
      model: what to write; its `params` may hold NumPy or JAX arrays.
      folder: where to.
      dtype: of the stored weights; "source" stores each tensor as it was read (fp64 as fp32).
      nonfinite: whether NaN and infinities in the parameters are an error.
      max_shard_bytes: larger models are split into files of at most this size.
      tokenizer_files: copied along; None takes those of the model's source.
      origin: rows of the model card that say how the weights came about; None names the source.
      on_tensor: called after each tensor with its name, bytes done, and bytes in all.
      check: called on the finished folder before it takes its name; what it raises undoes all.

    Raises:
      CheckpointError: the folder is in use, the parameters fit no Hugging Face class, or a number
        is not finite or too large for `dtype`.
      ConfigError: `dtype` or `nonfinite` is no choice.
    """
    check_setting("dtype", dtype, Dtype)
    check_setting("nonfinite", nonfinite, Nonfinite)
    target = Path(folder)
    model = keep_heads(model, None)
    leaves = flatten(model.params)
    architecture, matches = write_names(
        {path: tuple(leaf.shape) for path, leaf in leaves.items()}, config=model.config
    )
    codes = {m.foreign: _code(model, m, dtype) for m in matches}
    total = sum(_nbytes(m, codes) for m in matches)
    hf_config = to_hf_config(model.config, model.hf_config)
    hf_config |= {"architectures": [architecture], "dtype": _most(codes)}
    _set_labels(hf_config, leaves)
    files = _tokenizer_files(model) if tokenizer_files is None else list(tokenizer_files)
    by_name = {m.foreign: m for m in matches}
    seen: set[str] = set()

    def read(name: str) -> np.ndarray:
        match = by_name[name]
        leaf = np.asarray(leaves[match.ours])
        if match.transform == "transpose":
            leaf = leaf.T
        if nonfinite == "refuse" and (sick := _sick(match.ours, leaf)):
            raise CheckpointError(
                f"{target} is not written: parameters are NaN or infinite in {sick[0]}; "
                'nonfinite="keep" would write them'
            )
        array = narrow(leaf, DTYPES[codes[name]], where=f"parameter {match.ours}")
        if on_tensor is not None and name not in seen:
            seen.add(name)
            on_tensor(name, sum(_nbytes(by_name[n], codes) for n in seen), total)
        return np.require(array, requirements="C")

    def fill(partial: Path) -> None:
        _write_shards(partial, matches, codes, max_shard_bytes, read)
        write_json(partial / "config.json", hf_config)
        for file in files:
            shutil.copyfile(file, partial / file.name)
        _name_tokenizer(partial, model.config)
        if model.sentence is not None:
            write_sentence(partial, model.sentence, width=model.config.hidden_size)
        card = model_card(model, architecture, stored_as=_names(codes), origin=origin)
        # The source's path may hold what no text can.
        (partial / CARD).write_text(card, encoding="utf-8", errors="replace")
        write_manifest(partial, source=model.source, sha256=model.fingerprint)
        if check is not None:
            check(partial)

    return replace_folder(target, fill, source=model.folder)


def _code(model: Model, match: Match, dtype: Dtype) -> str:
    if dtype == "source":
        stored = model.stored_dtypes.get(match.ours, "F32")
        return "F32" if stored == "F64" else stored
    return _CODES[dtype]


def _nbytes(match: Match, codes: Mapping[str, str]) -> int:
    return int(np.prod(match.shape)) * DTYPES[codes[match.foreign]].itemsize


def _names(codes: Mapping[str, str]) -> list[str]:
    return sorted({_HF_DTYPES[code] for code in codes.values()})


def _most(codes: Mapping[str, str]) -> str:
    found = list(codes.values())
    return _HF_DTYPES[max(set(found), key=found.count)]


def _set_labels(hf_config: dict[str, Any], leaves: Mapping[str, Any]) -> None:
    for part in ("sequence_classifier", "token_classifier"):
        if f"{part}/output/bias" in leaves:
            count = leaves[f"{part}/output/bias"].shape[0]
            if len(hf_config.get("id2label") or {}) != count:
                hf_config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
                hf_config["label2id"] = {f"LABEL_{i}": i for i in range(count)}


def _write_shards(
    folder: Path,
    matches: Iterable[Match],
    codes: Mapping[str, str],
    max_shard_bytes: int,
    read: Callable[[str], np.ndarray],
) -> None:
    shards: list[list[Match]] = [[]]
    filled = 0
    for match in matches:
        size = _nbytes(match, codes)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(match)
        filled += size
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        write_json(
            folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": sum(_nbytes(m, codes) for s in shards for m in s)},
                "weight_map": {
                    m.foreign: name
                    for name, shard in zip(names, shards, strict=True)
                    for m in shard
                },
            },
        )
    for name, shard in zip(names, shards, strict=True):
        triples = [(m.foreign, codes[m.foreign], m.shape) for m in shard]
        write_safetensors(folder / name, triples, read=read)


def _tokenizer_files(model: Model) -> list[Path]:
    if model.tokenizer_folder is None:
        return []
    found = [model.tokenizer_folder / name for name in TOKENIZER_FILES]
    return [file for file in found if file.exists()]


def _name_tokenizer(folder: Path, config: EncoderConfig) -> None:
    """Names the tokenizer's class where AutoTokenizer would guess it wrong.

    In a folder like Multilingual-MiniLM's, a BERT with a SentencePiece model, it silently builds
    a vocabulary of five entries.
    """
    if config.model_type == "xlm-roberta" or not (folder / SENTENCEPIECE_FILE).exists():
        return
    named = {"tokenizer_class": "XLMRobertaTokenizer"}
    write_json(folder / "config.json", read_json(folder / "config.json") | named)
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.exists() else {"model_max_length": config.max_length}
    write_json(file, settings | named)
