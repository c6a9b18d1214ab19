"""The papers' settings as functions, and any run at toy size.

The experiment files call these; what differs between the students of a paper stands there.
Sources: MiniLM, arXiv 2002.10957, section 4.1; MiniLMv2, arXiv 2012.15828, and its authors' answers
where the paper is silent (each experiment says what is unconfirmed).
"""

import dataclasses
import math
from pathlib import Path
from typing import TypeVar

from minilm_jax.data.batches import BatchConfig
from minilm_jax.data.sources import TextSource
from minilm_jax.distill.objective import Objective
from minilm_jax.distill.objectives import RelationObjective, minilmv2
from minilm_jax.distill.student import StudentConfig
from minilm_jax.distill.tinybert import TinyBertObjective
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.jobs.distill_config import (
    ASSISTANT,
    ChainConfig,
    DistillConfig,
    TeacherConfig,
    TextConfig,
)
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.optimizer import OptimizerConfig

BERT_BASE = EncoderConfig()
BERT_LARGE = EncoderConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
ROBERTA_LARGE = dataclasses.replace(
    BERT_LARGE,
    model_type="roberta",
    vocab_size=50265,
    max_position_embeddings=514,
    type_vocab_size=1,
    position_offset=2,
    pad_token_id=1,
    layer_norm_eps=1e-5,
)
XLMR_LARGE = dataclasses.replace(ROBERTA_LARGE, model_type="xlm-roberta", vocab_size=250002)
XLMR_BASE = dataclasses.replace(
    XLMR_LARGE,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
)

TEACHERS = {
    "bert-base": TeacherConfig(source="google-bert/bert-base-uncased", shape=BERT_BASE),
    "bert-large": TeacherConfig(source="google-bert/bert-large-uncased", shape=BERT_LARGE),
    "roberta-large": TeacherConfig(source="FacebookAI/roberta-large", shape=ROBERTA_LARGE),
    "xlm-r-base": TeacherConfig(source="FacebookAI/xlm-roberta-base", shape=XLMR_BASE),
    "xlm-r-large": TeacherConfig(source="FacebookAI/xlm-roberta-large", shape=XLMR_LARGE),
    # Never released; BERT-base, of the same shape and vocabulary, stands in its place.
    "unilmv2-base": TeacherConfig(source="google-bert/bert-base-uncased", shape=BERT_BASE),
}
CORPORA = {
    "english": Path("corpora/wikipedia-books"),
    "roberta": Path("corpora/roberta-english"),
    "multilingual": Path("corpora/cc100"),
}
"""Where `minilm-jax prepare` is expected to have put them; one for each vocabulary."""


def minilm_v1(
    name: str,
    *,
    teacher: TeacherConfig,
    layers: int,
    hidden: int,
    batch_size: int,
    learning_rate: float,
    steps: int = 400_000,
    b2: float = 0.999,
    corpus: Path = CORPORA["english"],
    objective: Objective | None = None,
) -> DistillConfig:
    """Returns a run as MiniLM trains (section 4.1): warm-up 4,000, linear decay, length 512.

    Adam's epsilon, clipping and initialisation are not stated there; ours are the defaults of
    OptimizerConfig and StudentConfig.
    """
    return DistillConfig(
        output=Path("runs") / name,
        teacher=teacher,
        student=StudentConfig(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=12),
        text=TextConfig(corpora=(corpus,)),
        objective=objective or RelationObjective(),
        batch=BatchConfig(
            batch_size=batch_size,
            sequence_length=512,
            language_exponent=0.3 if corpus == CORPORA["multilingual"] else None,
        ),
        compute=Compute(dtype="bfloat16"),
        optimizer=OptimizerConfig(learning_rate=learning_rate, b2=b2),
        train=TrainConfig(steps=steps),
    )


