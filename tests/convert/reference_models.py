"""Small random models of every family and head, made by PyTorch; only the golden script and the
tests marked `torch` call the functions that import it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
}
_XLM = {
    "vocab_size": 40,
    "emb_dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 20,
}
_DISTIL = {
    "vocab_size": 40,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 20,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: a Hugging Face class and its config."""

    name: str
    architecture: str
    settings: dict[str, Any]
    dtype: str = "float32"
    tokenizer_pad: int | None = None
    """The id at padded places, where it is not the config's pad_token_id."""

    @property
    def has_types(self) -> bool:
        return self.architecture.startswith("Bert")

    @property
    def languages(self) -> int:
        return self.settings.get("n_langs", 0) if self.settings.get("use_lang_emb", True) else 0


_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _SMALL),
    "roberta": ("Roberta", {**_SMALL, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlmr": ("XLMRoberta", {**_SMALL, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBert", _DISTIL),
    "xlm": ("XLM", {**_XLM, "n_langs": 3}),
}
_HEADS = {
    "base": "Model",
    "mlm": "ForMaskedLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
}


def _cases() -> list[Case]:
    cases = []
    for family, (prefix, settings) in _FAMILIES.items():
        for head, suffix in _HEADS.items():
            if prefix == "XLM":
                renamed = {"mlm": "WithLMHeadModel", "span": "ForQuestionAnsweringSimple"}
                suffix = renamed.get(head, suffix)
            labels = {"num_labels": 3} if head in ("sequence", "token") else {}
            cases.append(Case(f"{family}-{head}", prefix + suffix, {**settings, **labels}))
    multilingual = {**_SMALL, "vocab_size": 55}
    v2 = _FAMILIES["xlmr"][1]
    cases += [
        Case("bert-pretraining", "BertForPreTraining", _SMALL),
        Case("bert-next", "BertForNextSentencePrediction", _SMALL),
        Case("bert-tanh", "BertModel", {**_SMALL, "hidden_act": "gelu_new"}),
        # RoBERTa's head keeps the exact GELU whatever hidden_act says; the others' follow it.
        Case("roberta_relu-mlm", "RobertaForMaskedLM", {**v2, "hidden_act": "relu"}),
        Case("bert_relu-mlm", "BertForMaskedLM", {**_SMALL, "hidden_act": "relu"}),
        Case("distilbert_relu-mlm", "DistilBertForMaskedLM", {**_DISTIL, "activation": "relu"}),
        Case("multilingual_minilm-base", "BertModel", multilingual, tokenizer_pad=1),
        Case("mminilmv2-base", "XLMRobertaModel", v2, dtype="float16"),
        Case("xlm_one_language-base", "XLMModel", {**_XLM, "n_langs": 1}),
        Case("xlm_100-mlm", "XLMWithLMHeadModel", {**_XLM, "n_langs": 5, "use_lang_emb": False}),
        Case(
            "xlm_sinusoidal-base",
            "XLMModel",
            {**_XLM, "n_langs": 1, "sinusoidal_embeddings": True, "gelu_activation": False},
        ),
        Case(
            "distilbert_sinusoidal-base",
            "DistilBertModel",
            {**_DISTIL, "sinusoidal_pos_embds": True},
        ),
    ]
    return cases


CASES = _cases()


def build(case: Case, folder: Path) -> Any:
    """Returns a random torch model, saved in `folder`; no parameter is near its default."""
    import torch
    import transformers

    torch.manual_seed(sum(map(ord, case.name)))
    config_class = getattr(transformers, case.architecture).config_class
    module = getattr(transformers, case.architecture)(config_class(**case.settings))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Biases of zero and scales of one would hide a mix-up; the tables' scale keeps
            # attention from being uniform.
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            scale = 0.5 if "embeddings" in name else 0.3
            parameter.copy_(centre + scale * torch.randn_like(parameter))
    module.tie_weights()
    if case.dtype != "float32":
        module = module.to(getattr(torch, case.dtype))
    module.save_pretrained(folder)
    return module.float().eval()


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Returns a batch with padding, and token types and languages where the model has them."""
    rng = np.random.default_rng(sum(map(ord, case.name)))
    vocabulary = case.settings["vocab_size"]
    default = {"Rob": 1, "XLMR": 1, "XLM": 2}
    family = next((p for p in ("XLMR", "XLM", "Rob") if case.architecture.startswith(p)), "")
    pad = default.get(family, 0) if case.tokenizer_pad is None else case.tokenizer_pad
    lengths = (9, 6, 2)
    ids = rng.integers(3, vocabulary, (3, 9)).astype(np.int32)
    if case.tokenizer_pad is not None:
        ids[:, 0] = 0  # <s> of XLM-R, which this config calls padding
    segments = np.array([[int(j < n) for j in range(9)] for n in lengths], np.int32)
    batch = {"input_ids": np.where(segments == 1, ids, pad).astype(np.int32), "segments": segments}
    if case.has_types:
        batch["token_type_ids"] = (rng.random((3, 9)) < 0.5).astype(np.int32) * segments
    if case.languages > 1:
        batch["languages"] = rng.integers(0, case.languages, (3, 9)).astype(np.int32)
    return batch


def cotangents(case: Case, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns weights of each output in the scalar loss Σ w·y, zero where padding is."""
    rng = np.random.default_rng(7)
    segments = inputs(case)["segments"]
    found = {}
    for name, shape in sorted(shapes.items()):
        weight = rng.normal(size=shape).astype(np.float32)
        if shape[:2] == segments.shape and len(shape) >= 2 and name not in ("pooler",):
            weight *= segments.reshape(*segments.shape, *([1] * (len(shape) - 2)))
        found[name] = weight
    return found


def last_outputs(names: set[str]) -> set[str]:
    """Returns the outputs the scalar loss is taken of: the heads', or the last hidden state."""
    heads = {n for n in names if not n.startswith("hidden_")}
    if heads - {"pooler"}:
        return heads
    return heads | {max((n for n in names if n not in heads), key=lambda n: int(n.split("_")[1]))}
