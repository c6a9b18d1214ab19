"""The tokenizer job: learns a new vocabulary from text."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minilm_jax.data.skipped import Skipped
from minilm_jax.data.sources import TextSource, read_documents, refuse_inside
from minilm_jax.data.tokenizer_training import train_sentencepiece, train_wordpiece
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.settings import Positive, Settings, check


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Settings):
    """Learn a new vocabulary."""

    source: TextSource
    """The text."""
    output: Path
    """Folder to write; it must not exist. transformers reads it too."""
    kind: Literal["wordpiece", "sentencepiece"] = "wordpiece"
    """`wordpiece` as BERT has it, or `sentencepiece` (unigram) as XLM-R has it."""
    vocab_size: Positive = 30_522
    """Pieces, special ones included."""
    case: Literal["lower", "keep"] = "lower"
    """For wordpiece: `lower` drops case and accents (BERT's uncased)."""
    character_coverage: float = 0.9995
    """For sentencepiece: share of the characters that get a piece."""
    longest_input: Positive = 512
    """Maximum input length, recorded for transformers."""


def run(config: TokenizerConfig, *, say: Callable[[str], None] = print) -> Tokenizer:
    """Returns the tokenizer that now lies in the output folder."""
    check("config", config, TokenizerConfig)
    refuse_inside(config.source, config.output)
    skipped = Skipped()
    documents = read_documents(config.source, skipped=skipped)
    if config.kind == "wordpiece":
        tokenizer = train_wordpiece(
            documents,
            output=config.output,
            vocab_size=config.vocab_size,
            lowercase=config.case == "lower",
            longest_input=config.longest_input,
        )
    else:
        tokenizer = train_sentencepiece(
            documents,
            output=config.output,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            longest_input=config.longest_input,
        )
    for line in skipped.lines():
        say(f"skipped    {line}")
    fewer = tokenizer.vocab_size < config.vocab_size
    more = f"; the text has not enough for {config.vocab_size:,}" if fewer else ""
    say(f"vocabulary {tokenizer.vocab_size:,} pieces in {config.output}{more}")
    return tokenizer
