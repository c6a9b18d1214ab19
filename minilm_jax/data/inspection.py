"""What a corpus holds, for people: counts, lengths, languages, packing, and some of its rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from minilm_jax.data.batches import BatchConfig, Batches, Layout
from minilm_jax.data.corpus import Corpus, Split, Verify, read_manifest
from minilm_jax.data.skipped import Skipped
from minilm_jax.data.tokenizers import load_tokenizer
from minilm_jax.errors import DataError

_PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Inspection:
    """Figures of one split and a few decoded rows."""

    documents: int
    tokens: int
    others: dict[str, int]
    """Documents of the corpus's other splits."""
    dtype: str
    shards: int
    tokenizer: str
    skipped: Skipped
    length_percentiles: dict[int, int]
    """Tokens of a document, by percentile."""
    languages: dict[str, "LanguageCount"]
    efficiency: float
    """Share of the tokens of packed rows that are not padding, special tokens included."""
    rows_per_epoch: int
    rows: tuple[str, ...]
    """Decoded rows of step 0."""


@dataclass(frozen=True)
class LanguageCount:
    """How much of a language there is."""

    documents: int
    tokens: int


def check_corpus(folder: str | Path) -> None:
    """Reads all of a corpus; its tokenizer must be the one it was made with.

    Raises:
        DataError: The corpus is unfinished, or something in it is damaged or was exchanged.
    """
    manifest, own = read_manifest(folder), Path(folder) / "tokenizer"
    for split in get_args(Split):
        if manifest.splits.get(split):
            Corpus.open(folder, split=split, verify="hashes")
    if load_tokenizer(own).fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            f"{own}: is not the one that this corpus was made with; copy it again, or give a new"
            " folder"
        )


def inspect_corpus(
    folder: str | Path,
    *,
    split: Split = "train",
    sequence_length: int = 512,
    layout: Layout = "packed",
    rows: int = 3,
    verify: Verify = "auto",
) -> Inspection:
    """Returns the figures of a split, and its first rows under seed 0.

    Raises:
        DataError: The corpus is unfinished, damaged, or the split is empty.
    """
    corpus = Corpus.open(folder, split=split, verify=verify)
    tokenizer = load_tokenizer(corpus.folder / "tokenizer")
    if rows < 1:
        raise DataError(f"rows is {rows}: give at least 1")
    config = BatchConfig(batch_size=rows, sequence_length=sequence_length, layout=layout)
    batches = Batches([corpus], config, seed=0, tokenizer=tokenizer)
    batch = batches.at(0)
    decoded = tuple(
        tokenizer.decode(ids[segments > 0])
        for ids, segments in zip(batch["input_ids"], batch["segments"], strict=True)
    )
    lengths, languages = corpus.lengths, corpus.document_languages
    percentiles = np.percentile(lengths, _PERCENTILES, method="nearest")
    return Inspection(
        documents=len(corpus),
        tokens=corpus.num_tokens,
        others={
            other: sum(shard.documents for shard in found)
            for other, found in corpus.manifest.splits.items()
            if other != split
        },
        dtype=corpus.manifest.dtype,
        shards=len(corpus.manifest.splits[split]),
        tokenizer=f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, {tokenizer.fingerprint[:8]}",
        skipped=corpus.manifest.left_out(),
        length_percentiles=dict(zip(_PERCENTILES, map(int, percentiles), strict=True)),
        languages={
            code: LanguageCount(
                documents=int((languages == i).sum()), tokens=int(lengths[languages == i].sum())
            )
            for i, code in enumerate(corpus.languages)
        },
        efficiency=batches.efficiency,
        rows_per_epoch=batches.rows_per_epoch,
        rows=decoded,
    )
