"""Hugging Face's config.json ↔ EncoderConfig; a setting we do not compute is refused."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast, get_args, get_type_hints

from minilm_jax.encoder.config import Activation, EncoderConfig, Family
from minilm_jax.errors import CheckpointError

# Hugging Face's names of activations → ours. "gelu" is the exact one there and here.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_TO_HF = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Key:
    """One field: its name in config.json, older names, and its default where it may be absent."""

    name: str
    older: tuple[str, ...] = ()
    default: Any = None
    """None means that the key is required."""


_BERT_LIKE = {
    "vocab_size": _Key(name="vocab_size"),
    "hidden_size": _Key(name="hidden_size"),
    "num_hidden_layers": _Key(name="num_hidden_layers"),
    "num_attention_heads": _Key(name="num_attention_heads"),
    "intermediate_size": _Key(name="intermediate_size"),
    "max_position_embeddings": _Key(name="max_position_embeddings"),
    "type_vocab_size": _Key(name="type_vocab_size", default=2),
    "hidden_dropout_prob": _Key(name="hidden_dropout_prob", default=0.1),
    "attention_probs_dropout_prob": _Key(name="attention_probs_dropout_prob", default=0.1),
    "initializer_range": _Key(name="initializer_range", default=0.02),
    "layer_norm_eps": _Key(name="layer_norm_eps", default=1e-12),
    "pad_token_id": _Key(name="pad_token_id", default=0),
}
_KEYS: dict[Family, dict[str, _Key]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE | {"pad_token_id": _Key(name="pad_token_id", default=1)},
    "xlm-roberta": _BERT_LIKE | {"pad_token_id": _Key(name="pad_token_id", default=1)},
    "distilbert": {
        "vocab_size": _Key(name="vocab_size"),
        "hidden_size": _Key(name="dim"),
        "num_hidden_layers": _Key(name="n_layers"),
        "num_attention_heads": _Key(name="n_heads"),
        "intermediate_size": _Key(name="hidden_dim"),
        "max_position_embeddings": _Key(name="max_position_embeddings"),
        "hidden_dropout_prob": _Key(name="dropout", default=0.1),
        "attention_probs_dropout_prob": _Key(name="attention_dropout", default=0.1),
        "initializer_range": _Key(name="initializer_range", default=0.02),
        "pad_token_id": _Key(name="pad_token_id", default=0),
    },
    "xlm": {
        "vocab_size": _Key(name="vocab_size", older=("n_words",)),
        "hidden_size": _Key(name="emb_dim"),
        "num_hidden_layers": _Key(name="n_layers"),
        "num_attention_heads": _Key(name="n_heads"),
        "max_position_embeddings": _Key(name="max_position_embeddings"),
        "hidden_dropout_prob": _Key(name="dropout", default=0.1),
        "attention_probs_dropout_prob": _Key(name="attention_dropout", default=0.1),
        "initializer_range": _Key(name="init_std", default=0.02),
        "layer_norm_eps": _Key(name="layer_norm_eps", default=1e-12),
        "pad_token_id": _Key(name="pad_token_id", older=("pad_index",), default=2),
    },
}

# Settings that change what is computed, and the only values under which it is what we compute.
_BERT_FIXED = {
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, []),
    "embedding_size": (),
}
_FIXED: dict[Family, dict[str, tuple]] = {
    "bert": _BERT_FIXED,
    "roberta": _BERT_FIXED,
    "xlm-roberta": _BERT_FIXED,
    "distilbert": {
        "chunk_size_feed_forward": (0,),
        "pruned_heads": ({}, []),
    },
    "xlm": {
        "asm": (False,),
        "causal": (False,),
        "is_encoder": (True,),
        "summary_type": ("first",),
        "summary_use_proj": (True,),
        "summary_activation": (None,),
        "summary_proj_to_labels": (True,),
        "pruned_heads": ({}, []),
    },
}

# Settings with which the weights are not those of the family, and the way out.
_NEVER = {
    # They belong to somebody's own code.
    "auto_map": "names code in the repository, which is never executed here; "
    "remove the key if the weights are those of the standard architecture",
    "quantization_config": "says that the weights are quantised, which is not read; "
    "convert the unquantised model, or what `model.dequantize()` and `save_pretrained()` write",
}


TASK_SETTINGS = (
    *("finetuning_task", "task_specific_params", "id2label", "label2id", "num_labels"),
    "problem_type",
)
"""What a config.json says of the task that a model was fine-tuned for."""


def without_task(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json's content without what it says of a task."""
    return {name: value for name, value in hf.items() if name not in TASK_SETTINGS}


