"""MiniLMv2, 6×768 from RoBERTa-large, layer 19, 64 relation heads.

command   minilm-jax distill experiments/minilm_v2/roberta_large_6x768.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/roberta-english, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     SQuAD2 F1 81.6, MNLI-m 87.0 (the authors' table of released models)
unsure    The batch of 256 and the random start come from re-implementations, not from the paper.
"""

from minilm_jax.jobs.recipes import (
    CORPORA,
    TEACHERS,
    at_toy_size,
    minilm_v2,
)

config = minilm_v2(
    "minilm_v2/roberta_large_6x768",
    teacher=TEACHERS["roberta-large"],
    teacher_layer=19,
    relation_heads=64,
    layers=6,
    hidden=768,
    corpus=CORPORA["roberta"],
)
smoke = at_toy_size(config)
