"""The figures of the papers and the model card, to stand beside ours.

Sources: microsoft/unilm minilm/README.md; MiniLM (arXiv 2002.10957) tables 8, 11 and 13. English:
dev sets, means of several runs; XNLI and MLQA: test sets. XLM-100's average on XNLI is not the
mean of its columns there either.
"""

from minilm_jax.tasks.languages import MLQA_LANGUAGES, XNLI_LANGUAGES

ENGLISH_COLUMNS = {
    "SQuAD2": ("squad2", "dev", "f1"),
    "MNLI-m": ("mnli", "dev", "accuracy"),
    "SST-2": ("sst2", "dev", "accuracy"),
    "QNLI": ("qnli", "dev", "accuracy"),
    "CoLA": ("cola", "dev", "matthews"),
    "RTE": ("rte", "dev", "accuracy"),
    "MRPC": ("mrpc", "dev", "accuracy"),
    "QQP": ("qqp", "dev", "accuracy"),
}
"""Column → task, split and metric, in the model card's order."""


def _row(figures: str, columns: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(columns, figures.split(), strict=True))


_ENGLISH = (*ENGLISH_COLUMNS, "avg")
ENGLISH = {
    "BERT-base": _row("76.8 84.5 93.2 91.7 58.9 68.6 87.3 91.3 81.5", _ENGLISH),
    "MiniLM-L12xH384": _row("81.7 85.7 93.0 91.5 58.5 73.3 89.5 91.3 83.1", _ENGLISH),
    "MiniLM-L6xH384": _row("75.6 83.3 91.5 90.5 47.5 68.8 88.9 90.6 79.6", _ENGLISH),
    # Of version 2 the model card gives two columns.
    "MiniLMv2-L6xH768 from RoBERTa-large": {"SQuAD2": "81.6", "MNLI-m": "87.0"},
    "MiniLMv2-L12xH384 from RoBERTa-large": {"SQuAD2": "82.3", "MNLI-m": "86.9"},
    "MiniLMv2-L6xH384 from RoBERTa-large": {"SQuAD2": "76.4", "MNLI-m": "84.4"},
    "MiniLMv2-L6xH768 from BERT-large": {"SQuAD2": "77.7", "MNLI-m": "85.0"},
    "MiniLMv2-L6xH384 from BERT-large": {"SQuAD2": "74.3", "MNLI-m": "83.0"},
    "MiniLMv2-L6xH768 from BERT-base": {"SQuAD2": "76.3", "MNLI-m": "84.2"},
    "MiniLMv2-L6xH384 from BERT-base": {"SQuAD2": "72.9", "MNLI-m": "82.8"},
}

_XNLI = ("avg", *XNLI_LANGUAGES)
XNLI = {
    "mBERT": _row(
        "66.3 82.1 73.8 74.3 71.1 66.4 68.9 69.0 61.6 64.9 69.5 55.8 69.3 60.0 50.4 58.0", _XNLI
    ),
    "XLM-100": _row(
        "70.7 83.2 76.7 77.7 74.0 72.7 74.1 72.7 68.7 68.6 72.9 68.9 72.5 65.6 58.2 62.4", _XNLI
    ),
    "XLM-R Base": _row(
        "74.5 84.6 78.4 78.9 76.8 75.9 77.3 75.4 73.2 71.5 75.4 72.5 74.9 71.1 65.2 66.5", _XNLI
    ),
    "mMiniLM-L12xH384": _row(
        "71.1 81.5 74.8 75.7 72.9 73.0 74.5 71.3 69.7 68.8 72.1 67.8 70.0 66.2 63.3 64.2", _XNLI
    ),
    "mMiniLM-L6xH384": _row(
        "68.0 79.2 72.3 73.1 70.3 69.1 72.0 69.1 64.5 64.9 69.0 66.0 67.8 62.9 59.0 60.6", _XNLI
    ),
    "mMiniLMv2-L12xH384": {"avg": "72.9"},
    "mMiniLMv2-L6xH384": {"avg": "69.3"},
}

_MLQA = ("avg", *MLQA_LANGUAGES)
MLQA = {
    "mBERT": _row(
        "57.7/41.6 77.7/65.2 64.3/46.6 57.9/44.3 45.7/29.8 43.8/29.7 57.1/38.6 57.5/37.3", _MLQA
    ),
    "XLM-15": _row(
        "61.6/43.5 74.9/62.4 68.0/49.8 62.2/47.6 54.8/36.3 48.8/27.3 61.4/41.8 61.1/39.6", _MLQA
    ),
    "XLM-R Base (reported)": _row(
        "62.9/45.7 77.8/65.3 67.2/49.7 60.8/47.1 53.0/34.7 57.9/41.7 63.1/43.1 60.2/38.0", _MLQA
    ),
    "XLM-R Base (fine-tuned by the authors)": _row(
        "64.9/46.9 80.3/67.4 67.0/49.2 62.7/48.3 55.0/35.6 60.4/43.7 66.5/45.9 62.3/38.3", _MLQA
    ),
    "mMiniLM-L12xH384": _row(
        "63.2/44.7 79.4/66.5 66.1/47.5 61.2/46.5 54.9/34.9 58.5/41.3 63.1/42.1 59.0/33.8", _MLQA
    ),
    "mMiniLM-L6xH384": _row(
        "53.7/36.6 75.5/61.9 55.6/38.2 53.3/37.7 43.5/26.2 46.9/31.5 52.0/33.1 48.8/27.3", _MLQA
    ),
    "mMiniLMv2-L12xH384": {"avg": "64.9/–"},
    "mMiniLMv2-L6xH384": {"avg": "59.0/–"},
}