def from_hf_config(hf: Mapping[str, Any], *, name: str) -> EncoderConfig:
    """Returns the encoder's shape; `name` is the file that errors speak of.

    A config without `model_type` is read as BERT's, as Google's and Microsoft's releases are.

    Raises:
      CheckpointError: a setting is missing, of the wrong kind, or asks for something that this
        encoder does not compute.
      ConfigError: the shape is impossible.
    """
    family = _family(hf, name)
    for key, why in _NEVER.items():
        if hf.get(key):
            raise CheckpointError(f"{name}: {key} {why}")
    for key, allowed in _FIXED[family].items():
        value = hf.get(key, allowed[0] if allowed else None)
        if value is not None and value not in allowed:
            wanted = " or ".join(repr(a) for a in allowed) or "no such key"
            raise CheckpointError(
                f"{name}: {key}={value!r:.80} is not supported; readable is {wanted}"
            )
    fields: dict[str, Any] = {"model_type": family}
    for ours, entry in _KEYS[family].items():
        fields[ours] = _number(hf, entry, integral=_is_integral(ours), name=name)
    fields["hidden_act"] = _activation(hf, family, name)
    if family == "distilbert":
        fields |= {"type_vocab_size": 0, "layer_norm_eps": 1e-12}
    if family == "xlm":
        fields |= {"type_vocab_size": 0, "n_langs": _languages(hf, name)}
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    if fields["pad_token_id"] >= fields["vocab_size"]:
        raise CheckpointError(
            f"{name}: pad_token_id={fields['pad_token_id']} is no row of the "
            f"{fields['vocab_size']} that vocab_size says"
        )
    if family in ("roberta", "xlm-roberta"):
        fields["position_offset"] = fields["pad_token_id"] + 1
    try:
        return EncoderConfig(**fields)
    except Exception as error:
        error.args = (f"{name}: {error}",)
        raise


def to_hf_config(
    config: EncoderConfig, original: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns config.json's content for `config`; keys of `original` that say no shape are kept.

    `architectures` and the labels are the writer's business: they depend on the heads.
    """
    kept = dict(original or {})
    for key in ("auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        kept.pop(key, None)
    known = _KEYS[config.model_type]
    for ours, entry in known.items():
        for older in entry.older:
            kept.pop(older, None)
        kept[entry.name] = getattr(config, ours)
    kept["model_type"] = config.model_type
    kept["tie_word_embeddings"] = True
    kept.pop("tie_weights_", None)
    if config.model_type == "xlm":
        if config.intermediate_size != 4 * config.hidden_size:
            raise CheckpointError(
                f"intermediate_size={config.intermediate_size} cannot be written as XLM, whose "
                f"feed-forward is always 4 × hidden_size={4 * config.hidden_size}"
            )
        if config.hidden_act == "gelu_tanh":
            raise CheckpointError("hidden_act='gelu_tanh' cannot be written as XLM: gelu or relu")
        kept["gelu_activation"] = config.hidden_act == "gelu"
        if config.n_langs or kept.get("use_lang_emb", True):
            kept["n_langs"] = max(config.n_langs, 1)
    elif config.model_type == "distilbert":
        _keep_activation(kept, "activation", config.hidden_act)
    else:
        _keep_activation(kept, "hidden_act", config.hidden_act)
    # Writing must not promise what reading would refuse or read otherwise.
    if from_hf_config(kept, name="the config to write") != config:
        raise CheckpointError(
            f"this encoder cannot be written as model_type={config.model_type!r}: "
            f"{config} reads back as {from_hf_config(kept, name='the config to write')}"
        )
    return kept


def _family(hf: Mapping[str, Any], name: str) -> Family:
    value = hf.get("model_type", "bert")
    if value not in get_args(Family):
        raise CheckpointError(
            f"{name}: model_type={value!r:.80} is not one of {', '.join(get_args(Family))}, the "
            "families that are read (docs/conversion.md)"
        )
    return cast(Family, value)


def _is_integral(field: str) -> bool:
    return get_type_hints(EncoderConfig)[field] is int


def _number(hf: Mapping[str, Any], key: _Key, *, integral: bool, name: str) -> Any:
    present = [k for k in (key.name, *key.older) if k in hf]
    value = hf[present[0]] if present else key.default
    if value is None and key.default is not None:
        value = key.default
    if value is None:
        raise CheckpointError(f"{name}: {key.name} is missing")
    kinds: tuple[type, ...] = (int,) if integral else (int, float)
    if type(value) not in kinds or not math.isfinite(value):
        what = "an integer" if integral else "a finite number"
        raise CheckpointError(f"{name}: {key.name}={value!r:.80} is not {what}")
    return value if integral else float(value)


def _activation(hf: Mapping[str, Any], family: Family, name: str) -> Activation:
    if family == "xlm":
        value = hf.get("gelu_activation", True)
        if not isinstance(value, bool):
            raise CheckpointError(f"{name}: gelu_activation={value!r:.80} is not true or false")
        return "gelu" if value else "relu"
    key = "activation" if family == "distilbert" else "hidden_act"
    value = hf.get(key, "gelu")
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise CheckpointError(
            f"{name}: {key}={value!r:.80} is not one of {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[value]


def _keep_activation(kept: dict[str, Any], key: str, activation: str) -> None:
    if _ACTIVATIONS.get(kept.get(key, "")) != activation:
        kept[key] = _TO_HF[activation]


def _languages(hf: Mapping[str, Any], name: str) -> int:
    count = _number(hf, _Key(name="n_langs", default=1), integral=True, name=name)
    used = hf.get("use_lang_emb", True)
    if not isinstance(used, bool):
        raise CheckpointError(f"{name}: use_lang_emb={used!r:.80} is not true or false")
    # One language needs no embedding: Hugging Face builds the table from two on.
    return count if used and count > 1 else 0
