"""What the distillation step moves through an H100's memory, counted in the compiled program.

    pip install -e '.[cuda]'
    python benchmarks/gpu_program.py

XLA compiles the step for a GPU that is only described (minilm_jax/train/described.py). Its program
is a list of operations, each of which reads its operands from memory and writes its result there.
This script adds up their sizes. Nothing is run. Writes benchmarks/results/gpu_program.md.
"""

import dataclasses
import datetime
import importlib.metadata
import re
from collections.abc import Iterator
from typing import get_args

import jax
from _report import write_section

from minilm_jax.cli import load_experiment
from minilm_jax.encoder.config import Attention
from minilm_jax.jobs.distill_config import DistillConfig
from minilm_jax.jobs.plan import abstract_step
from minilm_jax.jobs.teacher import describe_teacher
from minilm_jax.train.described import described_devices
from minilm_jax.train.devices import Devices
from minilm_jax.train.hardware import GIB

RECIPES = {
    "BERT-base → 6×384": "experiments/minilm_v2/bert_base_6x384.py",
    "BERT-large → 12×384": "experiments/minilm_v2/bert_large_12x384.py",
}
BATCHES = [(128, 128), (32, 512)]
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while"}
"""Operations that only name what is there; and the search for documents' borders, a loop."""

TITLE = """# The step's program on an H100

`python benchmarks/gpu_program.py` wrote this: the distillation step, compiled by XLA for one H100
that need not be present, with bf16 products, dropout 0.1 and AdamW. Nothing was run on a GPU.

*Moved* adds up the operands and results of all operations: what they read from and write to the
GPU's memory. It leaves out what a kernel reads again (the keys, for each block of rows) and what
caches save, so it is no measure of time. `plain` is attention made of XLA's operations, `auto`
takes our kernels. The relation loss uses its kernels in both.
"""


def main() -> None:
    """Compiles every recipe at every batch with either attention."""
    for name, recipe in RECIPES.items():
        config = load_experiment(recipe)
        lines = [
            f"jax {jax.__version__}, {_plugin()}; {datetime.date.today()}.",
            "",
            "| rows × tokens | attention | moved, GB | temporary memory, GiB | operations |",
            "|---|---|---|---|---|",
        ]
        for rows, tokens in BATCHES:
            for attention in get_args(Attention):
                text, temporary = compiled(config, rows=rows, tokens=tokens, attention=attention)
                sizes = list(moved(text))
                lines.append(
                    f"| {rows} × {tokens} | {attention} | {sum(sizes) / 1e9:.1f} "
                    f"| {temporary / GIB:.2f} | {len(sizes)} |"
                )
        write_section("gpu_program", name, lines, title=TITLE)


def compiled(
    config: DistillConfig, *, rows: int, tokens: int, attention: Attention
) -> tuple[str, int]:
    """Returns the compiled step's program and the bytes it takes beside its arguments."""
    config = dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, batch_size=rows, sequence_length=tokens),
        compute=dataclasses.replace(config.compute, attention=attention),
    )
    devices = Devices(devices=described_devices("gpu-h100-1"))
    step, *arguments = abstract_step(config, describe_teacher(config), devices)
    program = step.lower(*arguments).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


def moved(program: str) -> Iterator[int]:
    """Yields the bytes that each operation of a program's main computation reads and writes."""
    entry = program[program.index("\nENTRY ") :].splitlines()[1:]
    results: dict[str, int] = {}
    for line in entry:
        match = re.match(r"\s+(?:ROOT )?(%\S+) = (.+?) ([a-z-]+)\((.*?)\)(?:,|$)", line)
        if match is None:
            continue
        name, shape, operation, operands = match.groups()
        results[name] = _size(shape)
        if operation in ("call", "conditional"):
            raise RuntimeError(f"{name} has operations of its own, which this does not count")
        if operation not in FREE:
            names = re.findall(r"%[\w.-]+", operands)
            yield results[name] + sum(results.get(operand, 0) for operand in names)


def _size(shape: str) -> int:
    total = 0
    for dtype, dimensions in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        elements = 1
        for size in filter(None, dimensions.split(",")):
            elements *= int(size)
        total += BYTES.get(dtype, 8) * elements
    return total


def _plugin() -> str:
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "no CUDA plugin"


if __name__ == "__main__":
    main()
