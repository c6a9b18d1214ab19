"""The conversion job: a checkpoint in, in any form we read; a checkpoint out, verified if asked."""

import dataclasses
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minilm_jax.convert.export import exported_outputs, input_names, load_export, write_export
from minilm_jax.convert.files import refuse_disguise
from minilm_jax.convert.folder import Dtype, read_model, write_model
from minilm_jax.convert.hf_config import from_hf_config
from minilm_jax.convert.model import Model, flatten
from minilm_jax.convert.orbax_form import write_orbax
from minilm_jax.convert.output import check_target
from minilm_jax.convert.strict_json import read_json
from minilm_jax.convert.verify import (
    Comparison,
    check_round_trip,
    compare_with_torch,
    has_torch,
    largest_difference,
    random_batch,
    refuse_disagreement,
)
from minilm_jax.data.tokenizers import (
    SENTENCEPIECE_FILE,
    TOKENIZER_FILES,
    UnsupportedTokenizerError,
    load_tokenizer,
)
from minilm_jax.errors import CheckpointError, ConfigError, DataError
from minilm_jax.settings import Settings, above, below, check
from minilm_jax.signals import stoppable


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Converts a checkpoint of the BERT family, from and to PyTorch."""

    source: tyro.conf.Positional[str]
    """Folder, weight file beside its config, or Hub id (org/name, org/name@revision)."""
    target: tyro.conf.Positional[Path]
    """Output folder. An existing one is replaced only if it is an unmodified output of this one."""
    to: Literal["huggingface", "orbax", "export"] = "huggingface"
    """Hugging Face folder, Orbax checkpoint, or portable jax.export function (both fp32)."""
    dtype: Dtype = "source"
    """dtype of the weights in a Hugging Face folder; `source` keeps each tensor's own."""
    verify: bool = False
    """Compare the result byte for byte, and layer by layer with PyTorch where it is installed."""
    heads: tuple[str, ...] | None = None
    """Heads to convert (pooler, mlm, sequence_classifier, …). Default: all.
    An empty list converts the encoder alone."""
    sha256: str | None = None
    """Expected SHA-256 of the source's weights, checked before they are parsed."""
    tokenizer: Literal["copy", "none"] = "copy"
    """Whether to check the source's tokenizer against the vocabulary and copy it."""
    allow_nonfinite: bool = False
    """Convert weights that hold NaN or infinity instead of refusing them."""
    max_shard_gb: Annotated[float, above(0), below(1_000_000)] = 2.0
    """Larger models are split into files of at most this many 10⁹ bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to != "huggingface" and self.dtype not in ("source", "float32"):
            raise ConfigError(
                f"--dtype {self.dtype} is for --to huggingface; --to {self.to} stores float32"
            )


@stoppable("nothing was converted")
def run(config: ConvertConfig, *, report: Callable[[str], None] = print) -> Path:
    """Returns the written folder.

    Args:
      config: what to convert.
      report: takes each line of the result; progress goes to stderr.

    Raises:
      UserError: something about source, target or verification; nothing is then left at target.
    """
    check("config", config, ConvertConfig)
    check_target(config.target, source=Path(config.source))
    model = read_model(
        config.source,
        sha256=config.sha256,
        heads=config.heads,
        nonfinite="keep" if config.allow_nonfinite else "refuse",
        on_tensor=_Meter("read"),
    )
    count = sum(leaf.size for leaf in flatten(model.params).values())
    report(f"{config.source}: {model.config.model_type}, {count:,} parameters, {_parts(model)}")
    report(f"sha256 {model.fingerprint}")
    with tempfile.TemporaryDirectory() as scratch:
        files = _tokenizer(model, config, Path(scratch))
        written = _write(model, config, files, report)
    report(f"written to {written}")
    return written


def _write(
    model: Model, config: ConvertConfig, files: tuple[Path, ...], report: Callable[[str], None]
) -> Path:
    meter = _Meter("written")
    verify = {"huggingface": _verify_folder, "orbax": _verify_orbax, "export": _verify_export}
    # Called before the folder takes its name: a failure leaves nothing behind.
    check = functools.partial(verify[config.to], model, report) if config.verify else None
    match config.to:
        case "huggingface":
            return write_model(
                model,
                config.target,
                dtype=config.dtype,
                # Which was asked of the source, when it was read.
                nonfinite="keep",
                max_shard_bytes=int(config.max_shard_gb * 1e9),
                tokenizer_files=files,
                on_tensor=meter,
                check=check,
            )
        case "orbax":
            return write_orbax(model, config.target, tokenizer_files=files, check=check)
        case "export":
            return write_export(
                model, config.target, tokenizer_files=files, on_tensor=meter, check=check
            )


def _parts(model: Model) -> str:
    return ", ".join(sorted(model.params, key=lambda part: (part != "encoder", part)))


# Tokenizer


_WAY_OUT = "put it there, or pass --tokenizer none"


def _tokenizer(model: Model, config: ConvertConfig, scratch: Path) -> tuple[Path, ...]:
    """Returns the tokenizer's files, checked against the vocabulary."""
    if config.tokenizer == "none":
        return ()
    folder = model.tokenizer_folder or _beside(Path(config.source), scratch)
    if folder is None:
        raise CheckpointError(f"{config.source} has no tokenizer: {_WAY_OUT}")
    for file in (folder / name for name in TOKENIZER_FILES):
        if file.is_file():
            with file.open("rb") as opened:
                refuse_disguise(file, opened.read(64))
    if model.config.model_type == "xlm":
        return _xlm_tokenizer(model, folder)
    try:
        return load_tokenizer(folder, vocab_size=model.config.vocab_size).files
    except UnsupportedTokenizerError:
        return _files(folder)
    except DataError as error:
        raise CheckpointError(f"{error}; --tokenizer none leaves it out") from error


