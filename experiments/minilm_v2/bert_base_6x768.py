"""MiniLMv2, 6×768 from BERT-base, layer 12, 48 relation heads.

command   minilm-jax distill experiments/minilm_v2/bert_base_6x768.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     SQuAD2 F1 76.3, MNLI-m 84.2 (the authors' table of released models)
unsure    The batch of 256 and the random start come from re-implementations, not from the paper.
"""

from minilm_jax.jobs.recipes import TEACHERS, at_toy_size, minilm_v2

config = minilm_v2(
    "minilm_v2/bert_base_6x768",
    teacher=TEACHERS["bert-base"],
    teacher_layer=12,
    relation_heads=48,
    layers=6,
    hidden=768,
)
smoke = at_toy_size(config)
