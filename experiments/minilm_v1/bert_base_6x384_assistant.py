"""MiniLM, 6×384 from BERT-base through a 12×384 assistant.

command   minilm-jax distill experiments/minilm_v1/bert_base_6x384_assistant.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 3 (SQuAD2 F1 / MNLI-m / SST-2, average): 72.7 / 82.4 / 91.2, 82.1
unsure    The paper states 400,000 steps for the 6×768 student only. It does not give epsilon,
          clipping or initialisation (here 1e-6, 1.0 and random).
"""

from minilm_jax.jobs.recipes import (
    TEACHERS,
    at_toy_size,
    minilm_v1,
    with_assistant,
)

NAME = "minilm_v1/bert_base_6x384_assistant"


def stage(layers: int):
    """Returns the run of one student; both are trained alike."""
    return minilm_v1(
        NAME,
        teacher=TEACHERS["bert-base"],
        layers=layers,
        hidden=384,
        batch_size=256,
        learning_rate=3e-4,
    )


config = with_assistant(NAME, teacher=TEACHERS["bert-base"], assistant=stage(12), student=stage(6))
smoke = at_toy_size(config)