def _beside(source: Path, scratch: Path) -> Path | None:
    # Microsoft's bare release: minilm-l12-h384-uncased.bin and minilm-l12-h384-uncased-vocab.txt.
    stem = source.name.split(".")[0]
    for name in ("vocab.txt", SENTENCEPIECE_FILE):
        file = source.parent / f"{stem}-{name}"
        if source.is_file() and file.is_file():
            shutil.copyfile(file, scratch / name)
            return scratch
    return None


def _xlm_tokenizer(model: Model, folder: Path) -> tuple[Path, ...]:
    # XLM's own BPE over a Moses tokenizer is not rebuilt here: the files are checked and copied.
    if not (folder / "vocab.json").is_file():
        raise CheckpointError(f"{folder} has no vocab.json, as XLM's tokenizer has: {_WAY_OUT}")
    entries = len(read_json(folder / "vocab.json"))
    if entries > model.config.vocab_size:
        raise CheckpointError(
            f"{folder / 'vocab.json'} has {entries:,} entries, the model "
            f"{model.config.vocab_size:,} rows: it belongs to another model"
        )
    return _files(folder)


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


# Verification


def _verify_folder(model: Model, report: Callable[[str], None], folder: Path) -> None:
    again = _read_back(model, folder)
    report(f"byte for byte: {check_round_trip(model, again)} tensors")
    _against_torch(again, folder, report)


def _verify_orbax(model: Model, report: Callable[[str], None], folder: Path) -> None:
    again = _read_back(model, folder)
    report(f"byte for byte: {check_round_trip(model, again)} tensors")
    with tempfile.TemporaryDirectory() as scratch:
        written = write_model(again, Path(scratch) / "torch", nonfinite="keep", tokenizer_files=())
        _against_torch(again, written, report)


def _verify_export(model: Model, report: Callable[[str], None], folder: Path) -> None:
    import numpy as np

    batch = random_batch(model)
    expected = exported_outputs(model, model.params, **batch)
    found = load_export(folder)({name: batch[name] for name in input_names(model)})
    rows = [
        Comparison(
            name=name,
            difference=largest_difference(np.asarray(found[name]), np.asarray(y)),
            magnitude=float(np.abs(y).max()),
        )
        for name, y in expected.items()
    ]
    worst = max(row.difference for row in rows)
    report(f"exported function against the model: largest difference {worst:.2e}")
    bad = [f"{row.name} by {row.difference:.2e}" for row in rows if not row.agrees]
    if bad:
        raise CheckpointError(f"the exported function differs from the model: {', '.join(bad)}")
    with tempfile.TemporaryDirectory() as scratch:
        written = write_model(model, Path(scratch) / "torch", nonfinite="keep", tokenizer_files=())
        _against_torch(model, written, report)


def _read_back(model: Model, folder: Path) -> Model:
    heads = tuple(part for part in model.params if part != "encoder")
    return read_model(folder, heads=heads, nonfinite="keep")


def _against_torch(model: Model, folder: Path, report: Callable[[str], None]) -> None:
    if not has_torch():
        report("PyTorch is not installed: its outputs were not compared")
        return
    config = read_json(folder / "config.json")
    # What PyTorch will read, not what we meant to write.
    from_hf_config(config, name=str(folder / "config.json"))
    comparisons = compare_with_torch(model, folder, architecture=config["architectures"][0])
    refuse_disagreement(comparisons, report=report)


# Progress


class _Meter:
    """Prints bytes done to stderr, at most every two seconds, for whoever waits on gigabytes."""

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.next = time.monotonic() + 2.0

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + 2.0
        share = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
        print(f"{self.verb} {share} ({done / total:.0%}), {name}", file=sys.stderr, flush=True)
