"""Which foreign tensor is which of ours: one declarative table per family, read in both directions.

A row says: foreign name ↔ our path, the foreign shape in the glossary's letters, and whether the
matrix is transposed (PyTorch keeps dense weights as [out, in], Flax as [in, out]).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from minilm_jax.encoder.config import Family

HEADS = (
    "pooler",
    "mlm",
    "next_sentence",
    "sequence_classifier",
    "token_classifier",
    "span",
)


def with_needed(parts: Iterable[str]) -> set[str]:
    """Returns the parts and those they compute on: next sentences are told from the pooler's."""
    wanted = set(parts)
    return wanted | {"pooler"} if "next_sentence" in wanted else wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor, or with `{i}` one per layer."""

    foreign: str
    ours: str
    """Path in our parameters; its first word is the part."""
    shape: str
    """The foreign shape: V vocabulary, P positions, T token types, G languages, D width,
    F feed-forward, C classes, or a number."""
    transform: Literal["same", "transpose"] = "same"
    backbone: bool = True
    """Whether the name stands behind the backbone's prefix (`bert.`) in a model with a head."""
    twins: tuple[str, ...] = ()
    """Other names under which older files hold the same tensor once more."""

    @property
    def part(self) -> str:
        """The part this row belongs to."""
        return self.ours.split("/", 1)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Everything that names depend on in one family."""

    prefix: str
    """The backbone's name in models with a head."""
    rows: tuple[Row, ...]
    architectures: Mapping[str, frozenset[str]]
    """Hugging Face class → the heads it has. The first that fits is written."""
    buffers: tuple[str, ...] = ()
    """Tensors that hold no parameter; they are checked to be 0, 1, 2, … or zeros and left out."""


def _dense(foreign: str, ours: str, shape: str, *, backbone: bool = True) -> tuple[Row, ...]:
    """Returns kernel and bias of a dense layer; `shape` is "out in"."""
    return (
        Row(
            foreign=f"{foreign}.weight",
            ours=f"{ours}/kernel",
            shape=shape,
            transform="transpose",
            backbone=backbone,
        ),
        Row(
            foreign=f"{foreign}.bias",
            ours=f"{ours}/bias",
            shape=shape.split()[0],
            backbone=backbone,
        ),
    )


def _norm(foreign: str, ours: str, *, backbone: bool = True) -> tuple[Row, ...]:
    """Returns scale and bias of a LayerNorm."""
    return (
        Row(foreign=f"{foreign}.weight", ours=f"{ours}/scale", shape="D", backbone=backbone),
        Row(foreign=f"{foreign}.bias", ours=f"{ours}/bias", shape="D", backbone=backbone),
    )


