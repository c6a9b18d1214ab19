"""The inspect job: shows what a corpus holds."""

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from minilm_jax.data.batches import Layout
from minilm_jax.data.corpus import Split, Verify
from minilm_jax.data.inspection import Inspection, inspect_corpus
from minilm_jax.settings import Positive, Settings, check

_SHOWN_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Settings):
    """Show what a prepared corpus holds."""

    corpus: tyro.conf.Positional[Path]
    """Folder made by `minilm-jax prepare`."""
    split: Split = "train"
    """`train` or `heldout`."""
    sequence_length: int = 512
    """Tokens of a row, for the packing figures and the rows shown."""
    layout: Layout = "packed"
    """How documents share rows."""
    rows: Positive = 3
    """Rows shown as text."""
    verify: Verify = "auto"
    """`hashes` reads and checks every byte; `auto` does so up to 2 GiB."""


def run(config: InspectConfig, *, say: Callable[[str], None] = print) -> Inspection:
    """Returns the figures that it shows."""
    check("config", config, InspectConfig)
    found = inspect_corpus(
        config.corpus,
        split=config.split,
        sequence_length=config.sequence_length,
        layout=config.layout,
        rows=config.rows,
        verify=config.verify,
    )
    others = "".join(f"; {count:,} in {split}" for split, count in found.others.items())
    say(f"documents   {found.documents:,} in {config.split}{others}")
    shards = "1 shard" if found.shards == 1 else f"{found.shards:,} shards"
    say(f"tokens      {found.tokens:,} ({found.dtype}, {shards})")
    say(f"tokenizer   {found.tokenizer}")
    marks = ", ".join(f"{value:,} ({mark}%)" for mark, value in found.length_percentiles.items())
    say(f"lengths     {marks}")
    for code, count in found.languages.items():
        share = count.tokens / found.tokens
        name = code or "unknown"
        say(f"language    {name}: {count.documents:,} documents, {share:.1%} of the tokens")
    for line in found.skipped.lines():
        say(f"skipped     {line}")
    say(
        f"{config.layout:<12}{found.efficiency:.2%} of the tokens are text;"
        f" {found.rows_per_epoch:,} rows of {config.sequence_length} an epoch"
    )
    for number, text in enumerate(found.rows):
        shown = textwrap.shorten(text, _SHOWN_CHARACTERS, placeholder=" …")
        say(f"\nrow {number}\n{textwrap.fill(shown, 100)}")
    return found
