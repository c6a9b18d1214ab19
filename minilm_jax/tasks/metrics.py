"""GLUE's and XNLI's metrics as fractions: accuracy, F1, Matthews, Pearson and Spearman."""

from collections.abc import Hashable, Sequence, Sized

import numpy as np
from jaxtyping import Float


def accuracy(predicted: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """Returns the share of equal pairs."""
    _check(predicted, gold)
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)


def f1(predicted: Sequence[Hashable], gold: Sequence[Hashable], *, positive: Hashable) -> float:
    """Returns 2 TP / (2 TP + FP + FN) of one class; 0 where nothing is positive."""
    _check(predicted, gold)
    pairs = list(zip(predicted, gold, strict=True))
    hit = sum(p == positive == g for p, g in pairs)
    miss = sum((p == positive) != (g == positive) for p, g in pairs)
    return 2 * hit / (2 * hit + miss) if hit else 0.0


def matthews(predicted: Sequence[Hashable], gold: Sequence[Hashable]) -> float:
    """Returns Matthews' correlation of any number of classes (Gorodkin 2004, R_K).

    (c s − Σ p_k t_k) / √((s² − Σ p_k²)(s² − Σ t_k²)) with c correct of s, p_k predicted and t_k
    true of class k; 0 where one side has one class only.
    """
    _check(predicted, gold)
    classes = sorted({*predicted, *gold}, key=repr)
    p = np.array([sum(x == c for x in predicted) for c in classes], np.float64)
    t = np.array([sum(x == c for x in gold) for c in classes], np.float64)
    s = float(len(gold))
    c = accuracy(predicted, gold) * s
    spread = (s * s - p @ p) * (s * s - t @ t)
    return float((c * s - p @ t) / np.sqrt(spread)) if spread > 0 else 0.0


def pearson(predicted: Float[np.ndarray, "B"], gold: Float[np.ndarray, "B"]) -> float:
    """Returns Pearson's correlation; 0 where one side is constant and it is undefined.

    Raises:
      ValueError: a value is not finite, or the sides differ in length.
    """
    _check(predicted, gold)
    _check_finite(predicted, gold)
    x, y = (np.asarray(v, np.float64) - np.mean(v, dtype=np.float64) for v in (predicted, gold))
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else 0.0


def spearman(predicted: Float[np.ndarray, "B"], gold: Float[np.ndarray, "B"]) -> float:
    """Returns Pearson's correlation of the ranks; ties share the mean of their ranks.

    Raises:
      ValueError: a value is not finite, or the sides differ in length.
    """
    _check(predicted, gold)
    _check_finite(predicted, gold)  # NaN has a rank: the last
    return pearson(_ranks(predicted), _ranks(gold))


def _ranks(values: Float[np.ndarray, "B"]) -> np.ndarray:
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def _check(predicted: Sized, gold: Sized) -> None:
    if len(predicted) != len(gold) or not len(gold):
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} gold values")


def _check_finite(*sides: Float[np.ndarray, "B"]) -> None:
    bad = sum(int((~np.isfinite(side)).sum()) for side in sides)
    if bad:
        raise ValueError(f"{bad} of the values to correlate are not finite")
