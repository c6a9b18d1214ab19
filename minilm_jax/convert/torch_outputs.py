"""The outputs of `apply.outputs`, computed by PyTorch's transformers; needs torch installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.errors import CheckpointError

# transformers' output field → our name.
_FIELDS = {
    "pooler_output": "pooler",
    "start_logits": "span_start",
    "end_logits": "span_end",
    "prediction_logits": "mlm",
    "seq_relationship_logits": "next_sentence",
}
# The kind of class → what its `logits` are.
_LOGITS = {
    "ForMaskedLM": "mlm",
    "WithLMHeadModel": "mlm",
    "ForNextSentencePrediction": "next_sentence",
    "ForSequenceClassification": "sequence_classifier",
    "ForTokenClassification": "token_classifier",
}


def load_torch(folder: Path, *, architecture: str) -> Any:
    """Returns the torch module of class `architecture`, in fp32 and evaluation mode.

    Raises:
      CheckpointError: a weight is missing, unknown or misshaped; transformers only warns.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    module, info = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    # The base classes build a pooler whether or not the checkpoint has one.
    missing = {k for k in info["missing_keys"] if "pooler" not in k}
    rest = {key: value for key, value in info.items() if key != "missing_keys" and value}
    if missing or rest:
        raise CheckpointError(f"{folder}: transformers misses {sorted(missing)}, reports {rest}")
    return module.eval()


def torch_outputs(module: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns what the torch module computes, as torch tensors under our names.

    Args:
      module: from `load_torch`.
      inputs: input_ids, segments (one document a row), and token_type_ids, languages where used.
    """
    import torch

    foreign = {"segments": "attention_mask", "languages": "langs"}
    given = {foreign.get(k, k): torch.tensor(np.asarray(v)).long() for k, v in inputs.items()}
    result = module(**given, output_hidden_states=True, return_dict=True)
    found: dict[str, Any] = {f"hidden_{i}": h for i, h in enumerate(result.hidden_states)}
    for field, name in _FIELDS.items():
        if getattr(result, field, None) is not None:
            found[name] = getattr(result, field)
    for suffix, name in _LOGITS.items():
        if type(module).__name__.endswith(suffix):
            found[name] = result.logits
    return found
