"""Fine-tune a MiniLM on SQuAD 2.0 and score its dev set.

command   minilm-jax finetune experiments/finetune/squad2.py --data.folder data/squad
          experiments/finetune/squad2.py:readme is the command of Microsoft's README
data      train-v2.0.json and dev-v2.0.json
hardware  one accelerator (the README used 4 GPUs); not run at full size yet
expected  MiniLM-L12xH384: F1 81.7. The source does not say whether at threshold 0 or at the best
          one, so both are reported
source    paper (arXiv 2002.10957, appendix B): 384 tokens, window 128, batch 48, lr 4e-5, 3 epochs
          for the 12-layer model; batch 32, lr 6e-5 for all others. The README of
          microsoft/unilm/minilm says 4 epochs. Warm-up is not stated; Hugging Face's run_squad has
          no warm-up and no weight decay, and clips at 1.
"""

import dataclasses
from pathlib import Path

from minilm_jax.encoder.config import Compute
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.answers import AnswerConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="squad2",
    model="microsoft/MiniLM-L12-H384-uncased",
    data=TaskData(folder=Path("data/squad")),
    output=Path("runs/squad2"),
    lengths=LengthConfig(max_length=384, max_query_length=64, doc_stride=128),
    answers=AnswerConfig(n_best=20, max_answer_length=30),
    batch=RowConfig(batch_size=48),
    compute=Compute(dtype="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=4e-5, warmup_steps=0, eps=1e-8, weight_decay=0.0),
    schedule=ScheduleConfig(epochs=3),
)
readme = dataclasses.replace(config, schedule=ScheduleConfig(epochs=4))
others = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=32),
    optimizer=dataclasses.replace(config.optimizer, learning_rate=6e-5),
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
