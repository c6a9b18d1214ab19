"""Heads beyond parity (tests/convert/test_golden.py): pooling, dropout, gathered masked tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.heads import MaskedLM, SequenceClassifier, pool

_CONFIG = EncoderConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    hidden_dropout_prob=0.5,
)
_HIDDEN = jax.random.normal(jax.random.key(1), (4, 6, 8))


def test_mean_pooling_ignores_padding():
    segments = jnp.array([[1, 1, 0, 0, 0, 0], [1, 2, 2, 2, 2, 2], [1] * 6, [0] * 6])
    found = pool(_HIDDEN, segments=segments, pooling="mean")
    hidden = np.asarray(_HIDDEN)
    np.testing.assert_allclose(found[0], hidden[0, :2].mean(0), atol=1e-6)
    np.testing.assert_allclose(found[1], hidden[1].mean(0), atol=1e-6)
    np.testing.assert_array_equal(found[3], np.zeros(8))  # a row without tokens is no NaN
    spoiled = _HIDDEN.at[0, 2:].set(1e9)
    np.testing.assert_array_equal(found[0], pool(spoiled, segments=segments, pooling="mean")[0])


def test_cls_pooling_is_the_first_token_in_fp32():
    found = pool(_HIDDEN.astype(jnp.bfloat16), segments=jnp.ones((4, 6), int), pooling="cls")
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, _HIDDEN.astype(jnp.bfloat16)[:, 0].astype(jnp.float32))


def test_masked_tokens_may_be_gathered_first():
    table = jax.random.normal(jax.random.key(2), (11, 8))
    head = MaskedLM(_CONFIG)
    params = head.init(jax.random.key(0), _HIDDEN, word_embeddings=table)
    everywhere = head.apply(params, _HIDDEN, word_embeddings=table)
    gathered = head.apply(params, _HIDDEN[1, jnp.array([2, 5])], word_embeddings=table)
    np.testing.assert_allclose(everywhere[1, jnp.array([2, 5])], gathered, atol=1e-6)
    # bf16 products, fp32 logits: a loss over 250,002 entries needs them.
    low = MaskedLM(_CONFIG, jnp.bfloat16).apply(params, _HIDDEN, word_embeddings=table)
    assert low.dtype == jnp.float32
    assert np.abs(low - everywhere).max() < 0.05 * np.abs(everywhere).max()


def test_dropout_is_a_function_of_the_global_row():
    head = SequenceClassifier(_CONFIG, 3)
    params = head.init(jax.random.key(0), _HIDDEN)
    rngs = {"dropout": jax.random.key(5)}
    rows = jnp.arange(4)
    whole = head.apply(params, _HIDDEN, rows=rows, deterministic=False, rngs=rngs)
    half = head.apply(params, _HIDDEN[2:], rows=rows[2:], deterministic=False, rngs=rngs)
    np.testing.assert_allclose(whole[2:], half, atol=1e-6)
    assert np.abs(whole - head.apply(params, _HIDDEN)).max() > 1e-3
    with pytest.raises(ValueError, match="dropout needs rows"):
        head.apply(params, _HIDDEN, deterministic=False, rngs=rngs)
    none = SequenceClassifier(_CONFIG, 3, 0.0)
    kept = none.apply(params, _HIDDEN, rows=rows, deterministic=False, rngs=rngs)
    np.testing.assert_allclose(kept, head.apply(params, _HIDDEN), atol=1e-6)


def test_a_row_of_padding_has_a_gradient():
    def loss(hidden):
        segments = jnp.array([[1, 1], [0, 0]])
        found = pool(hidden, segments=segments, pooling="mean", normalize=True)
        return jnp.sum(found[0] * jnp.arange(3.0)) + 0.0 * jnp.sum(found[1])

    gradient = jax.grad(loss)(jnp.ones((2, 2, 3)))
    assert jnp.isfinite(gradient).all()
    assert jnp.abs(gradient[0]).max() > 0.1
