"""Exact sizes of the published models; our modules and the name tables agree on every shape."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from minilm_jax.convert.matching import write_names
from minilm_jax.convert.model import flatten
from minilm_jax.convert.names import TABLES
from minilm_jax.encoder import heads
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import Encoder


def _shapes(module, *args, **kwargs) -> dict:
    return jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))[
        "params"
    ]


def _encoder_shapes(config: EncoderConfig) -> dict:
    tokens = jnp.ones((1, 4), jnp.int32)
    return _shapes(Encoder(config), tokens, segments=tokens)


def _count(tree: dict) -> int:
    return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())


_V1 = EncoderConfig(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
)
_ROBERTA = dataclasses.replace(
    _V1,
    model_type="roberta",
    vocab_size=50265,
    max_position_embeddings=514,
    type_vocab_size=1,
    position_offset=2,
    pad_token_id=1,
    layer_norm_eps=1e-5,
)
_XLMR = dataclasses.replace(_ROBERTA, model_type="xlm-roberta", vocab_size=250002)
_WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6}
_BASE = EncoderConfig()

# Without and with the pooler; they reproduce the rounded figures of the releases.
_PUBLISHED = {
    "MiniLMv1-L12-H384": (_V1, 33_212_160, 33_360_000),
    "MiniLMv1-L6-H384": (dataclasses.replace(_V1, num_hidden_layers=6), 22_565_376, 22_713_216),
    "MiniLMv1-L6-H768": (dataclasses.replace(_V1, **_WIDE), 66_364_416, 66_955_008),
    "Multilingual-MiniLM-L12-H384": (
        dataclasses.replace(_V1, vocab_size=250037),
        117_505_920,
        117_653_760,
    ),
    "mMiniLMv2-L12-H384": (_XLMR, 117_492_864, 117_640_704),
    "mMiniLMv2-L6-H384": (
        dataclasses.replace(_XLMR, num_hidden_layers=6),
        106_846_080,
        106_993_920,
    ),
    "MiniLMv2-L12-H384-RoBERTa": (_ROBERTA, 40_793_856, 40_941_696),
    "MiniLMv2-L6-H384-RoBERTa": (
        dataclasses.replace(_ROBERTA, num_hidden_layers=6),
        30_147_072,
        30_294_912,
    ),
    "MiniLMv2-L6-H768-RoBERTa": (dataclasses.replace(_ROBERTA, **_WIDE), 81_527_808, 82_118_400),
    "BERT-base": (_BASE, 108_891_648, 109_482_240),
}


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_parameter_counts(name):
    config, without, with_pooler = _PUBLISHED[name]
    assert _count(_encoder_shapes(config)) == without
    hidden = jnp.zeros((1, 4, config.hidden_size))
    assert without + _count(_shapes(heads.Pooler(config), hidden)) == with_pooler


_SMALL = EncoderConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=20,
)
_FAMILIES = {
    "bert": _SMALL,
    "roberta": dataclasses.replace(_SMALL, model_type="roberta", position_offset=1),
    "xlm-roberta": dataclasses.replace(_SMALL, model_type="xlm-roberta", position_offset=1),
    "distilbert": dataclasses.replace(_SMALL, model_type="distilbert", type_vocab_size=0),
    "xlm": dataclasses.replace(_SMALL, model_type="xlm", type_vocab_size=0, n_langs=3),
}


@pytest.mark.parametrize("family", _FAMILIES)
def test_tables_name_exactly_what_the_modules_declare(family):
    """write_names raises on a parameter that is unknown, missing or misshaped in the table."""
    config = _FAMILIES[family]
    hidden, table = jnp.zeros((1, 4, 16)), jnp.zeros((40, 16))
    modules = {
        "mlm": _shapes(heads.MaskedLM(config), hidden, word_embeddings=table),
        "next_sentence": _shapes(heads.NextSentence(config), hidden[:, 0]),
        "sequence_classifier": _shapes(heads.SequenceClassifier(config, 3), hidden),
        "token_classifier": _shapes(heads.TokenClassifier(config, 3), hidden),
        "span": _shapes(heads.Span(config), hidden),
    }
    for architecture, parts in TABLES[config.model_type].architectures.items():
        params = {"encoder": _encoder_shapes(config)} | {part: modules[part] for part in parts}
        shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
        found, matches = write_names(shapes, config=config)
        assert found == architecture
        assert len(matches) == len(shapes)
