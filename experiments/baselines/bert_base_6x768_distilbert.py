"""6×768 from BERT-base: DistilBERT (soft labels, MLM, cosine).

command   minilm-jax distill experiments/baselines/bert_base_6x768_distilbert.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 2 (SQuAD2 F1 / MNLI-m / SST-2 / QNLI / CoLA / RTE / MRPC / QQP, average):
          70.7 / 79.0 / 90.7 / 85.3 / 43.6 / 59.9 / 87.5 / 84.9, 75.2
unsure    MiniLM's authors used the released DistilBERT. The schedule here is MiniLM's.
"""

import dataclasses

from minilm_jax.distill.vocabulary import distilbert
from minilm_jax.jobs.recipes import TEACHERS, at_toy_size, minilm_v1

config = minilm_v1(
    "baselines/bert_base_6x768_distilbert",
    teacher=TEACHERS["bert-base"],
    layers=6,
    hidden=768,
    batch_size=1024,
    learning_rate=5e-4,
    objective=distilbert(),
)
# DistilBERT starts from every second layer of its teacher.
config = dataclasses.replace(config, student=dataclasses.replace(config.student, init="teacher"))
smoke = at_toy_size(config)
