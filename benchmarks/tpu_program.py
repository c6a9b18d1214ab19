"""What the distillation step costs on a TPU v5e, as its compiler sees it.

    pip install -e '.[tpu]'
    python benchmarks/tpu_program.py

libtpu compiles the step for chips that are only described (minilm_jax/train/described.py), and says
of each of XLA's operations how many cycles it expects it to take. Kernels have no such estimate:
only their bytes are counted. Nothing is run. Writes benchmarks/results/tpu_program.md.
"""

import dataclasses
import datetime
import importlib.metadata
import re
from typing import Any, get_args

import jax
from _report import write_section
from gpu_program import BATCHES, RECIPES

from minilm_jax.cli import load_experiment
from minilm_jax.encoder.config import Attention
from minilm_jax.jobs.distill_config import DistillConfig
from minilm_jax.jobs.plan import abstract_step
from minilm_jax.jobs.teacher import describe_teacher
from minilm_jax.train.described import described_devices
from minilm_jax.train.devices import Devices
from minilm_jax.train.hardware import GIB

CHIPS = 8
CLOCK = 1.5e9
"""Hz of a v5e: four matrix units of 128 × 128 make its published 197 TFLOP/s."""

TITLE = """# The step's program on a TPU v5e

`python benchmarks/tpu_program.py` wrote this: the distillation step compiled by libtpu for a slice
of eight v5e that are not there, by pmap, bf16 products, dropout 0.1, AdamW; rows are those of one
chip. *Expected* adds up the cycles that the compiler expects of each of XLA's operations, at
1.5 GHz, one after another; kernels (*k*) are not in it. *Moved* is XLA's count of the bytes that
operations and kernels read and write. `plain` is attention made of XLA's operations, `auto` takes
our kernels; the relation loss has its kernels in both. Nothing was run on a TPU.
"""


def main() -> None:
    """Compiles every recipe at every batch with either attention."""
    version = importlib.metadata.version("libtpu")
    for name, recipe in RECIPES.items():
        config = load_experiment(recipe)
        lines = [
            f"jax {jax.__version__}, libtpu {version}; {datetime.date.today()}.",
            "",
            "| rows × tokens | attention | expected, ms | k | moved, GB | temporary memory, GiB |",
            "|---|---|---|---|---|---|",
        ]
        for rows, tokens in BATCHES:
            for attention in get_args(Attention):
                program = compiled(config, rows=rows, tokens=tokens, attention=attention)
                text = program.as_text()
                cycles = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))
                moved = program.cost_analysis()["bytes accessed"]
                temporary = program.memory_analysis().temp_size_in_bytes
                lines.append(
                    f"| {rows} × {tokens} | {attention} | {1e3 * cycles / CLOCK:.1f} "
                    f"| {text.count('tpu_custom_call')} | {moved / 1e9:.1f} "
                    f"| {temporary / GIB:.2f} |"
                )
        write_section("tpu_program", name, lines, title=TITLE)


def compiled(config: DistillConfig, *, rows: int, tokens: int, attention: Attention) -> Any:
    """Returns the compiled step of a chip that gets so many rows."""
    config = dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, batch_size=CHIPS * rows, sequence_length=tokens),
        compute=dataclasses.replace(config.compute, attention=attention),
    )
    devices = Devices(devices=described_devices(f"tpu-v5e-{CHIPS}"))
    step, *arguments = abstract_step(config, describe_teacher(config), devices)
    return step.lower(*arguments).compile()


if __name__ == "__main__":
    main()
