"""Attention against the formula written out, and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.encoder import dot_product
from minilm_jax.encoder.dot_product import dot_product_attention
from minilm_jax.encoder.dropout import drop, kept, row_words

HEADS, RATE = 4, 0.25


def plain(query, key, value, segments, words, rate):
    """Returns softmax, dropout and mix with every array whole, for JAX to differentiate."""
    batch, length, width = query.shape
    q, k, v = (
        x.astype(jnp.float32).reshape(batch, length, HEADS, -1).transpose(0, 2, 1, 3)
        for x in (query, key, value)
    )
    logits = q @ k.swapaxes(2, 3) / np.sqrt(width // HEADS)
    allowed = segments[:, None, :, None] == segments[:, None, None, :]
    probabilities = jax.nn.softmax(jnp.where(allowed, logits, -jnp.inf), axis=-1)
    if words is not None:
        keep = kept(words, (HEADS, length, length), rate)
        probabilities = jnp.where(keep, probabilities / (1 - rate), 0.0)
    return (probabilities @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)


@pytest.fixture
def problem():
    """Returns (queries, keys, values), segments and dropout words of packed, ragged rows."""
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.normal(size=(3, 12, 32)), jnp.float32) for _ in range(3))
    segments = jnp.asarray([[1] * 12, [1] * 5 + [2] * 4 + [0] * 3, [1] + [0] * 11])
    return arrays, segments, row_words(jax.random.key(0), jnp.arange(3))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("elements", [2**22, 1])
def test_value_and_gradient_are_the_formula_s(problem, dropout, elements, monkeypatch):
    arrays, segments, words = problem
    for name in ("FORWARD_ELEMENTS", "BACKWARD_ELEMENTS"):  # all heads at once, or one at a time
        monkeypatch.setattr(dot_product, name, elements)
    words = words if dropout else None
    weight = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def ours(*arrays):
        out = dot_product_attention(
            *arrays, segments=segments, heads=HEADS, dropout_rate=RATE, words=words
        )
        return (out * weight).sum(), out

    def reference(*arrays):
        out = plain(*arrays, segments, words, RATE)
        return (out * weight).sum(), out

    found, expected = (
        jax.jit(jax.grad(function, argnums=(0, 1, 2), has_aux=True))(*arrays)
        for function in (ours, reference)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6), found, expected)


def test_bf16_operands_give_bf16_gradients_near_fp32_ones(problem):
    arrays, segments, words = problem

    def total(*arrays):
        out = dot_product_attention(
            *arrays, segments=segments, heads=HEADS, dropout_rate=RATE, words=words
        )
        return jnp.square(out.astype(jnp.float32)).sum()

    gradient = jax.grad(total, argnums=(0, 1, 2))
    exact = gradient(*arrays)
    rounded = gradient(*(x.astype(jnp.bfloat16) for x in arrays))
    for found, wanted in zip(rounded, exact, strict=True):
        assert found.dtype == jnp.bfloat16
        error = jnp.abs(found.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
        assert error < 0.03


def test_no_logits_are_kept_for_the_gradient():
    length = 256
    x = jax.ShapeDtypeStruct((2, length, 32), jnp.float32)
    segments = jnp.ones((2, length), jnp.int32)
    _, kept_for_gradient = jax.eval_shape(
        lambda x: jax.vjp(
            lambda x: dot_product_attention(x, x, x, segments=segments, heads=HEADS), x
        ),
        x,
    )
    sizes = [leaf.size for leaf in jax.tree.leaves(kept_for_gradient)]
    assert max(sizes) <= 2 * length * 32


def test_dropout_keeps_the_share_it_should_and_rows_do_not_resemble_each_other():
    rows, size, rate = 64, 4096, 0.1
    words = row_words(jax.random.key(3), jnp.arange(rows))
    keep = np.asarray(kept(words, (size,), rate), np.float64)
    deviation = np.sqrt(rate * (1 - rate))
    # Means of all, of rows and of columns: within 4.5 standard errors.
    assert abs(keep.mean() - (1 - rate)) < 4.5 * deviation / np.sqrt(rows * size)
    assert np.abs(keep.mean(axis=1) - (1 - rate)).max() < 4.5 * deviation / np.sqrt(size)
    assert np.abs(keep.mean(axis=0) - (1 - rate)).max() < 5.5 * deviation / np.sqrt(rows)
    # Rows with each other, and a row with itself shifted: correlations of chance alone.
    normal = (keep - (1 - rate)) / deviation
    between = normal @ normal.T / size - np.diag(np.diag(normal @ normal.T / size))
    assert np.abs(between).max() < 5.5 / np.sqrt(size)
    for shift in (1, 2, 3, 64, 1024):
        within = (normal[:, shift:] * normal[:, :-shift]).mean()
        assert abs(within) < 4.5 / np.sqrt(rows * (size - shift))


def test_dropout_of_a_part_is_the_part_of_the_whole_and_its_gradient_the_same_mask():
    words = row_words(jax.random.key(0), jnp.arange(2))
    whole = kept(words, (6, 5), 0.5)
    np.testing.assert_array_equal(kept(words, (2, 5), 0.5, first=10), whole[:, 2:4])
    x = jnp.ones((2, 6, 5))
    gradient = jax.grad(lambda x: drop(x, words, 0.5).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.where(whole, 2.0, 0.0))


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_dropout_in_bf16_is_no_factor_in_the_mean(rate):
    """1 / (1 - rate), rounded to bf16, is 0.16% too low or 0.18% too high for all that is kept."""
    words = row_words(jax.random.key(0), jnp.arange(16))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4096)), jnp.bfloat16)
    found = np.asarray(drop(x, words, rate), np.float64)[kept(words, (4096,), rate)]
    before = np.asarray(x, np.float64)[kept(words, (4096,), rate)]
    factor = (found * before).sum() / (before * before).sum()
    assert abs(factor * (1 - rate) - 1) < 2e-4
