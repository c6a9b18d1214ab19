"""What the encoder does with rows no table was made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.dense import Dense
from minilm_jax.encoder.encoder import encode, init_params
from minilm_jax.errors import DataError

_BERT = EncoderConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=6,
)
_ROBERTA = dataclasses.replace(
    _BERT, max_position_embeddings=8, position_offset=2, pad_token_id=1, type_vocab_size=1
)
_PADDED_BY_ITS_LAST_PIECE = dataclasses.replace(_BERT, pad_token_id=10)


@pytest.mark.parametrize("config", [_BERT, _ROBERTA, _PADDED_BY_ITS_LAST_PIECE])
def test_a_document_longer_than_the_position_table_is_no_number(config):
    """Its last tokens shared a position: figures that look like any others."""
    params = init_params(jax.random.key(0), config)

    def hidden(segments):
        segments = jnp.asarray([segments], jnp.int32)
        batch = {"input_ids": jnp.full_like(segments, 5), "segments": segments}
        return np.asarray(encode(config, params, batch).last_hidden_state)

    assert config.max_length == 6
    assert np.isfinite(hidden([1] * 6 + [2] * 6 + [0] * 3)).all()  # each has positions of its own
    assert np.isnan(hidden([1] * 7)).any()


def test_a_batch_without_segments_is_refused():
    """All tokens would be text, padding too."""
    batch = {"input_ids": jnp.ones((1, 4), jnp.int32), "attention_mask": jnp.ones((1, 4))}
    with pytest.raises(DataError, match=r"no segments, only input_ids, attention_mask; segments"):
        encode(_BERT, {}, batch)


def test_gradients_of_kernels_are_summed_in_fp32_where_products_are_bf16():
    """In bf16 they would be rounded, and on a mesh added up in bf16, device by device."""
    params = init_params(jax.random.key(0), _BERT)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 6)), jnp.int32)
    batch = {"input_ids": tokens, "segments": jnp.ones_like(tokens)}

    def total(params):
        hidden = encode(_BERT, params, batch, compute=Compute(dtype="bfloat16")).last_hidden_state
        return jnp.sum(hidden.astype(jnp.float32) ** 3)

    gradients = jax.jit(jax.grad(total))(params)["layer_0"]
    kernels = {
        jax.tree_util.keystr(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(gradients)
        if "kernel" in jax.tree_util.keystr(path)
    }
    assert len(kernels) == 6
    for name, gradient in kernels.items():
        assert (gradient != gradient.astype(jnp.bfloat16)).any(), name


def test_a_kernel_s_gradient_counts_on_where_bf16_stops():
    layer = Dense(2, _BERT, jnp.bfloat16)
    x = jnp.ones((3, 171, 4), jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda params: layer.apply(params, x).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(gradient["params"]["kernel"], 513.0)
