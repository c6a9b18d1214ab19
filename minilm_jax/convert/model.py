"""A model in memory: the encoder's shape, its parameters, and where they came from."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from minilm_jax.convert.sentence import Sentence
from minilm_jax.data.tokenizers import TOKENIZER_FILES
from minilm_jax.encoder.config import EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """An encoder with the heads its checkpoint had."""

    config: EncoderConfig
    params: dict[str, Any]
    """`{"encoder": …}` and one entry per head: pooler, mlm, next_sentence, sequence_classifier,
    token_classifier, span; fp32."""
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The source's config.json; what says no shape (labels, task settings) is written along."""
    source: str = ""
    """The folder, file or Hub id it was read from."""
    fingerprint: str = ""
    """SHA-256 of the weights; of the lines "<name> <sha256>" where there are several files."""
    folder: Path | None = None
    """Where the source lies on this machine."""
    sentence: Sentence | None = None
    """How the source makes sentence embeddings, if it is a sentence-transformers folder."""
    stored_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Each parameter's dtype in the source, by path; empty for a model trained here."""

    @property
    def tokenizer_folder(self) -> Path | None:
        """The source's folder, None where no tokenizer lies in it."""
        folder = self.folder
        if folder is None or not any((folder / name).exists() for name in TOKENIZER_FILES):
            return None
        return folder


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path: leaf} of nested dicts, paths joined by "/"."""
    return flatten_dict(params, sep="/")


def nest(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of {path: leaf}."""
    return unflatten_dict(leaves, sep="/")
