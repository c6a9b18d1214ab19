"""Fine-tune a MiniLM on SQuAD 1.1 and score its dev set.

command   minilm-jax finetune experiments/finetune/squad1.py --data.folder data/squad
data      train-v1.1.json and dev-v1.1.json
hardware  one accelerator; not run at full size yet
expected  not in MiniLM's tables; the recipe is that of SQuAD 2.0
source    see squad2.py
"""

import dataclasses
from pathlib import Path

from minilm_jax.encoder.config import Compute
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="squad1",
    model="microsoft/MiniLM-L12-H384-uncased",
    data=TaskData(folder=Path("data/squad")),
    output=Path("runs/squad1"),
    lengths=LengthConfig(max_length=384, max_query_length=64, doc_stride=128),
    batch=RowConfig(batch_size=48),
    compute=Compute(dtype="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=4e-5, warmup_steps=0, eps=1e-8, weight_decay=0.0),
    schedule=ScheduleConfig(epochs=3),
)
smoke = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=8),
    compute=Compute(),
    lengths=LengthConfig(max_length=96, max_query_length=32, doc_stride=32),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2),
    train=EngineConfig(log_every=1),
    limit=32,
)
