"""6×384 from BERT-base: MiniLM with a mean squared error of the values instead of their relation.

command   minilm-jax distill experiments/ablations/bert_base_6x384_value_mse.py
smoke     add :smoke to the file name; half a minute, random weights, no network
corpus    corpora/wikipedia-books, made once by minilm-jax prepare (docs/data.md)
hardware  a TPU v5e-16 or 8 GPUs; the paper used 8 V100s with mixed precision
cost      not measured; `minilm-jax plan` estimates it for your hardware
paper     MiniLM Table 6 (SQuAD2 F1 / MNLI-m / SST-2): 71.4 / 82.0 / 90.8
unsure    The paper states 400,000 steps for the 6×768 student only. It does not give epsilon,
          clipping or initialisation (here 1e-6, 1.0 and random).
"""

from minilm_jax.distill.objectives import RelationObjective
from minilm_jax.jobs.recipes import TEACHERS, at_toy_size, minilm_v1

config = minilm_v1(
    "ablations/bert_base_6x384_value_mse",
    teacher=TEACHERS["bert-base"],
    layers=6,
    hidden=384,
    batch_size=256,
    learning_rate=3e-4,
    objective=RelationObjective(relations=(("qk", 1.0),), value_mse=1.0),
)
smoke = at_toy_size(config)
