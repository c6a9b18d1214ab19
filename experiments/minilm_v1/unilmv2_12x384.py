"""MiniLM, 12×384 from the authors' own base model: the released MiniLM-L12-H384-uncased.

command   minilm-jax distill experiments/minilm_v1/unilmv2_12x384.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 8 (SQuAD2 F1 / MNLI-m / SST-2 / QNLI / CoLA / RTE / MRPC / QQP, average):
          81.7 / 85.7 / 93.0 / 91.5 / 58.5 / 73.3 / 89.5 / 91.3, 83.1
unsure    The teacher, a UniLMv2-style model of BERT-base's size, was never released. BERT-base
          takes its place, so do not expect the paper's figures. The paper's corpus is RoBERTa's
          160 GB.
"""

from minilm_jax.jobs.recipes import TEACHERS, at_toy_size, minilm_v1

config = minilm_v1(
    "minilm_v1/unilmv2_12x384",
    teacher=TEACHERS["unilmv2-base"],
    layers=12,
    hidden=384,
    batch_size=2048,
    learning_rate=6e-4,
    b2=0.98,
)
smoke = at_toy_size(config)
