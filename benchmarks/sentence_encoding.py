"""Sentences a second, from text to embedding, compared with sentence-transformers.

    pip install -e '.[torch]' sentence-transformers
    python benchmarks/sentence_encoding.py MODEL

MODEL is a sentence-transformers folder with mean pooling, such as all-MiniLM-L6-v2. Both sides
tokenise the same sentences, sort them by length, encode them in batches (of 32 texts there, of
4,096 tokens in `SentenceEncoder`), pool, and restore the original order. The embeddings must agree
to 1e-4. Writes benchmarks/results/sentence_encoding_cpu.md.
"""

import argparse
from functools import partial
from pathlib import Path

import _jax_work
import _torch_work
import numpy as np
from _peers import measure
from _report import OURS, machine, spread, write_section

from minilm_jax.data.machine_docs import machine_documents

SENTENCES = 500

TITLE = """# Sentence encoding

`python benchmarks/sentence_encoding.py MODEL` wrote this: from text to embedding, tokenising
included, for sentences of Python's documentation, with sentence-transformers/all-MiniLM-L6-v2
(6 × 384), fp32. A run covers all sentences; times are medians (minimum–maximum) of runs that take
turns. *first* is the first run, compilation included. *memory* is the process's peak resident
memory while it runs, libraries included.
"""


def main() -> None:
    """Measures both and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--seconds", type=float, default=60, help="of timing")
    options = parser.parse_args()
    texts = sentences(SENTENCES)
    words = np.mean([len(text.split()) for text in texts])
    about = machine("torch", "transformers", "sentence-transformers")
    figures = measure(
        {
            OURS: partial(_jax_work.sentence_encoding, options.model, texts),
            "sentence-transformers": partial(_torch_work.sentence_encoding, options.model, texts),
        },
        budget=options.seconds,
    )
    lines = [
        f"{about}; {len(texts):,} sentences of {words:.0f} words.",
        "",
        "| | ms a run | sentences/s | ours is faster | first, s | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    ours = float(np.median(figures[OURS].seconds))
    for name, peer in figures.items():
        if peer.why_not:
            lines.append(f"| {name} | {peer.why_not} | – | – | – | – |")
            continue
        median = float(np.median(peer.seconds))
        faster = "–" if name == OURS else f"{median / ours:.2f}×"
        lines.append(
            f"| {name} | {spread(peer.seconds)} | {len(texts) / median:,.0f} | {faster} "
            f"| {peer.first:.1f} | {peer.peak / 2**20:,.0f} |"
        )
    write_section("sentence_encoding_cpu", "all-MiniLM-L6-v2", lines, title=TITLE)


def sentences(count: int) -> list[str]:
    """Returns sentences from all over Python's documentation."""
    found = [
        " ".join(sentence.split())
        for document in machine_documents()
        for sentence in document.text.split(". ")
        if len(sentence.split()) > 3
    ]
    return found[:: len(found) // count][:count]


if __name__ == "__main__":
    main()
