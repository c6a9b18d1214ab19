"""A good small BERT folder to break, and weights written without the library's bugs."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def bert_weights(*, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns random weights of CONFIG's BertModel, under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (40, 16),
        "embeddings.position_embeddings.weight": (20, 16),
        "embeddings.token_type_embeddings.weight": (2, 16),
        "embeddings.LayerNorm.weight": (16,),
        "embeddings.LayerNorm.bias": (16,),
    }
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for name, out, width in (
            ("attention.self.query", 16, 16),
            ("attention.self.key", 16, 16),
            ("attention.self.value", 16, 16),
            ("attention.output.dense", 16, 16),
            ("intermediate.dense", 24, 16),
            ("output.dense", 16, 24),
        ):
            shapes[f"{layer}.{name}.weight"] = (out, width)
            shapes[f"{layer}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{layer}.{name}.weight"] = (16,)
            shapes[f"{layer}.{name}.bias"] = (16,)
    shapes["pooler.dense.weight"] = (16, 16)
    shapes["pooler.dense.bias"] = (16,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file."""
    # safetensors 0.8.0 writes non-contiguous arrays wrong.
    safetensors.numpy.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path)


def small_bert(folder: Path) -> Path:
    """Returns `folder`, now a good BERT without a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_weights(folder / "model.safetensors", bert_weights())
    return folder
