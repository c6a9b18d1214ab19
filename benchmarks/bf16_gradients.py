"""How far a step's gradients in bfloat16 are from those in fp32, for every objective.

    python benchmarks/bf16_gradients.py

Teacher, student (three of the teacher's layers) and text are the quickstart's. Dropout is off.
Losses that need an MLM head get a random one. Writes benchmarks/results/bf16_gradients.md.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _report import machine, write_section

from minilm_jax.cli import load_experiment
from minilm_jax.convert.model import Model
from minilm_jax.data.machine_docs import machine_documents
from minilm_jax.distill.objective import Batch, Objective
from minilm_jax.distill.objectives import RelationObjective, minilm, minilmv2, uniform_layers
from minilm_jax.distill.tinybert import TinyBertObjective
from minilm_jax.distill.vocabulary import distilbert, init_mlm, mlm, soft_labels
from minilm_jax.encoder.config import Compute
from minilm_jax.jobs.distill_config import DistillConfig
from minilm_jax.jobs.distill_step import initial_params, make_loss
from minilm_jax.jobs.teacher import load_teacher, open_tokenizer
from minilm_jax.jobs.text import make_masking

QUICKSTART = Path(__file__).parents[1] / "experiments/quickstart.py"
OBJECTIVES: dict[str, Objective] = {
    "MiniLM": minilm(),
    "MiniLM, layer to layer": RelationObjective(layers=uniform_layers(teacher=6, student=3)),
    "MiniLM, MSE of values": RelationObjective(relations=(("qk", 1.0),), value_mse=1.0),
    "MiniLMv2, 48 heads": minilmv2(heads=48, teacher_layer=6, student_layer=3),
    "TinyBERT": TinyBertObjective(),
    "masked LM": mlm(),
    "soft labels": soft_labels(),
    "DistilBERT": distilbert(),
}

TITLE = """# Gradients in bfloat16

`python benchmarks/bf16_gradients.py` wrote this. It compares the gradient of all parameters with
`compute.dtype` bfloat16 with that in fp32. *Cosine* is between the two; *difference* is the norm of
their difference over the norm in fp32. *Largest* is the largest difference of a single parameter
whose gradient is at least a thousandth of the whole. The teacher is all-MiniLM-L6-v2; the student
is 3 × 384, made of the teacher's layers. 8 documents of up to 128 tokens, dropout off. One rounding
to bfloat16 is 0.2 to 0.4%.
"""


def gradients(config: DistillConfig, teacher: Model, batch: Batch) -> Any:
    """Returns the gradient of the run's first step without dropout, fp32."""
    loss = make_loss(config, teacher.config)
    student = initial_params(config, teacher.config, teacher.params["encoder"])

    @jax.jit
    def gradient(student: Any, frozen: Any, batch: Batch) -> Any:
        return jax.grad(lambda student: loss(student, frozen, batch, None).value())(student)

    return jax.device_get(gradient(student, teacher.params, batch))


def compare(found: Any, exact: Any) -> tuple[float, float, float]:
    """Returns cosine, relative difference, and the largest one of a parameter that counts."""
    pairs = [
        (np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel())
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    ]
    a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    norm = np.linalg.norm
    single = [norm(x - y) / norm(y) for x, y in pairs if norm(y) > 1e-3 * norm(b)]
    return float(a @ b / (norm(a) * norm(b))), float(norm(a - b) / norm(b)), float(max(single))


def main() -> None:
    """Compares them and writes the table."""
    config = load_experiment(str(QUICKSTART))
    teacher = load_teacher(config)
    head = init_mlm(jax.random.key(1), teacher.config)
    teacher = dataclasses.replace(teacher, params={**teacher.params, "mlm": head})
    tokenizer = open_tokenizer(config, teacher)
    assert tokenizer is not None
    texts = [document.text for document in itertools.islice(machine_documents(), 3, 11)]
    plain = tokenizer.batch(texts, max_length=128) | {"rows": np.arange(8, dtype=np.int32)}
    lines = [
        f"{machine()}.",
        "",
        "| objective | cosine | difference | largest |",
        "|---|---:|---:|---:|",
    ]
    for name, objective in OBJECTIVES.items():
        chosen = dataclasses.replace(config, objective=objective)
        batch = jax.tree.map(jnp.asarray, make_masking(chosen, tokenizer)(plain, 0))
        low = dataclasses.replace(chosen, compute=Compute(dtype="bfloat16"))
        cosine, difference, largest = compare(
            gradients(low, teacher, batch), gradients(chosen, teacher, batch)
        )
        lines.append(f"| {name} | {cosine:.6f} | {difference:.2%} | {largest:.2%} |")
    write_section("bf16_gradients", "The first step", lines, title=TITLE)


if __name__ == "__main__":
    main()