def with_assistant(
    name: str, *, teacher: TeacherConfig, assistant: DistillConfig, student: DistillConfig
) -> ChainConfig:
    """Returns the chain teacher -> assistant -> student, in two folders under runs/NAME."""
    output = Path("runs") / name
    return ChainConfig(
        assistant=dataclasses.replace(assistant, teacher=teacher, output=output / "assistant"),
        student=dataclasses.replace(
            student, teacher=TeacherConfig(source=ASSISTANT), output=output / "student"
        ),
    )


def minilm_v2(
    name: str,
    *,
    teacher: TeacherConfig,
    teacher_layer: int,
    relation_heads: int,
    layers: int,
    hidden: int,
    corpus: Path = CORPORA["english"],
) -> DistillConfig:
    """Returns a run as MiniLMv2 trains: peak 6e-4, 400,000 steps, warm-up 4,000, length 512.

    The batch of 256 is reported by re-implementations, not by the paper's text.
    """
    config = minilm_v1(
        name,
        teacher=teacher,
        layers=layers,
        hidden=hidden,
        batch_size=256,
        learning_rate=6e-4,
        corpus=corpus,
    )
    objective = minilmv2(heads=relation_heads, teacher_layer=teacher_layer, student_layer=layers)
    return dataclasses.replace(config, objective=objective)


Config = TypeVar("Config", DistillConfig, ChainConfig)


def at_toy_size(config: Config) -> Config:
    """Returns the same run at toy size: random weights, seconds instead of weeks, no network.

    Family, attention heads, relation heads, objective and the order of operations are those of the
    run; a quarter of the layers, narrow ones, on a small vocabulary, for three steps. A
    student that starts from its teacher takes layers evenly spread.
    """
    if isinstance(config, ChainConfig):
        return ChainConfig(
            assistant=at_toy_size(config.assistant), student=at_toy_size(config.student)
        )
    teacher = config.teacher
    if teacher.source != ASSISTANT and teacher.shape is not None:
        shape = _toy_shape(teacher.shape, config)
        teacher = TeacherConfig(source="random", init="random", shape=shape)
    objective = config.objective
    if isinstance(objective, RelationObjective | TinyBertObjective):
        pairs = {(_quarter(theirs), _quarter(ours)) for theirs, ours in objective.layers}
        objective = dataclasses.replace(objective, layers=tuple(sorted(pairs)))
    return dataclasses.replace(
        config,
        output=_smoke_folder(config.output),
        teacher=teacher,
        student=dataclasses.replace(
            config.student,
            num_hidden_layers=_quarter(config.student.num_hidden_layers),
            hidden_size=_toy_width(config.student.num_attention_heads, config),
            intermediate_size=None,
            teacher_layers=(),
        ),
        objective=objective,
        text=TextConfig(source=TextSource(format="machine-docs"), heldout=0.01, evaluate_batches=1),
        batch=BatchConfig(batch_size=8, sequence_length=32),
        compute=dataclasses.replace(config.compute, dtype="float32"),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1),
        train=dataclasses.replace(config.train, steps=3, log_every=1, save_every=2),
    )


def _smoke_folder(output: Path) -> Path:
    """Returns the folder of a run at toy size, apart from that of the run itself."""
    runs = Path("runs")
    inside = output.relative_to(runs if output.is_relative_to(runs) else output.anchor)
    return runs / "smoke" / inside


def _toy_shape(shape: EncoderConfig, config: DistillConfig) -> EncoderConfig:
    width = _toy_width(shape.num_attention_heads, config)
    return dataclasses.replace(
        shape,
        num_hidden_layers=_quarter(shape.num_hidden_layers),
        hidden_size=width,
        intermediate_size=4 * width,
        vocab_size=2000,
        max_position_embeddings=64 + shape.position_offset,
        initializer_range=0.05,
    )


def _toy_width(attention_heads: int, config: DistillConfig) -> int:
    """Returns the least width of at least 48 that attention and relation heads divide."""
    relation_heads = getattr(config.objective, "heads", None) or attention_heads
    both = math.lcm(attention_heads, relation_heads)
    return both * -(-48 // both)


def _quarter(layers: int) -> int:
    return -(-layers // 4)
