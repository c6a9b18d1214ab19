"""Multilingual MiniLM, 6×384 from XLM-R base through the 12×384 student.

command   minilm-jax distill experiments/minilm_v1/xlmr_base_6x384_assistant.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/cc100, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     XNLI zero-shot, mean of 15 languages 68.0 (MiniLM Table 11); MLQA F1 / EM 53.7 / 36.6
          (Table 13)
unsure    The paper names XLM-R's corpus, which implies CC-100. It does not state the sampling
          exponent (here 0.3, as in XLM-R). The teacher was the v0 release of XLM-R base.
"""

from minilm_jax.jobs.recipes import (
    CORPORA,
    TEACHERS,
    at_toy_size,
    minilm_v1,
    with_assistant,
)

NAME = "minilm_v1/xlmr_base_6x384_assistant"
TEACHER = TEACHERS["xlm-r-base"]
CORPUS = CORPORA["multilingual"]

config = with_assistant(
    NAME,
    teacher=TEACHER,
    assistant=minilm_v1(
        NAME,
        teacher=TEACHER,
        layers=12,
        hidden=384,
        batch_size=256,
        learning_rate=3e-4,
        steps=1_000_000,
        corpus=CORPUS,
    ),
    student=minilm_v1(
        NAME,
        teacher=TEACHER,
        layers=6,
        hidden=384,
        batch_size=512,
        learning_rate=6e-4,
        corpus=CORPUS,
    ),
)
smoke = at_toy_size(config)
