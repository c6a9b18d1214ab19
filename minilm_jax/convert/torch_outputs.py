"""The outputs of `apply.outputs`, computed by PyTorch's transformers; needs torch installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.errors import CheckpointError, first_line

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
      CheckpointError: a weight is missing, unknown or misshaped, of which transformers only
        warns; or it cannot load the folder at all.
    """
    import torch
    import transformers

    logging = transformers.utils.logging
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a table of what is found below
    try:
        module, info = getattr(transformers, architecture).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # whatever a setting that says no shape makes it raise
        raise CheckpointError(
            f"transformers cannot load the {architecture} written: {first_line(error)}; correct "
            "the source's config.json"
        ) from error
    finally:
        logging.set_verbosity(before)
    faults = []
    for kind, found in info.items():
        # The base classes build a pooler whether or not the checkpoint has one; a model that finds
        # answers builds none, and old ones were saved with theirs.
        names = sorted(str(name) for name in found if "pooler" not in str(name))
        if names:
            faults.append(f"{kind.replace('_', ' ')}: {', '.join(names)}")
    if faults:
        raise CheckpointError(
            f"{architecture} of transformers does not fit the weights ({'; '.join(faults):.500}); "
            "name the class that does as `architectures` in the source's config.json, or leave out "
            "what it does not know (--heads)"
        )
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
