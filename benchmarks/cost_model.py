"""The theoretical cost of a distillation step: matrix products, optimizer bytes, tokens a day.

    python benchmarks/cost_model.py    # the tables of docs/performance.md

Only what the mathematics needs is counted: recomputing a block, or running a layer for nothing,
takes time but adds no model FLOPs. Model FLOPs a second over the machine's peak are the MFU (model
FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B).
"""

import dataclasses

from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.train.hardware import CHIPS

PEAKS = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
"""NVIDIA's published FLOPs a second of dense bf16 products, by JAX's name of the device."""
DAY = 86400

STUDENT_6X384 = EncoderConfig(num_hidden_layers=6, hidden_size=384, intermediate_size=1536)
STUDENT_12X384 = dataclasses.replace(STUDENT_6X384, num_hidden_layers=12)
BERT_BASE = EncoderConfig()
BERT_LARGE = EncoderConfig(
    num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCost:
    """Model FLOPs of one step by part, and the bytes its optimizer moves."""

    teacher: int
    """Forward, up to the projections of the layer compared."""
    student_forward: int
    student_backward: int
    """Twice the forward: gradients of inputs and of kernels."""
    relations: int
    """Logits of teacher and student, and the student's gradients."""
    optimizer_bytes: int
    """fp32 parameters, gradients and both moments read, all but the gradients written, the
    gradients read once more for the norm."""

    @property
    def flops(self) -> int:
        """All of it."""
        return self.teacher + self.student_forward + self.student_backward + self.relations

    @property
    def teacher_share(self) -> float:
        """The teacher's part of the FLOPs."""
        return self.teacher / self.flops


def distillation_cost(
    teacher: EncoderConfig,
    student: EncoderConfig,
    *,
    batch: int,
    length: int,
    relations: int = 3,
    teacher_layer: int | None = None,
) -> StepCost:
    """Returns the cost of one MiniLM (two relations) or MiniLMv2 (three) step.

    Args:
      teacher: its shape.
      student: its shape; its last layer is compared.
      batch: rows.
      length: tokens of a row, padding included.
      relations: pairs of projections compared, each once.
      teacher_layer: the teacher's layer compared, from 1; None is its last.
    """
    teacher_layer = teacher_layer or teacher.num_hidden_layers
    forward = projections_flops(student, student.num_hidden_layers, batch=batch, length=length)
    pairs = 2 * batch * length * length
    return StepCost(
        teacher=projections_flops(teacher, teacher_layer, batch=batch, length=length),
        student_forward=forward,
        student_backward=2 * forward,
        relations=relations * pairs * (teacher.hidden_size + 3 * student.hidden_size),
        optimizer_bytes=8 * 4 * parameter_count(student),
    )


def projections_flops(config: EncoderConfig, layer: int, *, batch: int, length: int) -> int:
    """Returns the FLOPs of a forward pass up to the queries, keys and values of `layer`."""
    below = (layer - 1) * block_flops(config, batch=batch, length=length)
    return below + batch * length * 2 * 3 * config.hidden_size**2


def block_flops(config: EncoderConfig, *, batch: int, length: int) -> int:
    """Returns the FLOPs of one block forward: kernels, attention logits, sums of values."""
    width = config.hidden_size
    kernels = 4 * width**2 + 2 * width * config.intermediate_size
    return batch * length * 2 * (kernels + 2 * length * width)


def parameter_count(config: EncoderConfig) -> int:
    """Returns the encoder's parameters: embeddings and blocks, with biases and norms."""
    width, inner = config.hidden_size, config.intermediate_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    kernels = 4 * width**2 + 2 * width * inner
    block = kernels + 4 * width + inner + width + 2 * 2 * width
    return (rows + config.n_langs + 2) * width + config.num_hidden_layers * block


def tokens_a_day(cost: StepCost, *, tokens: int, peak: float, mfu: float) -> float:
    """Returns the tokens a machine distils in a day at an assumed utilisation.

    Args:
      cost: of a step of `tokens` tokens.
      tokens: of that step.
      peak: FLOPs a second of the whole machine.
      mfu: the share of them that becomes model FLOPs.
    """
    return DAY * mfu * peak * tokens / cost.flops


PAIRS = {
    "6×384 → 6×384": (STUDENT_6X384, STUDENT_6X384, None),
    "BERT-base → 6×384": (BERT_BASE, STUDENT_6X384, None),
    "BERT-large, layer 21 → 12×384": (BERT_LARGE, STUDENT_12X384, 21),
}


def main() -> None:
    """Prints both tables."""
    machines = {"v5e-256": 256 * CHIPS["v5e"].flops, "8×H200": 8 * PEAKS["NVIDIA H200"]}
    print("| teacher → student | length | teacher | student | relations | MFLOPs a token |")
    print("|---|---|---|---|---|---|")
    estimates = []
    for name, (teacher, student, layer) in PAIRS.items():
        for length in (128, 512):
            cost = distillation_cost(teacher, student, batch=1, length=length, teacher_layer=layer)
            student_share = (cost.student_forward + cost.student_backward) / cost.flops
            print(
                f"| {name} | {length} | {cost.teacher_share:.0%} | {student_share:.0%} "
                f"| {cost.relations / cost.flops:.0%} | {cost.flops / length / 1e6:.0f} |"
            )
            rates = [
                f"{tokens_a_day(cost, tokens=length, peak=peak, mfu=mfu) / 1e9:,.0f}"
                for peak in machines.values()
                for mfu in (0.3, 0.5)
            ]
            estimates.append(f"| {name} | {length} | {' | '.join(rates)} |")
    columns = [f"{machine}, MFU {mfu:.0%}" for machine in machines for mfu in (0.3, 0.5)]
    print(f"\n| teacher → student | length | {' | '.join(columns)} |")
    print("|---|---|" + "---|" * len(columns))
    print("\n".join(estimates))


if __name__ == "__main__":
    main()
