"""Fine-tune a MiniLM on a GLUE task and score its dev set, as the papers' English table does.

command   minilm-jax finetune experiments/finetune/glue.py --task sst2 --data.folder data/glue
          --output runs/glue/sst2
          minilm-jax finetune experiments/finetune/glue.py:small --task rte --data.folder data/glue
          --output runs/glue/rte       (the sweep for CoLA, RTE and MRPC: mean of 4 seeds)
data      gluebenchmark.com's folders CoLA, SST-2, …; any of the nine tasks
hardware  one accelerator; not run at full size yet
expected  MiniLM-L12xH384, dev: MNLI-m 85.7, SST-2 93.0, QNLI 91.5, CoLA 58.5, RTE 73.3, MRPC 89.5,
          QQP 91.3, means of 4 runs
source    recipe: MiniLM (arXiv 2002.10957), appendix B: length 128, batch {32, 48}. 12-layer
          models: lr 1.5e-5 and up to 10 epochs for CoLA, RTE and MRPC, else lr {2, 3, 4, 5}e-5 ×
          epochs {3, 4, 5}. Figures: its table 8. It does not state warm-up and weight decay;
          10 % and 0.01 are our choice.
"""

import dataclasses
from pathlib import Path

from minilm_jax.encoder.config import Compute
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig, SweepConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="mnli",
    model="microsoft/MiniLM-L12-H384-uncased",
    data=TaskData(folder=Path("data/glue")),
    output=Path("runs/glue"),
    lengths=LengthConfig(max_length=128),
    batch=RowConfig(batch_size=32),
    compute=Compute(dtype="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=0, eps=1e-8, weight_decay=0.01),
    schedule=ScheduleConfig(epochs=4, warmup_ratio=0.1),
)
sweep = dataclasses.replace(
    config,
    sweep=SweepConfig(
        learning_rates=(2e-5, 3e-5, 4e-5, 5e-5), epochs=(3, 4, 5), seeds=(1, 2, 3, 4)
    ),
)
small = dataclasses.replace(
    config,
    task="rte",
    sweep=SweepConfig(learning_rates=(1.5e-5,), epochs=(5, 10), seeds=(1, 2, 3, 4)),
)
smoke = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=8),
    compute=Compute(),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2),
    train=EngineConfig(log_every=1),
    limit=32,
)
