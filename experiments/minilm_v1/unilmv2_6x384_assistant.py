"""MiniLM, 6×384 from the authors' own base model through the 12×384 student.

command   minilm-jax distill experiments/minilm_v1/unilmv2_6x384_assistant.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 8 (SQuAD2 F1 / MNLI-m / SST-2 / QNLI / CoLA / RTE / MRPC / QQP, average):
          75.6 / 83.3 / 91.5 / 90.5 / 47.5 / 68.8 / 88.9 / 90.6, 79.6
unsure    The teacher, a UniLMv2-style model of BERT-base's size, was never released. BERT-base
          takes its place, so do not expect the paper's figures. The paper says that the other
          settings are those of the 12×384 student; the betas .9/.98 follow from that.
"""

from minilm_jax.jobs.recipes import (
    TEACHERS,
    at_toy_size,
    minilm_v1,
    with_assistant,
)

NAME = "minilm_v1/unilmv2_6x384_assistant"
TEACHER = TEACHERS["unilmv2-base"]

config = with_assistant(
    NAME,
    teacher=TEACHER,
    assistant=minilm_v1(
        NAME,
        teacher=TEACHER,
        layers=12,
        hidden=384,
        batch_size=2048,
        learning_rate=6e-4,
        b2=0.98,
    ),
    student=minilm_v1(
        NAME,
        teacher=TEACHER,
        layers=6,
        hidden=384,
        batch_size=512,
        learning_rate=4e-4,
        b2=0.98,
    ),
)
smoke = at_toy_size(config)
