"""Distil large Transformer encoders into small ones, in JAX.

What most programs begin with is here; docs/python.md shows it. A name is imported when it is first
used: the worker processes that read text never import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minilm_jax.convert.apply import outputs
    from minilm_jax.convert.folder import read_model, write_model
    from minilm_jax.convert.model import Model
    from minilm_jax.data.tokenizers import load_tokenizer
    from minilm_jax.encoder.config import Compute, EncoderConfig
    from minilm_jax.encoder.encoder import encode
    from minilm_jax.jobs.sentence_encoder import SentenceEncoder

__version__ = "0.1.0"
__all__ = [
    "Compute",
    "EncoderConfig",
    "Model",
    "SentenceEncoder",
    "encode",
    "load_tokenizer",
    "outputs",
    "read_model",
    "write_model",
]

_MODULES = {
    "Compute": "encoder.config",
    "EncoderConfig": "encoder.config",
    "Model": "convert.model",
    "SentenceEncoder": "jobs.sentence_encoder",
    "encode": "encoder.encoder",
    "load_tokenizer": "data.tokenizers",
    "outputs": "convert.apply",
    "read_model": "convert.folder",
    "write_model": "convert.folder",
}


if not TYPE_CHECKING:  # or a misspelt name would be of type Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({name for name in globals() if name.startswith("__")} | {*__all__})
