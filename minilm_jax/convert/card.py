"""The model card that stands in every folder we write."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from minilm_jax import __version__
from minilm_jax.convert.model import Model, flatten

CARD = "README.md"
_CARRIED = (
    *("license", "license_name", "license_link", "language", "tags", "datasets", "base_model"),
    "pipeline_tag",
)
"""What the head of a card on the Hub says that holds for the model in any form."""


def model_card(
    model: Model, architecture: str, *, stored_as: Sequence[str], origin: Mapping[str, str] | None
) -> str:
    """Returns README.md: what the weights are, where they came from, how to load them.

    Where the weights are the source's own, so are its licence, languages and tags.

    Args:
      model: that is written.
      architecture: its class in transformers.
      stored_as: the dtypes of its weights.
      origin: how the weights came about, by name; None names the model's source.
    """
    config = model.config
    carried = ""
    if origin is None:
        carried = _carried(model.folder / CARD) if model.folder is not None else ""
        origin = {
            "source": model.source or "trained with minilm_jax",
            "SHA-256 of the source's weights": model.fingerprint or "none",
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


def _carried(card: Path) -> str:
    """Returns the lines of a card's head that are carried along; "" where it has none."""
    if not card.is_file():
        return ""
    head = re.match(r"---\n(.*?\n)---\s", card.read_text("utf-8", errors="replace"), re.DOTALL)
    entries = re.split(r"^(?=[a-z_]+:)", head[1], flags=re.MULTILINE) if head else []
    return "".join(entry for entry in entries if entry.partition(":")[0] in _CARRIED)
