"""The model card that stands in every folder we write."""

import math
from collections.abc import Mapping, Sequence

from minilm_jax import __version__
from minilm_jax.convert.model import Model, flatten


def model_card(
    model: Model, architecture: str, *, stored_as: Sequence[str], origin: Mapping[str, str] | None
) -> str:
    """Returns README.md: what the weights are, where they came from, how to load them.

    Args:
      model: that is written.
      architecture: its class in transformers.
      stored_as: the dtypes of its weights.
      origin: how the weights came about, by name; None names the model's source.
    """
    config = model.config
    if origin is None:
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
---
# {architecture}

| | |
|---|---|
{rows}

```python
from transformers import {architecture}

model = {architecture}.from_pretrained("path/to/this/folder")
```
"""
