"""Fine-tune a student to answer your own questions from their contexts.

command   minilm-jax finetune experiments/finetune/questions.py --model runs/quickstart/student
          --data.train train.jsonl --data.dev dev.jsonl --output runs/my_questions
          minilm-jax evaluate --task questions --models runs/my_questions --data.test test.jsonl
          --splits test --output scores
data      .jsonl or SQuAD's .json: question, context, answers (empty where the context does not
          answer it), optionally id, language, question_language (docs/tasks.md)
hardware  one accelerator; two CPU cores will do for a few hundred questions
expected  depends on your data; the run selects its best checkpoint on the dev set
source    MiniLM's recipe for SQuAD 2.0 (arXiv 2002.10957, appendix B): 384 tokens, window 128,
          batch 32, lr 6e-5, here with 10 % warm-up. If you have few questions, start from a model
          that has seen SQuAD (the best/ of experiments/finetune/squad2.py).
"""

import dataclasses
from pathlib import Path

from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.answers import AnswerConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

config = FinetuneConfig(
    task="questions",
    model="runs/quickstart/student",
    data=TaskData(train=Path("train.jsonl"), dev=Path("dev.jsonl")),
    output=Path("runs/my_questions"),
    lengths=LengthConfig(max_length=384, max_query_length=64, doc_stride=128),
    answers=AnswerConfig(n_best=20, max_answer_length=30),
    batch=RowConfig(batch_size=32),
    optimizer=OptimizerConfig(learning_rate=6e-5, warmup_steps=0, eps=1e-8, weight_decay=0.0),
    schedule=ScheduleConfig(epochs=3, warmup_ratio=0.1),
    train=EngineConfig(log_every=10),
)
smoke = dataclasses.replace(
    config,
    batch=RowConfig(batch_size=8),
    lengths=LengthConfig(max_length=96, max_query_length=32, doc_stride=32),
    schedule=ScheduleConfig(max_steps=4, evaluate_every=2),
    train=EngineConfig(log_every=1),
    limit=32,
)
