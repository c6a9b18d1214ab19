"""The text of a distillation run: tokenised, opened, in batches, masked."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from minilm_jax.data.batches import Batches
from minilm_jax.data.corpus import MANIFEST, Corpus
from minilm_jax.data.masking import Masking
from minilm_jax.data.prepare import prepare
from minilm_jax.data.skipped import Skipped
from minilm_jax.data.sources import read_documents, refuse_inside
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.errors import ConfigError, DataError
from minilm_jax.jobs.distill_config import DistillConfig

CORPUS = "corpus"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The batches of a run's corpora."""

    train: Batches
    heldout: Batches
    lines: tuple[str, ...]
    """What is in them, and what was left out when they were made."""


def check_source(config: DistillConfig) -> None:
    """Raises ConfigError where the run's raw text, if it is still needed, holds too little.

    DataError where the run's folder lies in one of text.
    """
    source, corpus = config.text.source, config.output / CORPUS
    if source is None or (corpus / MANIFEST).is_file():
        return
    refuse_inside(source, corpus)
    skipped = Skipped()
    found = len(list(itertools.islice(read_documents(source, skipped=skipped), 2)))
    left_out = f" (skipped: {'; '.join(skipped.lines())})" if skipped.counts else ""
    if found == 0:
        raise ConfigError(f"text.source holds no document{left_out}")
    if found == 1:
        raise ConfigError(
            f"text.source holds one document{left_out}, and the held-out loss needs a second "
            "one; in a .txt a blank line ends a document, with --text.source.documents line "
            "every line does"
        )


def tokenise(config: DistillConfig, tokenizer: Tokenizer) -> Path:
    """Returns the folder of the run's own corpus, which is made where that is not done.

    Once it is, the run needs its text no more, whatever becomes of it.
    """
    assert config.text.source is not None
    prepare(
        config.text.source,
        tokenizer=tokenizer.files[0].parent,
        output=config.output / CORPUS,
        holdout_fraction=config.text.heldout,
        finished_is_enough=True,
    )
    return config.output / CORPUS


def open_splits(config: DistillConfig, folders: Sequence[Path], tokenizer: Tokenizer) -> Splits:
    """Returns the batches of prepared corpora, known to be of this tokenizer and to have both."""
    made, lines = {}, []
    for split in ("train", "heldout"):
        corpora = [Corpus.open(folder, split=split) for folder in folders]
        for corpus in corpora:
            if split == "heldout" and not len(corpus):
                raise DataError(
                    f"{corpus.folder}: holds out no document to measure the loss on; make it "
                    "again, in a new folder, with a larger share: --heldout of minilm-jax prepare, "
                    "--text.heldout of raw text"
                )
        made[split] = Batches(corpora, config.batch, seed=config.train.seed, tokenizer=tokenizer)
        lines.append(
            f"{split:<8} {sum(map(len, corpora)):,} documents, "
            f"{sum(corpus.num_tokens for corpus in corpora):,} tokens"
        )
        if split == "train":
            lines += _mixture(made[split], corpora, steps=config.train.steps)
    skipped = Skipped()
    for corpus in corpora:  # of the last split; what was left out is of both
        skipped.update(corpus.manifest.left_out())
    lines += [f"skipped  {line}" for line in skipped.lines()]
    return Splits(**made, lines=tuple(lines))


def _mixture(train: Batches, corpora: Sequence[Corpus], *, steps: int) -> list[str]:
    """Returns what the corpora are, where there are several, and how often each part is read."""
    lines = [
        f"corpus {number} {corpus.folder}: {len(corpus):,} documents, {corpus.num_tokens:,} tokens"
        for number, corpus in enumerate(corpora)
        if len(corpora) > 1
    ]
    shares, passes = train.shares(), train.passes(steps)
    if len(shares) == 1:
        lines.append(f"{steps:,} steps read all of it {_times(next(iter(passes.values())))}")
    else:
        lines += [
            f"{name}: {shares[name]:.1%} of the rows; {steps:,} steps read it {_times(times)}"
            for name, times in passes.items()
        ]
    return [f"{'':<8} {line}" for line in lines]


def _times(count: float) -> str:
    return f"{count:,.0f} times" if count >= 100 else f"{count:.3g} times"


def make_masking(
    config: DistillConfig, tokenizer: Tokenizer
) -> Callable[[dict[str, np.ndarray], int], dict[str, np.ndarray]]:
    """Returns (batch, step) -> the batch as the objective wants it: masked, or as it is."""
    wanted = config.objective.masking()
    if wanted is None:
        return lambda batch, step: batch
    masking = Masking(wanted, seed=config.train.seed, tokenizer=tokenizer)
    return lambda batch, step: masking(batch, step=step)
