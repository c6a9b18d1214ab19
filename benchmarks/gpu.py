"""The distillation step and the relation loss on one NVIDIA GPU in bfloat16, against PyTorch's.

    pip install -e '.[cuda]' torch
    python benchmarks/gpu.py

BERT-base to 6 × 384 and BERT-large (layer 21) to 12 × 384, at 128 and at 512 tokens, against the
vectorised PyTorch step with and without torch.compile (benchmarks/_torch_work.py); then
benchmarks/relation_loss.py in bfloat16. Writes benchmarks/results/gpu.md, with the goals next to
the figures. Without a GPU its rows say "not measured".
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import _jax_work
import _torch_work
import jax
from _report import OURS, measured_table, write_section
from _setting import Setting
from cost_model import BERT_BASE, BERT_LARGE, PEAKS, STUDENT_6X384, STUDENT_12X384
from cost_model import distillation_cost as cost_of

from minilm_jax.encoder.config import EncoderConfig

# (teacher, its layer, student, relation heads); then (rows, tokens).
PAIRS: dict[str, tuple[EncoderConfig, int, EncoderConfig, int]] = {
    "BERT-base → 6×384": (BERT_BASE, 12, STUDENT_6X384, 48),
    "BERT-large → 12×384": (BERT_LARGE, 21, STUDENT_12X384, 64),
}
BATCHES = [(128, 128), (32, 512)]
SIZE = 8192
"""Of the matrices whose product is the measure of the device."""
TOLERANCE = 5e-3
"""Of the losses in bfloat16, whose rounding is 4e-3 a number."""
GOALS = "Goals: at least 2× the compiled PyTorch step, at least 50% MFU."

TITLE = """# On one GPU

`python benchmarks/gpu.py` wrote this: the full distillation step of MiniLMv2, with bf16 products,
fp32 parameters, dropout 0.1 and AdamW. Headings give teacher → student and rows × tokens × relation
heads. Times are medians (minimum–maximum) of runs that take turns. *memory* is the device's peak.
*of the machine* is the MFU: model FLOPs (benchmarks/cost_model.py) per second over the published
peak of dense bf16 products, or over a measured product if the device's peak is not known.

The relation loss alone goes to relation_loss_gpu_bfloat16.md (goal: Pallas at least 10× as fast as
the plain version at 2,048 tokens).
"""


def main() -> None:
    """Measures every pair and batch, or reports that nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of timing, for each shape")
    options = parser.parse_args()
    # Several processes share the device: none may take most of its memory in advance.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    there = jax.devices()[0].platform == "gpu"
    with tempfile.TemporaryDirectory() as folder:
        for name, (teacher, layer, student, heads) in PAIRS.items():
            for batch, length in BATCHES:
                section = f"{name}, {batch}x{length}x{heads}"
                if not there:
                    lines = [f"Not measured: no GPU. {GOALS}"]
                else:
                    place = Path(folder) / name
                    setting = Setting(
                        teacher=write_once(place / "teacher", teacher, seed=0),
                        student=write_once(place / "student", student, seed=1),
                        teacher_layer=layer,
                        batch=batch,
                        length=length,
                        heads=heads,
                        dtype="bfloat16",
                        device="cuda",
                    )
                    cost = cost_of(
                        teacher, student, batch=batch, length=length, teacher_layer=layer
                    )
                    table = measured(setting, flops=cost.flops, budget=options.seconds)
                    lines = [*table, "", GOALS]
                write_section("gpu", section, lines, title=TITLE)
    if there:
        script = Path(__file__).with_name("relation_loss.py")
        subprocess.run([sys.executable, script, "--dtype", "bfloat16"], check=True)


def measured(setting: Setting, *, flops: int, budget: float) -> list[str]:
    """Returns the table of one shape."""
    torch_step = partial(_torch_work.distillation_step, setting, style="vectorised")
    peers = {
        OURS: partial(_jax_work.distillation_step, setting),
        f"{OURS}, attention plain": partial(
            _jax_work.distillation_step, setting, attention="plain"
        ),
        "PyTorch, vectorised": partial(torch_step, compiled=False),
        "PyTorch, vectorised, torch.compile": partial(torch_step, compiled=True),
    }
    return measured_table(
        peers,
        flops=flops,
        budget=budget,
        product=(SIZE, "bfloat16"),
        peak=PEAKS.get(jax.devices()[0].device_kind),
        tolerance=TOLERANCE,
    )


def write_once(folder: Path, config: EncoderConfig, *, seed: int) -> Path:
    """Returns a folder with random weights, written unless it exists."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _jax_work.write_encoder(folder, config, seed=seed)
    return folder


if __name__ == "__main__":
    main()
