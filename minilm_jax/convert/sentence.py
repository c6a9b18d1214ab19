"""How sentence-transformers makes one embedding of hidden states: read from, written to a folder.

Pooling has no parameters, only these files. The function itself is `encoder.heads.pool`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilm_jax.convert.output import write_json
from minilm_jax.convert.strict_json import read_json, read_json_list
from minilm_jax.encoder.heads import Pooling
from minilm_jax.errors import CheckpointError

_MODULES, _POOLING = "modules.json", "1_Pooling/config.json"
_LIMITS = "sentence_bert_config.json"
SENTENCE_FILES = (_MODULES, _POOLING, _LIMITS)
_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentence:
    """One embedding per text."""

    pooling: Pooling
    normalize: bool
    """Whether embeddings are scaled to length 1."""
    max_length: int
    """Tokens at which texts are cut."""


def read_sentence(folder: Path, *, max_length: int) -> Sentence | None:
    """Returns the folder's pooling; None where it is no sentence-transformers folder.

    Args:
      folder: a model folder.
      max_length: the encoder's, taken where the folder does not say.

    Raises:
      CheckpointError: a module or a pooling that `encoder.heads.pool` does not compute.
    """
    file = folder / _MODULES
    if not file.exists():
        return None
    modules = read_json_list(file)
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules if isinstance(m, Mapping)]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{file}: modules {kinds} are not Transformer, Pooling and perhaps Normalize; "
            f"delete the file to convert the encoder alone"
        )
    if modules[0].get("path") != "" or modules[1].get("path") != "1_Pooling":
        raise CheckpointError(f"{file}: the modules lie in other folders than '' and '1_Pooling'")
    return Sentence(
        pooling=_pooling(folder / _POOLING),
        normalize=len(kinds) == 3,
        max_length=_max_length(folder / _LIMITS, max_length),
    )


def _pooling(file: Path) -> Pooling:
    settings = read_json(file)
    # Newer folders name the mode; older ones hold a flag for each.
    chosen = settings.get("pooling_mode")
    if isinstance(chosen, str) and chosen in ("cls", "mean"):
        return "cls" if chosen == "cls" else "mean"
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in _MODES:
        raise CheckpointError(f"{file}: pooling {on or chosen!r} is neither mean nor cls alone")
    return _MODES[on[0]]


def _max_length(file: Path, default: int) -> int:
    value: Any = read_json(file).get("max_seq_length") if file.exists() else None
    if value is None:
        return default
    if type(value) is not int or not 0 < value <= default:
        raise CheckpointError(f"{file}: max_seq_length={value!r:.40} is not in 1..{default}")
    return value


def write_sentence(folder: Path, sentence: Sentence, *, width: int) -> None:
    """Returns nothing; makes `folder` one that sentence-transformers loads."""
    names = ["Transformer", "Pooling", *(["Normalize"] if sentence.normalize else [])]
    write_json(
        folder / _MODULES,
        [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{name}" if index else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for index, name in enumerate(names)
        ],
    )
    (folder / _POOLING).parent.mkdir()
    flags = {key: mode == sentence.pooling for key, mode in _MODES.items()}
    others = {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    write_json(
        folder / _POOLING,
        {"word_embedding_dimension": width, **flags, **others},
    )
    write_json(
        folder / _LIMITS,
        {"max_seq_length": sentence.max_length, "do_lower_case": False},
    )
