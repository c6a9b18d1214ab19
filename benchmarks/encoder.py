"""The encoder alone compared with PyTorch's: a forward pass, and a training step.

    pip install -e '.[torch]'
    python benchmarks/encoder.py [--parts forward training]

BERT 6 layers × 384 at 32 × 128 in fp32, against transformers' BertModel with fused attention
(sdpa), with and without torch.compile. Weights and outputs are the same. The training step is
forward, backward, clipping and AdamW with dropout 0.1. Writes benchmarks/results/encoder_cpu.md.
"""

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import _jax_work
import _torch_work
from _report import OURS, measured_table, on_cpus_alone, write_section
from _setting import Setting
from cost_model import STUDENT_6X384, block_flops

BATCH, LENGTH = 32, 128

TITLE = """# The encoder

`python benchmarks/encoder.py` wrote this: BERT 6 × 384, 12 heads, 32 rows of 128 tokens, fp32.
*training* is forward, backward, clipping and AdamW, with dropout 0.1; the loss is the mean of the
outputs' fourth powers. distillation_step_cpu.md explains the columns.
"""


def main() -> None:
    """Measures both parts and writes their tables."""
    on_cpus_alone()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["forward", "training"])
    parser.add_argument("--seconds", type=float, default=45, help="of timing, for each part")
    options = parser.parse_args()
    shape = dataclasses.replace(STUDENT_6X384, initializer_range=0.1)
    forward = shape.num_hidden_layers * block_flops(shape, batch=BATCH, length=LENGTH)
    parts = {
        "forward": (_jax_work.encoder_forward, _torch_work.encoder_forward, forward),
        "training": (_jax_work.encoder_step, _torch_work.encoder_step, 3 * forward),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = _jax_work.write_encoder(Path(folder) / "model", shape, seed=0)
        setting = Setting(student=model, batch=BATCH, length=LENGTH)
        for part in options.parts:
            ours, torch_peer, flops = parts[part]
            peers = {
                OURS: partial(ours, setting),
                "PyTorch, sdpa": partial(torch_peer, setting, compiled=False),
                "PyTorch, sdpa, torch.compile": partial(torch_peer, setting, compiled=True),
            }
            lines = measured_table(peers, flops=flops, budget=options.seconds)
            write_section("encoder_cpu", part, lines, title=TITLE)


if __name__ == "__main__":
    main()
