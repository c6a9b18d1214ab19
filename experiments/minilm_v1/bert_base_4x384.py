"""MiniLM, 4×384 from BERT-base, without an assistant.

command   minilm-jax distill experiments/minilm_v1/bert_base_4x384.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 3 (SQuAD2 F1 / MNLI-m / SST-2, average): 69.4 / 80.3 / 90.2, 80.0
unsure    The paper states 400,000 steps for the 6×768 student only. It does not give epsilon,
          clipping or initialisation (here 1e-6, 1.0 and random).
"""

from minilm_jax.jobs.recipes import TEACHERS, at_toy_size, minilm_v1

config = minilm_v1(
    "minilm_v1/bert_base_4x384",
    teacher=TEACHERS["bert-base"],
    layers=4,
    hidden=384,
    batch_size=256,
    learning_rate=3e-4,
)
smoke = at_toy_size(config)
