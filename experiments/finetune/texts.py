"""Fine-tune a student on your own texts and labels: classes, or numbers (texts.py:scores).

command   minilm-jax finetune experiments/finetune/texts.py --model runs/quickstart/student
          --data.train train.tsv --data.dev dev.tsv --output runs/my_texts
          minilm-jax evaluate --task texts --models runs/my_texts --data.test test.tsv
          --splits test --output scores
data      .tsv or .csv with a header line, or .jsonl: text, label, optionally text_pair, id,
          language (docs/tasks.md); the classes are the labels of the training set
hardware  two CPU cores will do for a few thousand short texts and a student of six layers
expected  depends on your data; the run selects its best checkpoint on the dev set
source    learning rate: MiniLM (arXiv 2002.10957), appendix B; 10 % warm-up and weight decay 0.01
          are our choice. A small training set needs more epochs; for a sweep over seeds, see
          experiments/finetune/glue.py:small.
"""

import dataclasses
from pathlib import Path

from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="texts",
    model="runs/quickstart/student",
    data=TaskData(train=Path("train.tsv"), dev=Path("dev.tsv")),
    output=Path("runs/my_texts"),
    lengths=LengthConfig(max_length=128),
    batch=RowConfig(batch_size=32),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=0, eps=1e-8, weight_decay=0.01),
    schedule=ScheduleConfig(epochs=4, warmup_ratio=0.1),
    train=EngineConfig(log_every=10),
)
scores = dataclasses.replace(config, task="scores", output=Path("runs/my_scores"))
smoke = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=8),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2),
    train=EngineConfig(log_every=1),
    limit=32,
)
