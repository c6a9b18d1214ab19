"""From what a user calls a model to a local path: a folder, a file, or an id on the Hub."""

import contextlib
import re
from pathlib import Path

from minilm_jax.convert.card import CARD
from minilm_jax.convert.sentence import SENTENCE_PATTERNS
from minilm_jax.convert.strict_json import read_json
from minilm_jax.convert.weights import WEIGHT_FILES, find_weights
from minilm_jax.data.tokenizers import TOKENIZER_FILES
from minilm_jax.errors import CheckpointError, first_line

_ADAPTER = "adapter_config.json"
# What is read: never code, and one form of the weights, of which a repository may hold five.
_SMALL = ["config.json", CARD, _ADAPTER, *TOKENIZER_FILES, *SENTENCE_PATTERNS]
_FORMS = (
    ["model*.safetensors", "model.safetensors.index.json"],
    ["pytorch_model*.bin", "pytorch_model.bin.index.json"],
    ["flax_model*.msgpack", "flax_model.msgpack.index.json"],
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


def resolve(source: str | Path) -> Path:
    """Returns the local folder or weight file that `source` names.

    A Hub id (`org/name`, or `org/name@revision`) is downloaded to the Hub's cache. Without a
    network the cache alone answers, and a download that once stopped half-way is told from a
    complete one here: the library does not.

    Raises:
      CheckpointError: there is no such folder, file or complete repository.
    """
    return _local(source) or _download(_hub_id(source))


def resolve_tokenizer(source: Path) -> Path:
    """Returns the local folder of a tokenizer; of a Hub id the weights are left where they are."""
    return _local(source) or _fetch(_hub_id(str(source)), [*TOKENIZER_FILES])


def _local(source: str | Path) -> Path | None:
    """Returns the path that `source` is, None where nothing is there."""
    path, text = Path(source), str(source)
    with contextlib.suppress(RuntimeError):  # There is no such user.
        path = path.expanduser()
    if not text:  # As a path it would be the current directory.
        raise CheckpointError("the source is empty: give a folder, a weight file or a Hub id")
    try:
        return path if path.exists() else None
    except OSError as error:
        raise CheckpointError(f"{text:.80} cannot be looked for: {error.strerror}") from error


def _hub_id(source: str | Path) -> str:
    text = str(source)
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or text.startswith((".", "~")):
        raise CheckpointError(f"{source} does not exist, and is not an id of the Hugging Face Hub")
    return text


def _download(source: str) -> Path:
    for form in _FORMS:
        folder = _fetch(source, [*_SMALL, *form])
        if any((folder / file).exists() for file in WEIGHT_FILES):
            break
    refuse_adapter(folder)
    check_complete(folder, source=source)
    return folder


def _fetch(source: str, patterns: list[str]) -> Path:
    """Returns the folder of a Hub id in the Hub's cache, with the files of these patterns."""
    import huggingface_hub  # Half a second, and most runs read a local folder.

    name, _, revision = source.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, allow_patterns=patterns
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{source} is no local path and cannot be fetched from the Hub: {first_line(error)}"
        ) from error


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError where an adapter lies in a model's folder.

    transformers adds it to the model beside it.
    """
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder / _ADAPTER}: the folder holds an adapter (PEFT, LoRA), which changes what a "
            "model computes: save what `merge_and_unload()` returns and convert that; to leave the "
            "adapter out, name the model's own weight file"
        )


def check_complete(folder: Path, *, source: str) -> None:
    """Raises CheckpointError where the snapshot lacks a file."""
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    weights = find_weights(folder)
    if weights.name.endswith(".index.json"):
        mapping = read_json(weights).get("weight_map")
        shards = set(mapping.values()) if isinstance(mapping, dict) else set()
        missing += [s for s in sorted(map(str, shards)) if not (folder / s).exists()]
    if missing:
        raise CheckpointError(
            f"the copy of {source} in {folder} lacks {', '.join(missing[:5])}: an earlier download "
            f"stopped half-way; run again with the network up"
        )
