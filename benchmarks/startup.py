"""Time to the end of the first step, and time to compile models of 12 layers.

    python benchmarks/startup.py

Every figure comes from a process of its own. *First step* runs from the start of the process to
the end of the first distillation step (6 × 384 to 6 × 384, 16 × 128 × 48). It covers imports,
reading the weights from disk, compilation, an evaluation of the loss as in the job, and the step.
Compilation is measured without a cache. Writes benchmarks/results/startup_cpu.md.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import _jax_work
import jax
import jax.numpy as jnp
import numpy as np
from _report import machine, write_section
from _setting import Setting
from cost_model import BERT_BASE, STUDENT_6X384

from minilm_jax.data.batches import BatchConfig
from minilm_jax.distill.objectives import minilmv2
from minilm_jax.distill.student import StudentConfig
from minilm_jax.encoder.encoder import encode, init_params
from minilm_jax.jobs.distill_config import DistillConfig, TeacherConfig, TextConfig
from minilm_jax.jobs.plan import abstract_step
from minilm_jax.jobs.teacher import describe_teacher
from minilm_jax.train.devices import Devices

TITLE = """# Start-up and compilation

`python benchmarks/startup.py` wrote this: medians (minimum–maximum) in seconds, each run in its own
process. *First step* starts with the process and covers imports, reading the weights, compiling
and running an evaluation of the loss, then the step: 6 × 384 to 6 × 384 at 16 × 128 × 48.
"""


def main() -> None:
    """Measures and writes the tables, or runs one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--process", nargs=2, metavar=("TASK", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        task, folder = options.process
        print(json.dumps(TASKS[task](Path(folder))))
        return
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        shape = dataclasses.replace(STUDENT_6X384, initializer_range=0.1)
        _jax_work.write_encoder(Path(folder) / "model", shape, seed=0)
        cold = [first_step(folder, cache="") for _ in range(options.runs)]
        first_step(folder, cache=f"{folder}/cache")
        warm = [first_step(folder, cache=f"{folder}/cache") for _ in range(options.runs)]
        lines = [
            f"{about}.",
            "",
            "| compilation cache | end of the first step |",
            "|---|---|",
            f"| none | {in_seconds(cold)} |",
            f"| warm | {in_seconds(warm)} |",
        ]
        write_section("startup_cpu", "first step", lines, title=TITLE)
        lines = [f"{about}.", "", "| program | tracing | XLA |", "|---|---|---|"]
        for task in ("BERT-base, forward", "BERT-base → 12×384, step"):
            runs = [json.loads(process(task, folder, cache="")) for _ in range(options.runs)]
            tracing, compiling = zip(*runs, strict=True)
            lines.append(f"| {task} | {in_seconds(tracing)} | {in_seconds(compiling)} |")
    write_section("startup_cpu", "compiling 12 layers", lines, title=TITLE)


def first_step(folder: str, *, cache: str) -> float:
    """Returns the seconds that a process takes to do one step."""
    began = time.perf_counter()
    process("first step", folder, cache=cache)
    return time.perf_counter() - began


def process(task: str, folder: str, *, cache: str) -> str:
    """Returns what a process printed while doing a task; an empty `cache` means none."""
    done = subprocess.run(
        [sys.executable, __file__, "--process", task, folder],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout.decode()


def in_seconds(values: Sequence[float]) -> str:
    """Returns "median (minimum–maximum, n runs)"."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{middle:.1f} ({low:.1f}–{high:.1f}, {len(values)} runs)"


def do_first_step(folder: Path) -> None:
    """Does one distillation step."""
    model = folder / "model"
    setting = Setting(teacher=model, student=model, teacher_layer=6, batch=16, length=128, heads=48)
    _jax_work.distillation_step(setting, checked=False).run()


def compile_forward(_: Path) -> tuple[float, float]:
    """Returns the seconds of tracing and of compiling a forward pass of 16 × 128."""
    tokens = jax.ShapeDtypeStruct((16, 128), jnp.int32)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), BERT_BASE))

    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        batch = {"input_ids": tokens, "segments": tokens}
        return encode(BERT_BASE, params, batch).last_hidden_state

    return compile_seconds(lambda: jax.jit(forward).lower(params, tokens))


def compile_step(folder: Path) -> tuple[float, float]:
    """Returns the seconds of tracing and of compiling the distillation step of 16 × 128 × 48."""
    config = DistillConfig(
        output=folder,
        teacher=TeacherConfig(source="BERT-base", shape=BERT_BASE),
        student=StudentConfig(num_hidden_layers=12),
        text=TextConfig(corpora=(folder,)),
        objective=minilmv2(heads=48, teacher_layer=12, student_layer=12),
        batch=BatchConfig(batch_size=16, sequence_length=128),
    )
    step, *arguments = abstract_step(
        config, describe_teacher(config), Devices(devices=jax.devices()[:1])
    )
    return compile_seconds(lambda: step.lower(*arguments))


def compile_seconds(lower: Callable[[], jax.stages.Lowered]) -> tuple[float, float]:
    """Returns the seconds of tracing and of compiling."""
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    lowered.compile()
    return traced - began, time.perf_counter() - traced


TASKS = {
    "first step": do_first_step,
    "BERT-base, forward": compile_forward,
    "BERT-base → 12×384, step": compile_step,
}


if __name__ == "__main__":
    main()
