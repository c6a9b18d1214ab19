"""Useful tokens a second of packed and padded batches, in the real distillation step.

    python benchmarks/packing.py

Documents have natural (log-normal) lengths that fill about half of a padded batch. Both layouts
come from data/batches.py and run the same compiled step: 4 rows × 512 × 48 relation heads, teacher
and student 6 × 384. Writes benchmarks/results/packing_cpu.md.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import _jax_work
import numpy as np
from _peers import measure
from _report import machine, spread, write_section
from _setting import Setting
from cost_model import STUDENT_6X384
from data_reading import stand_in_tokenizer, write_corpus

from minilm_jax.data.batches import BatchConfig, Batches
from minilm_jax.data.corpus import Corpus

ROWS, LENGTH, HEADS, STEPS = 4, 512, 48, 4
GOAL = 1.8

TITLE = f"""# Packed against padded

`python benchmarks/packing.py` wrote this: the full distillation step, 6 × 384 to 6 × 384, {ROWS}
rows of {LENGTH} tokens, {HEADS} relation heads, fp32. A run is {STEPS} steps on {STEPS} batches.
Its time hardly depends on what is in them. Useful tokens are those that are not padding; their
share is that of an epoch. Times are medians (minimum–maximum) of runs that take turns.
"""


def main() -> None:
    """Measures both layouts and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90, help="of timing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = _jax_work.write_encoder(Path(folder) / "model", STUDENT_6X384, seed=0)
        setting = Setting(
            teacher=model,
            student=model,
            teacher_layer=STUDENT_6X384.num_hidden_layers,
            batch=ROWS,
            length=LENGTH,
            heads=HEADS,
        )
        corpus = write_corpus(Path(folder) / "corpus", stand_in_tokenizer(), 1_000_000)
        layouts = {"packed": batches_of(corpus, "packed"), "padded": batches_of(corpus, "padded")}
        about = machine()
        figures = measure(
            {
                name: partial(
                    _jax_work.distillation_step,
                    setting,
                    batches=[batches.at(step) for step in range(STEPS)],
                    checked=False,
                )
                for name, batches in layouts.items()
            },
            budget=options.seconds,
        )
    rates = {
        name: batches.efficiency * ROWS * LENGTH * STEPS / float(np.median(figures[name].seconds))
        for name, batches in layouts.items()
    }
    lines = [
        f"{about}.",
        "",
        "| batches | useful tokens | ms a run | useful tokens/s | of padded |",
        "|---|---|---|---|---|",
    ]
    for name, batches in layouts.items():
        lines.append(
            f"| {name} | {batches.efficiency:.1%} | {spread(figures[name].seconds)} "
            f"| {rates[name]:,.0f} | {rates[name] / rates['padded']:.2f}× |"
        )
    lines += ["", f"Goal: {GOAL}×."]
    write_section("packing_cpu", f"{ROWS}x{LENGTH}x{HEADS}", lines, title=TITLE)


def batches_of(corpus: Corpus, layout: Literal["packed", "padded"]) -> Batches:
    """Returns the batches of a run."""
    config = BatchConfig(batch_size=ROWS, sequence_length=LENGTH, layout=layout)
    return Batches([corpus], config, seed=0, tokenizer=stand_in_tokenizer())


if __name__ == "__main__":
    main()
