"""The full distillation step compared with PyTorch's: time, memory, FLOPs a second.

    pip install -e '.[torch]'
    python benchmarks/distillation_step.py [--shapes 16x128x48 16x128x12 4x512x48]

It runs what `minilm-jax distill` runs: teacher and student are BERTs of 6 layers × 384 with BERT's
vocabulary; MiniLMv2's relations (Q·Q, K·K, V·V) of the last layer, dropout 0.1 in the student,
clipping, AdamW. The peers (benchmarks/_torch_work.py) load the same weights, must give the same
loss to 1e-4 (dropout off) and take turns. Writes benchmarks/results/distillation_step_cpu.md.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import _jax_work
import _torch_work
from _peers import Work
from _report import OURS, measured_table, on_cpus_alone, write_section
from _setting import Setting
from cost_model import STUDENT_6X384, distillation_cost

from minilm_jax.encoder.config import EncoderConfig

SHAPES = ("16x128x48", "16x128x12", "4x512x48")

TITLE = """# The distillation step

`python benchmarks/distillation_step.py` wrote this. Teacher and student are 6 × 384 with 12 heads
and a vocabulary of 30,522; MiniLMv2's three relations of the last layer, dropout 0.1, AdamW, fp32.
Shapes are rows × tokens × relation heads. Times are medians (minimum–maximum) of runs that take
turns.

- *ours is faster*: the ratio of medians.
- *first*: the first step, compilation included.
- *memory*: the process's peak resident memory while it steps, libraries included. *ours of it* is
  ours as a share of the peer's.
- *GFLOP/s*: FLOPs of the model (benchmarks/cost_model.py), whatever else a peer computes.
- *of the machine*: their share of the rate of an fp32 product of 2048 × 2048 matrices by XLA in the
  same turns.
"""


def peers(setting: Setting) -> dict[str, Callable[[], Work]]:
    """Returns our peer and the three of PyTorch."""
    torch_step = partial(_torch_work.distillation_step, setting)
    return {
        OURS: partial(_jax_work.distillation_step, setting),
        "PyTorch, as public code": partial(torch_step, style="eager", compiled=False),
        "PyTorch, vectorised": partial(torch_step, style="vectorised", compiled=False),
        "PyTorch, vectorised, torch.compile": partial(
            torch_step, style="vectorised", compiled=True
        ),
    }


def write_pair(folder: Path, teacher: EncoderConfig, student: EncoderConfig) -> tuple[Path, Path]:
    """Returns the folders of a random teacher and student."""
    return (
        _jax_work.write_encoder(folder / "teacher", teacher, seed=0),
        _jax_work.write_encoder(folder / "student", student, seed=1),
    )


def main() -> None:
    """Measures the shapes and writes their tables."""
    on_cpus_alone()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--seconds", type=float, default=60, help="of timing, for each shape")
    options = parser.parse_args()
    # Larger weights than at the start of training, so that the loss compared is not near 0.
    shape = dataclasses.replace(STUDENT_6X384, initializer_range=0.1)
    with tempfile.TemporaryDirectory() as folder:
        teacher, student = write_pair(Path(folder), shape, shape)
        for name in options.shapes:
            batch, length, heads = map(int, name.split("x"))
            setting = Setting(
                teacher=teacher,
                student=student,
                teacher_layer=shape.num_hidden_layers,
                batch=batch,
                length=length,
                heads=heads,
            )
            cost = distillation_cost(shape, shape, batch=batch, length=length)
            lines = measured_table(peers(setting), flops=cost.flops, budget=options.seconds)
            write_section("distillation_step_cpu", name, lines, title=TITLE)


if __name__ == "__main__":
    main()
