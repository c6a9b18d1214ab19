"""What all peers of a distillation or encoder benchmark have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Weights, shape of the batch and how to compute."""

    student: Path
    """Hugging Face folder of the model that is trained or run."""
    teacher: Path | None = None
    """Hugging Face folder; only distillation has one."""
    teacher_layer: int = 0
    """Of the teacher, from 1; the student's is its last."""
    batch: int
    length: int
    heads: int = 0
    """Relation heads."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrix products; parameters are fp32 for all."""
    device: Literal["cpu", "cuda"] = "cpu"

    def tokens(self) -> np.ndarray:
        """Returns int32 `[B, L]`, every row full: ids that are no special token of BERT."""
        return np.random.default_rng(0).integers(
            1000, 30000, (self.batch, self.length), dtype=np.int32
        )


def embedding_check(embeddings: np.ndarray) -> float:
    """Returns one number of `[texts, D]` that depends on their order and on every unit."""
    texts, width = embeddings.shape
    weights = np.sin(np.arange(texts))[:, None] * np.sin(np.arange(width))
    return float(np.sum(weights * embeddings, dtype=np.float64))
