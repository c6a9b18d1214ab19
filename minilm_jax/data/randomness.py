"""Random numbers that are functions of their keys: no state, the same for any numpy version."""

import numpy as np
from jaxtyping import Float64, Int64

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def random_bits(*keys: int | np.integer | np.ndarray) -> np.ndarray:
    """Returns uint64 that depend on every key, by the SplitMix64 finaliser.

    Args:
        *keys: Integers or integer arrays that broadcast; each combination has its own value.
    """
    bits: np.ndarray = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            bits = _finalise(np.asarray((bits ^ _unsigned(key)) + _STEP))
    return bits


def uniform(*keys: int | np.integer | np.ndarray) -> Float64[np.ndarray, "..."]:
    """Returns numbers in [0, 1) that depend on every key."""
    return np.asarray((random_bits(*keys) >> np.uint64(11)) * 2.0**-53)


def permutation(size: int, *keys: int) -> Int64[np.ndarray, "size"]:
    """Returns 0, …, size - 1 in an order that depends on every key."""
    # The finaliser is a bijection and its inputs differ: no two sorting keys are equal, and any
    # sorting algorithm gives one result.
    with np.errstate(over="ignore"):
        sorting_keys = _finalise(np.arange(size, dtype=np.uint64) * _STEP + random_bits(*keys))
    return np.argsort(sorting_keys)


def _unsigned(key: int | np.integer | np.ndarray) -> np.ndarray:
    if isinstance(key, np.ndarray):
        return key.astype(np.uint64)
    return np.asarray(int(key) & _MASK, np.uint64)


def _finalise(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ (bits >> np.uint64(31)))
