"""Fine-tune the multilingual MiniLM on English NLI and score XNLI's test sets in 15 languages.

command   minilm-jax finetune experiments/finetune/xnli.py --data.folder data
          experiments/finetune/xnli.py:sweep tries the paper's learning rates
          experiments/finetune/xnli.py:translate_train trains on all 15 translations
data      XNLI-1.0/xnli.{dev,test}.tsv and XNLI-MT-1.0/multinli/multinli.train.{en,…}.tsv
hardware  one accelerator; not run at full size yet
expected  mMiniLM-L12xH384: 71.1 on average, en 81.5, sw 63.3, ur 64.2
select    the dev sets of all 15 languages together, as the README's table says. (Microsoft's
          run_xnli.py has no dev evaluation and scores one language's test set.)
source    README of microsoft/unilm/minilm: length 128, batch 128, lr 5e-5, 5 epochs, weight decay
          0.001, 500 steps of warm-up, evaluation every 1500 steps; paper, appendix C: lr {3, 4, 5,
          6}e-5
"""

import dataclasses
from pathlib import Path

from minilm_jax.encoder.config import Compute
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig, SweepConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TASKS, TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="xnli",
    model="microsoft/Multilingual-MiniLM-L12-H384",
    data=TaskData(folder=Path("data")),
    output=Path("runs/xnli"),
    train_languages=("en",),
    lengths=LengthConfig(max_length=128),
    batch=RowConfig(batch_size=128),
    compute=Compute(dtype="bfloat16"),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=500, eps=1e-8, weight_decay=0.001),
    schedule=ScheduleConfig(epochs=5, evaluate_every=1500),
)
sweep = dataclasses.replace(config, sweep=SweepConfig(learning_rates=(3e-5, 4e-5, 5e-5, 6e-5)))
translate_train = dataclasses.replace(
    config, output=Path("runs/xnli_translate_train"), train_languages=TASKS["xnli"].languages
)
smoke = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=8),
    compute=Compute(),
    optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2),
    train=EngineConfig(log_every=1),
    limit=32,
)
