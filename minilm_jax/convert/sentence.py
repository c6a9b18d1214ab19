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
_SETTINGS = "config_sentence_transformers.json"
SENTENCE_FILES = (_MODULES, _POOLING, _LIMITS, _SETTINGS)
# What older releases called _LIMITS, by the kind of encoder.
_OLDER_LIMITS = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "xlm-roberta")
)
SENTENCE_PATTERNS = (*SENTENCE_FILES, *_OLDER_LIMITS)
"""What is fetched; every name that `read_sentence` looks for."""
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
    lower_case: bool = False
    """Whether texts are put in lower case before the tokenizer sees them."""
    include_prompt: bool = True
    """Whether the tokens of a prompt are pooled along."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """config_sentence_transformers.json: prompts and the similarity; carried as they are."""


def read_sentence(folder: Path, *, max_length: int) -> Sentence | None:
    """Returns the folder's pooling; None where it is no sentence-transformers folder.

    Args:
      folder: a model folder.
      max_length: the encoder's, taken where neither the folder nor its tokenizer says less.

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
        raise CheckpointError(f"{file}: the folders of the modules must be '' and '1_Pooling'")
    pooling = read_json(folder / _POOLING)
    limits = next((folder / f for f in (_LIMITS, *_OLDER_LIMITS) if (folder / f).exists()), None)
    given = read_json(limits) if limits else {}
    settings = read_json(folder / _SETTINGS) if (folder / _SETTINGS).exists() else {}
    settings.pop("__version__", None)  # Who wrote it, which is us.
    return Sentence(
        pooling=_pooling(pooling, folder / _POOLING),
        normalize=len(kinds) == 3,
        max_length=_max_length(given, limits, folder, max_length),
        lower_case=_flag(given, "do_lower_case", limits, default=False),
        include_prompt=_flag(pooling, "include_prompt", folder / _POOLING, default=True),
        settings=settings,
    )


def _flag(settings: Mapping[str, Any], key: str, file: Path | None, *, default: bool) -> bool:
    value = settings.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{file}: {key}={value!r:.40} is not true or false")
    return value


def _pooling(settings: Mapping[str, Any], file: Path) -> Pooling:
    # Newer folders name the mode; older ones hold a flag for each.
    chosen = settings.get("pooling_mode")
    if isinstance(chosen, str) and chosen in ("cls", "mean"):
        return "cls" if chosen == "cls" else "mean"
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    if len(on) != 1 or on[0] not in _MODES:
        raise CheckpointError(f"{file}: pooling {on or chosen!r} is neither mean nor cls alone")
    return _MODES[on[0]]


def _max_length(settings: Mapping[str, Any], file: Path | None, folder: Path, most: int) -> int:
    value = settings.get("max_seq_length")
    if value is None:
        # As sentence-transformers does; transformers writes 10³⁰ for "no limit".
        tokenizer = folder / "tokenizer_config.json"
        limit = read_json(tokenizer).get("model_max_length") if tokenizer.exists() else None
        return min(limit, most) if type(limit) is int and limit > 0 else most
    if type(value) is not int or not 0 < value <= most:
        raise CheckpointError(f"{file}: max_seq_length={value!r:.40} is not in 1..{most}")
    return value


def write_sentence(folder: Path, sentence: Sentence, *, width: int) -> None:
    """Makes `folder` one that sentence-transformers loads."""
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
    # Releases before 2.4 refuse the key, which says nothing where it is true.
    prompt = {} if sentence.include_prompt else {"include_prompt": False}
    write_json(
        folder / _POOLING,
        {"word_embedding_dimension": width, **flags, **others, **prompt},
    )
    write_json(
        folder / _LIMITS,
        {"max_seq_length": sentence.max_length, "do_lower_case": sentence.lower_case},
    )
    if sentence.settings:
        write_json(folder / _SETTINGS, sentence.settings)
