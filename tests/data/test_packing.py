import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm_jax.data.packing import pack


def efficiency(histogram, patterns, capacity):
    tokens = (np.arange(len(histogram)) * histogram).sum()
    return tokens / (sum(p.rows for p in patterns) * capacity)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 32), max_size=60))
def test_every_piece_has_a_place_and_no_row_overflows(lengths):
    histogram = np.bincount(np.asarray(lengths, int), minlength=33)
    patterns = pack(histogram, capacity=32)
    packed = np.zeros(33, int)
    for pattern in patterns:
        assert 0 < sum(pattern.lengths) <= 32 and pattern.rows > 0
        for length in pattern.lengths:
            packed[length] += pattern.rows
    np.testing.assert_array_equal(packed, histogram)


@pytest.mark.parametrize("capacity", [128, 512])
def test_natural_lengths_waste_less_than_two_percent(capacity):
    # Log-normal around 150 tokens with a long tail, cut into pieces: Wikipedia's shape.
    rng = np.random.default_rng(0)
    documents = np.exp(rng.normal(5.0, 1.2, 50_000)).astype(int) + 1
    inside = capacity - 2
    full = (documents - 1) // inside
    rest = documents - full * inside + 2
    histogram = np.bincount(rest, minlength=capacity + 1)
    histogram[capacity] += full.sum()
    assert efficiency(histogram, pack(histogram, capacity=capacity), capacity) > 0.98
