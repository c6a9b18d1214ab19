"""Fine-tune the multilingual MiniLM on SQuAD 1.1 and score MLQA in seven languages, zero-shot.

command   minilm-jax finetune experiments/finetune/mlqa.py --data.folder data/mlqa
          minilm-jax evaluate --task mlqa --models runs/mlqa --data.folder data/mlqa --splits test
          --pairs all --output runs/mlqa/gxlt                                 (G-XLT, 49 pairs)
data      train-v1.1.json of SQuAD, and the folder MLQA_V1
hardware  one accelerator; not run at full size yet
expected  mMiniLM-L12xH384: F1/EM 63.2/44.7 on average, en 79.4/66.5
select    English dev only, for early stopping too: zero-shot transfer may use no other language
source    paper (arXiv 2002.10957), appendix C: 512 tokens, window 128, batch 32, lr {3, 4, 5,
          6}e-5, 3 epochs. It does not state how often it evaluates or when it stops early; here
          every 1000 steps, and after three evaluations without improvement
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
    task="mlqa",
    model="microsoft/Multilingual-MiniLM-L12-H384",
    data=TaskData(folder=Path("data/mlqa")),
    output=Path("runs/mlqa"),
    lengths=LengthConfig(max_length=512, max_query_length=64, doc_stride=128),
    batch=RowConfig(batch_size=32),
    compute=Compute(dtype="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=4e-5, warmup_steps=0, eps=1e-8, weight_decay=0.0),
    schedule=ScheduleConfig(epochs=3, evaluate_every=1000, patience=3),
)
sweep = dataclasses.replace(config, sweep=SweepConfig(learning_rates=(3e-5, 4e-5, 5e-5, 6e-5)))
smoke = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=8),
    compute=Compute(),
    lengths=LengthConfig(max_length=96, max_query_length=32, doc_stride=32),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2),
    train=EngineConfig(log_every=1),
    limit=32,
)
