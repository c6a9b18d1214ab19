"""Multilingual MiniLM, 12×384 from XLM-R base: the released Multilingual-MiniLM-L12-H384.

command   minilm-jax distill experiments/minilm_v1/xlmr_base_12x384.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/cc100, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     XNLI zero-shot, mean of 15 languages 71.1 (XLM-R base 74.5); MLQA F1 / EM 63.2 / 44.7
          (MiniLM Tables 11 and 13)
unsure    The paper names XLM-R's corpus, which implies CC-100. It does not state the sampling
          exponent (here 0.3, as in XLM-R). The teacher was the v0 release of XLM-R base.
"""

from minilm_jax.jobs.recipes import (
    CORPORA,
    TEACHERS,
    at_toy_size,
    minilm_v1,
)

config = minilm_v1(
    "minilm_v1/xlmr_base_12x384",
    teacher=TEACHERS["xlm-r-base"],
    layers=12,
    hidden=384,
    batch_size=256,
    learning_rate=3e-4,
    steps=1_000_000,
    corpus=CORPORA["multilingual"],
)
smoke = at_toy_size(config)
