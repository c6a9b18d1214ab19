"""MiniLM, 6×768 from BERT-base.

command   minilm-jax distill experiments/minilm_v1/bert_base_6x768.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 2 (SQuAD2 F1 / MNLI-m / SST-2 / QNLI / CoLA / RTE / MRPC / QQP, average):
          76.4 / 84.0 / 92.0 / 91.0 / 49.2 / 71.5 / 88.4 / 91.0, 80.4 (BERT-base 81.5)
unsure    The paper does not give Adam's epsilon, clipping or initialisation (here 1e-6, 1.0 and
          random).
"""

from minilm_jax.jobs.recipes import TEACHERS, at_toy_size, minilm_v1

config = minilm_v1(
    "minilm_v1/bert_base_6x768",
    teacher=TEACHERS["bert-base"],
    layers=6,
    hidden=768,
    batch_size=1024,
    learning_rate=5e-4,
)
smoke = at_toy_size(config)
