"""The teacher of a distillation run: its parameters, or their shapes, and its tokenizer."""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import jax

from minilm_jax.convert.folder import read_model
from minilm_jax.convert.model import Model
from minilm_jax.data.sources import read_documents
from minilm_jax.data.tokenizer_training import train_sentencepiece, train_wordpiece
from minilm_jax.data.tokenizers import Tokenizer, load_tokenizer
from minilm_jax.distill.objective import Objective
from minilm_jax.distill.vocabulary import init_mlm
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.errors import ConfigError, MissingHeadError
from minilm_jax.jobs.distill_config import DistillConfig


def load_teacher(config: DistillConfig) -> Model:
    """Returns the teacher with the heads the objective needs, or a made-up one."""
    wanted, heads = config.teacher, config.objective.teacher_heads()
    if wanted.init == "random" and wanted.shape is not None:
        params = _random_params(wanted.shape, heads)
        return Model(config=wanted.shape, params=params, fingerprint="random")
    try:
        teacher = read_model(wanted.source, sha256=wanted.sha256, heads=heads)
    except MissingHeadError:
        raise _lacks(wanted.source, heads) from None
    if wanted.shape is not None:
        for field in dataclasses.fields(EncoderConfig):
            found, expected = (getattr(c, field.name) for c in (teacher.config, wanted.shape))
            # Dropout and initialisation are no property of trained weights.
            if found != expected and isinstance(expected, int):
                raise ConfigError(
                    f"teacher {wanted.source} has {field.name}={found}, teacher.shape says "
                    f"{expected}"
                )
    return teacher


def check_heads(config: DistillConfig, teacher: Model) -> None:
    """Raises ConfigError where a teacher that is yet to be trained will lack what is learnt from.

    Args:
      config: of the run that learns from it.
      teacher: `distill_step.exported` of the run that trains it.
    """
    lacking = [head for head in config.objective.teacher_heads() if head not in teacher.params]
    if lacking:
        raise _lacks(config.teacher.source, lacking)


def _lacks(source: str, heads: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"teacher {source} has no {', '.join(heads)} head, which this objective learns from"
    )


def describe_teacher(config: DistillConfig) -> Model:
    """Returns the teacher with shapes for parameters; its weights are read only without a shape."""
    shape = config.teacher.shape
    if shape is None:
        teacher = load_teacher(config)
        return dataclasses.replace(teacher, params=jax.eval_shape(lambda: teacher.params))
    heads = config.objective.teacher_heads()
    return Model(config=shape, params=jax.eval_shape(lambda: _random_params(shape, heads)))


def teacher_params(teacher: Model, objective: Objective) -> dict[str, Any]:
    """Returns the teacher's encoder and the heads that the objective learns from."""
    return {name: teacher.params[name] for name in ("encoder", *objective.teacher_heads())}


def _random_params(shape: EncoderConfig, heads: Collection[str]) -> dict[str, Any]:
    key = jax.random.key(0)
    return {
        "encoder": init_params(key, shape),
        **{head: dict(init_mlm(key, shape)) for head in heads},
    }


def open_tokenizer(config: DistillConfig, teacher: Model) -> Tokenizer | None:
    """Returns the teacher's tokenizer; None where a made-up teacher's is yet to be learnt."""
    if teacher.tokenizer_folder is not None:
        return load_tokenizer(teacher.tokenizer_folder, vocab_size=teacher.config.vocab_size)
    if config.teacher.init == "random" and config.text.source is not None:
        return None
    if config.teacher.init == "random":
        raise ConfigError(
            "teacher.init=random learns its vocabulary from raw text, and text.corpora have none; "
            "give --text.source.paths, or a real teacher: --teacher.init pretrained "
            "--teacher.source PATH"
        )
    raise ConfigError(f"teacher {config.teacher.source} has no tokenizer files")


def learn_tokenizer(config: DistillConfig, teacher: Model) -> Tokenizer:
    """Returns a vocabulary of the run's own text, for a teacher that is made up."""
    folder, size = config.output / "tokenizer", teacher.config.vocab_size
    if not folder.exists():
        # PyTorch's RoBERTa and XLM-R find positions by the padding's id: it has to be the config's.
        learn = train_sentencepiece if teacher.config.position_offset else train_wordpiece
        assert config.text.source is not None
        learn(
            itertools.islice(read_documents(config.text.source), 1000),
            output=folder,
            vocab_size=size,
        )
    learnt = load_tokenizer(folder).vocab_size
    if learnt < size // 2:
        raise ConfigError(
            f"text.source is too small to learn the teacher's {size:,} pieces from, it gives "
            f"{learnt:,}; set --teacher.shape.vocab-size {learnt}, or give more text and another "
            "--output"
        )
    return load_tokenizer(folder, vocab_size=size)
