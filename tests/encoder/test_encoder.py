"""What the encoder does with rows no table was made for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.encoder.config import EncoderConfig
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
