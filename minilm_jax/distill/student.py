"""The student: its shape, and where its parameters start."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from minilm_jax.distill.objectives import uniform_layers
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.errors import ConfigError
from minilm_jax.settings import Positive, Rate, Settings

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(Settings, name="student"):
    """Shape and start of the student. What is not named here it shares with its teacher."""

    num_hidden_layers: Positive = 6
    hidden_size: Positive = 384
    num_attention_heads: Positive = 12
    intermediate_size: Positive | None = None
    """None is four times the hidden size, as in both papers."""
    hidden_dropout_prob: Rate | None = None
    """Rate of dropout while it is trained, and in its config.json; None is the teacher's."""
    attention_probs_dropout_prob: Rate | None = None
    """The same for attention probabilities."""
    init: Literal["random", "teacher"] = "random"
    """random: the papers' choice. teacher: blocks copied from
    `teacher_layers`, and sliced (the first of each head's and each
    layer's units) where the student is narrower."""
    teacher_layers: tuple[int, ...] = ()
    """Layers (from 1) the student's blocks are copied from; empty spreads them evenly."""
    embeddings: Literal["random", "teacher"] = "random"
    """teacher takes the embedding tables over (sliced where narrower); init=teacher implies it."""


def student_encoder_config(student: StudentConfig, teacher: EncoderConfig) -> EncoderConfig:
    """Returns the student's encoder: the teacher's family, vocabulary, positions; its own size.

    Raises:
      ConfigError: a size or a rate cannot be, or the sizes do not fit each other.
    """
    inner = student.intermediate_size
    hidden, attention = student.hidden_dropout_prob, student.attention_probs_dropout_prob
    try:
        return dataclasses.replace(
            teacher,
            num_hidden_layers=student.num_hidden_layers,
            hidden_size=student.hidden_size,
            num_attention_heads=student.num_attention_heads,
            intermediate_size=4 * student.hidden_size if inner is None else inner,
            hidden_dropout_prob=teacher.hidden_dropout_prob if hidden is None else hidden,
            attention_probs_dropout_prob=(
                teacher.attention_probs_dropout_prob if attention is None else attention
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"student: {error}") from None


def init_student(
    key: Array, config: StudentConfig, teacher: EncoderConfig, teacher_encoder: Tree
) -> Tree:
    """Returns the student's encoder parameters before the first step.

    In this order: (1) everything random; (2) `embeddings=teacher` or `init=teacher` replaces the
    embeddings; (3) `init=teacher` replaces the blocks.

    Args:
      key: of the random start.
      config: the student.
      teacher: the teacher's shape.
      teacher_encoder: its encoder parameters.

    Raises:
      ConfigError: the student is larger than what it is to be cut from.
    """
    check_start(config, teacher)
    student = student_encoder_config(config, teacher)
    params = init_params(key, student)
    if config.init == "random" and config.embeddings == "random":
        return params
    params["embeddings"] = _cut(teacher_encoder["embeddings"], params["embeddings"])
    if config.init == "teacher":
        for index, layer in enumerate(_copied_layers(config, teacher)):
            source = teacher_encoder[f"layer_{layer - 1}"]
            params[f"layer_{index}"] = _cut_block(
                source, params[f"layer_{index}"], student, teacher
            )
    return params


def check_start(config: StudentConfig, teacher: EncoderConfig) -> None:
    """Raises ConfigError where the student cannot start from such a teacher as it says.

    Layers that it names must exist whatever it starts from: the blocks they would give are one of
    the references a run is compared with.
    """
    student = student_encoder_config(config, teacher)
    _check_layers(config, teacher)
    larger = larger_sizes(student, teacher)
    # Embeddings have neither heads nor a feed-forward network.
    kept_out = {"init": larger, "embeddings": [name for name in larger if name == "hidden_size"]}
    for setting, names in kept_out.items():
        if getattr(config, setting) == "teacher" and names:
            name, most = names[0], getattr(teacher, names[0])
            smaller = f"student.{name} of at most {most}, or " if hasattr(config, name) else ""
            raise ConfigError(
                f"the student's {name}={getattr(student, name)} is larger than the teacher's "
                f"{most} and cannot start from it; use {smaller}student.{setting}=random"
            )


def larger_sizes(student: EncoderConfig, teacher: EncoderConfig) -> list[str]:
    """Returns in what the student's blocks are larger than those they would be cut from."""
    sizes = ("hidden_size", "num_attention_heads", "head_size", "intermediate_size")
    return [name for name in sizes if getattr(student, name) > getattr(teacher, name)]


def _check_layers(config: StudentConfig, teacher: EncoderConfig) -> None:
    chosen = _copied_layers(config, teacher)
    if len(chosen) != config.num_hidden_layers:
        raise ConfigError(
            f"student.teacher_layers names {len(chosen)} layers for a student of "
            f"{config.num_hidden_layers}"
        )
    for layer in chosen:
        if not 1 <= layer <= teacher.num_hidden_layers:
            raise ConfigError(
                f"student.teacher_layers names layer {layer}; the teacher has layers 1 to "
                f"{teacher.num_hidden_layers}"
            )


def _copied_layers(config: StudentConfig, teacher: EncoderConfig) -> tuple[int, ...]:
    spread = uniform_layers(teacher=teacher.num_hidden_layers, student=config.num_hidden_layers)
    return config.teacher_layers or tuple(layer for layer, _ in spread)


def _cut(source: Any, like: Any) -> Any:
    """Returns the leading corner of each array, in the shape of `like`."""
    return jax.tree.map(
        lambda x, y: jnp.asarray(x)[tuple(slice(size) for size in y.shape)], source, like
    )


def _cut_block(source: Tree, like: Tree, student: EncoderConfig, teacher: EncoderConfig) -> Tree:
    """Returns a block cut to the student's shape, each kept head keeping its own first units."""
    wide, narrow = teacher.head_size, student.head_size
    heads = student.num_attention_heads

    def heads_last(x: Any) -> Array:  # […, H·K] -> […, H'·K']
        x = jnp.asarray(x).reshape(*x.shape[:-1], teacher.num_attention_heads, wide)
        x = x[..., :heads, :narrow]
        return x.reshape(*x.shape[:-2], heads * narrow)

    attention = {
        name: jax.tree.map(heads_last, source["attention"][name])
        for name in ("query", "key", "value")
    }
    attention["output"] = {
        "kernel": heads_last(source["attention"]["output"]["kernel"].T).T,
        "bias": source["attention"]["output"]["bias"],
    }
    return _cut({**source, "attention": attention}, like)
