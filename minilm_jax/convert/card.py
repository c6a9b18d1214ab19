"""The model card that stands in every folder we write."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilm_jax import __version__
from minilm_jax.convert.model import Model, flatten

CARD = "README.md"
_OF_DERIVED = ("license", "license_name", "license_link", "language")
_OF_WEIGHTS = (*_OF_DERIVED, "tags", "datasets", "base_model", "pipeline_tag")
"""What the head of a card on the Hub says that holds for the model in any form."""
_OF_FORM = (
    *("architecture", "layers × width × heads", "vocabulary", "parameters", "stored as"),
    *("source", "SHA-256 of the source's weights", "written by"),
)
"""What our card says of the folder it lies in, and not of how the weights came about."""


def model_card(
    model: Model, architecture: str, *, stored_as: Sequence[str], origin: Mapping[str, str] | None
) -> str:
    """Returns README.md: what the weights are, where they came from, how to load them.

    The source's licence and languages are carried along; where the weights are the source's own,
    so are its tags, and how they came about where this package trained them.

    Args:
      model: that is written.
      architecture: its class in transformers.
      stored_as: the dtypes of its weights.
      origin: how the weights came about, by name; None names the model's source.
    """
    config = model.config
    source = _read(model.folder)
    carried = _carried(source, _OF_WEIGHTS if origin is None else _OF_DERIVED)
    if origin is None:
        origin = {
            "source": model.source or "trained with minilm_jax",
            "SHA-256 of the source's weights": model.fingerprint or "none",
            **_origin(source),
        }
    lines = {
        "architecture": architecture,
        "layers × width × heads": f"{config.num_hidden_layers} × {config.hidden_size} × "
        f"{config.num_attention_heads}",
        "vocabulary": f"{config.vocab_size:,}",
        "parameters": f"{sum(math.prod(x.shape) for x in flatten(model.params).values()):,}",
        "stored as": ", ".join(stored_as),
        **origin,
        "written by": f"minilm_jax {__version__}",
    }
    rows = "\n".join(
        "| {} | {} |".format(key, value.replace("|", r"\|")) for key, value in lines.items()
    )
    return f"""---
library_name: transformers
{carried}---
# {architecture}

| | |
|---|---|
{rows}

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("path/to/this/folder")
```
"""


def carried_card(model: Model) -> str:
    """Returns the source's licence, languages and tags as the head of a card; "" without any."""
    head = _carried(_read(model.folder), _OF_WEIGHTS)
    return f"---\n{head}---\n" if head else ""


def _read(folder: Path | None) -> str:
    card = folder and folder / CARD
    return card.read_text("utf-8", errors="replace") if card and card.is_file() else ""


def _carried(card: str, keys: Sequence[str]) -> str:
    """Returns the lines of a card's head that these keys begin."""
    head = re.match(r"---\n(.*?\n)---\s", card, re.DOTALL)
    # A key begins a line; what is indented, or an item of a list, goes on with the one before.
    entries = re.split(r"^(?=[^\s-])", head[1], flags=re.MULTILINE) if head else []
    return "".join(entry for entry in entries if entry.partition(":")[0] in keys)


def _origin(card: str) -> dict[str, str]:
    """Returns how the weights came about, where our own card of the source says so."""
    rows = re.findall(r"^\| (.+?) \| (.*) \|$", card, re.MULTILINE)
    said = {key: value.replace(r"\|", "|") for key, value in rows}
    if not said.get("written by", "").startswith("minilm_jax "):
        return {}
    return {key: value for key, value in said.items() if key not in _OF_FORM}