def _table(foreign: str, ours: str, shape: str, *, twins: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Returns one embedding table."""
    return (
        Row(foreign=foreign, ours=f"encoder/embeddings/{ours}/embedding", shape=shape, twins=twins),
    )


_LAYER = "encoder/layer_{i}"


def _bert_rows(*, decoder: str) -> tuple[Row, ...]:
    layer = "encoder.layer.{i}"
    return (
        *_table("embeddings.word_embeddings.weight", "word", "V D", twins=(f"{decoder}.weight",)),
        *_table("embeddings.position_embeddings.weight", "position", "P D"),
        *_table("embeddings.token_type_embeddings.weight", "token_type", "T D"),
        *_norm("embeddings.LayerNorm", "encoder/embeddings/norm"),
        *_dense(f"{layer}.attention.self.query", f"{_LAYER}/attention/query", "D D"),
        *_dense(f"{layer}.attention.self.key", f"{_LAYER}/attention/key", "D D"),
        *_dense(f"{layer}.attention.self.value", f"{_LAYER}/attention/value", "D D"),
        *_dense(f"{layer}.attention.output.dense", f"{_LAYER}/attention/output", "D D"),
        *_norm(f"{layer}.attention.output.LayerNorm", f"{_LAYER}/attention_norm"),
        *_dense(f"{layer}.intermediate.dense", f"{_LAYER}/ffn/up", "F D"),
        *_dense(f"{layer}.output.dense", f"{_LAYER}/ffn/down", "D F"),
        *_norm(f"{layer}.output.LayerNorm", f"{_LAYER}/ffn_norm"),
        *_dense("pooler.dense", "pooler/dense", "D D"),
    )


def _plain_heads() -> tuple[Row, ...]:
    """Returns the two heads every family names alike."""
    return (
        *_dense("classifier", "token_classifier/output", "C D", backbone=False),
        *_dense("qa_outputs", "span/output", "2 D", backbone=False),
    )


def _vocabulary_bias(foreign: str, *twins: str) -> Row:
    return Row(foreign=foreign, ours="mlm/bias", shape="V", backbone=False, twins=twins)


_BERT = Table(
    prefix="bert",
    rows=(
        *_bert_rows(decoder="cls.predictions.decoder"),
        *_dense("cls.predictions.transform.dense", "mlm/dense", "D D", backbone=False),
        *_norm("cls.predictions.transform.LayerNorm", "mlm/norm", backbone=False),
        _vocabulary_bias("cls.predictions.bias", "cls.predictions.decoder.bias"),
        *_dense("cls.seq_relationship", "next_sentence/output", "2 D", backbone=False),
        # BERT classifies on its pooler's output: within that head the pooler is its first layer.
        *_dense("pooler.dense", "sequence_classifier/dense", "D D"),
        *_dense("classifier", "sequence_classifier/output", "C D", backbone=False),
        *_plain_heads(),
    ),
    architectures={
        "BertModel": frozenset(),
        "BertForMaskedLM": frozenset({"mlm"}),
        "BertForPreTraining": frozenset({"mlm", "next_sentence"}),
        "BertForNextSentencePrediction": frozenset({"next_sentence"}),
        "BertForSequenceClassification": frozenset({"sequence_classifier"}),
        "BertForTokenClassification": frozenset({"token_classifier"}),
        "BertForQuestionAnswering": frozenset({"span"}),
    },
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
)


def _roberta(name: str) -> Table:
    return Table(
        prefix="roberta",
        rows=(
            *_bert_rows(decoder="lm_head.decoder"),
            *_dense("lm_head.dense", "mlm/dense", "D D", backbone=False),
            *_norm("lm_head.layer_norm", "mlm/norm", backbone=False),
            _vocabulary_bias("lm_head.bias", "lm_head.decoder.bias"),
            *_dense("classifier.dense", "sequence_classifier/dense", "D D", backbone=False),
            *_dense("classifier.out_proj", "sequence_classifier/output", "C D", backbone=False),
            *_plain_heads(),
        ),
        architectures={
            f"{name}Model": frozenset(),
            f"{name}ForMaskedLM": frozenset({"mlm"}),
            f"{name}ForSequenceClassification": frozenset({"sequence_classifier"}),
            f"{name}ForTokenClassification": frozenset({"token_classifier"}),
            f"{name}ForQuestionAnswering": frozenset({"span"}),
        },
        buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
    )


def _distilbert() -> Table:
    layer = "transformer.layer.{i}"
    return Table(
        prefix="distilbert",
        rows=(
            *_table(
                "embeddings.word_embeddings.weight",
                "word",
                "V D",
                twins=("vocab_projector.weight",),
            ),
            *_table("embeddings.position_embeddings.weight", "position", "P D"),
            *_norm("embeddings.LayerNorm", "encoder/embeddings/norm"),
            *_dense(f"{layer}.attention.q_lin", f"{_LAYER}/attention/query", "D D"),
            *_dense(f"{layer}.attention.k_lin", f"{_LAYER}/attention/key", "D D"),
            *_dense(f"{layer}.attention.v_lin", f"{_LAYER}/attention/value", "D D"),
            *_dense(f"{layer}.attention.out_lin", f"{_LAYER}/attention/output", "D D"),
            *_norm(f"{layer}.sa_layer_norm", f"{_LAYER}/attention_norm"),
            *_dense(f"{layer}.ffn.lin1", f"{_LAYER}/ffn/up", "F D"),
            *_dense(f"{layer}.ffn.lin2", f"{_LAYER}/ffn/down", "D F"),
            *_norm(f"{layer}.output_layer_norm", f"{_LAYER}/ffn_norm"),
            *_dense("vocab_transform", "mlm/dense", "D D", backbone=False),
            *_norm("vocab_layer_norm", "mlm/norm", backbone=False),
            _vocabulary_bias("vocab_projector.bias"),
            *_dense("pre_classifier", "sequence_classifier/dense", "D D", backbone=False),
            *_dense("classifier", "sequence_classifier/output", "C D", backbone=False),
            *_plain_heads(),
        ),
        architectures={
            "DistilBertModel": frozenset(),
            "DistilBertForMaskedLM": frozenset({"mlm"}),
            "DistilBertForSequenceClassification": frozenset({"sequence_classifier"}),
            "DistilBertForTokenClassification": frozenset({"token_classifier"}),
            "DistilBertForQuestionAnswering": frozenset({"span"}),
        },
        buffers=("embeddings.position_ids",),
    )


def _xlm() -> Table:
    return Table(
        prefix="transformer",
        rows=(
            *_table("embeddings.weight", "word", "V D", twins=("pred_layer.proj.weight",)),
            *_table("position_embeddings.weight", "position", "P D"),
            *_table("lang_embeddings.weight", "language", "G D"),
            *_norm("layer_norm_emb", "encoder/embeddings/norm"),
            *_dense("attentions.{i}.q_lin", f"{_LAYER}/attention/query", "D D"),
            *_dense("attentions.{i}.k_lin", f"{_LAYER}/attention/key", "D D"),
            *_dense("attentions.{i}.v_lin", f"{_LAYER}/attention/value", "D D"),
            *_dense("attentions.{i}.out_lin", f"{_LAYER}/attention/output", "D D"),
            *_norm("layer_norm1.{i}", f"{_LAYER}/attention_norm"),
            *_dense("ffns.{i}.lin1", f"{_LAYER}/ffn/up", "F D"),
            *_dense("ffns.{i}.lin2", f"{_LAYER}/ffn/down", "D F"),
            *_norm("layer_norm2.{i}", f"{_LAYER}/ffn_norm"),
            _vocabulary_bias("pred_layer.proj.bias"),
            *_dense(
                "sequence_summary.summary", "sequence_classifier/output", "C D", backbone=False
            ),
            *_plain_heads(),
        ),
        architectures={
            "XLMModel": frozenset(),
            "XLMWithLMHeadModel": frozenset({"mlm"}),
            "XLMForSequenceClassification": frozenset({"sequence_classifier"}),
            "XLMForTokenClassification": frozenset({"token_classifier"}),
            "XLMForQuestionAnsweringSimple": frozenset({"span"}),
        },
        buffers=("position_ids",),
    )


TABLES: dict[Family, Table] = {
    "bert": _BERT,
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "distilbert": _distilbert(),
    "xlm": _xlm(),
}
