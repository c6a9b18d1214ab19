"""MiniLMv2, 6×384 from XLM-R large, layer 19, 64 relation heads.

command   minilm-jax distill experiments/minilm_v2/xlmr_large_6x384.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/cc100, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     XNLI zero-shot 69.3, MLQA F1 59.0 (test sets; the authors' table of released models)
unsure    Steps and batch of the multilingual students are not published. Here they are those of
          the English ones, with XLM-R's sampling exponent of 0.3.
"""

from minilm_jax.jobs.recipes import (
    CORPORA,
    TEACHERS,
    at_toy_size,
    minilm_v2,
)

config = minilm_v2(
    "minilm_v2/xlmr_large_6x384",
    teacher=TEACHERS["xlm-r-large"],
    teacher_layer=19,
    relation_heads=64,
    layers=6,
    hidden=384,
    corpus=CORPORA["multilingual"],
)
smoke = at_toy_size(config)
