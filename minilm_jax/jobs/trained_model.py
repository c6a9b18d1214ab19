"""A trained model as a task takes it: its weights, tokenizer and the names of its classes."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minilm_jax.convert.folder import is_model, read_model
from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer, load_tokenizer
from minilm_jax.errors import ConfigError
from minilm_jax.tasks.answers import AnswerConfig
from minilm_jax.tasks.catalog import Task
from minilm_jax.tasks.examples import listed
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.run_folder import BEST, STUDENT, SWEEP, read_json

T = TypeVar("T", LengthConfig, AnswerConfig)


def load(source: str) -> tuple[Model, Tokenizer]:
    """Returns a model and its tokenizer.

    Args:
      source: a folder with a model, a Hub id, or the folder of one of our runs, which stands for
        its best model or its student; that of a sweep for the best model of its best setting.
    """
    model = read_model(_of_run(source))
    return model, tokenizer_of(model)


def tokenizer_of(model: Model) -> Tokenizer:
    """Returns the tokenizer that lies in the model's folder; ConfigError where none does."""
    if model.tokenizer_folder is None:
        source = model.source or "without a folder"
        raise ConfigError(f"model {source} has no tokenizer files; copy them into its folder")
    return load_tokenizer(model.tokenizer_folder, vocab_size=model.config.vocab_size)


def _of_run(source: str) -> str:
    """Returns the model that a run's folder stands for; what has weights of its own is no run."""
    folder = Path(source)
    if not source or is_model(folder):
        return source
    if (folder / SWEEP).is_file():
        best = _dict(_dict(read_json(folder / SWEEP)).get("best"))
        folder = folder / str(best.get("best_run"))
    for inner in (BEST, STUDENT):
        if is_model(folder / inner):
            return str(folder / inner)
    return source


def check_length(lengths: LengthConfig, model: Model) -> None:
    """Raises ConfigError where rows would be longer than the model's positions."""
    if lengths.max_length > model.config.max_length:
        raise ConfigError(
            f"lengths.max_length={lengths.max_length} is longer than the model's "
            f"{model.config.max_length} positions ({model.source})"
        )


def scored_as(task: Task, lengths: LengthConfig, answers: AnswerConfig) -> dict[str, Any]:
    """Returns what a fine-tuned model's config.json says of how it was scored."""
    settings = {"lengths": dataclasses.asdict(lengths), "answers": dataclasses.asdict(answers)}
    return {"finetuning_task": task.name, "task_specific_params": {task.name: settings}}


def own_settings(task: Task, model: Model) -> tuple[LengthConfig, AnswerConfig]:
    """Returns how a model was scored when it was fine-tuned, whatever of the tasks it was on.

    What its config.json does not say is as in the papers.

    Raises:
      ConfigError: what it says is of the wrong type or out of range.
    """
    every = _dict(model.hf_config.get("task_specific_params"))
    said = _dict(every.get(str(model.hf_config.get("finetuning_task"))))
    lengths = LengthConfig(max_length=384) if task.kind == "span" else LengthConfig()
    try:
        return _as_said(lengths, said.get("lengths")), _as_said(AnswerConfig(), said.get("answers"))
    except ConfigError as error:
        raise ConfigError(
            f"model {model.source}: task_specific_params of its config.json: {error}"
        ) from None


def _as_said(default: T, said: Any) -> T:
    names = vars(default).keys() & _dict(said).keys()
    return dataclasses.replace(default, **{name: said[name] for name in names})


def _dict(value: Any) -> dict[str, Any]:
    """Returns what a file of another's making holds where an object belongs; else an empty one."""
    return value if isinstance(value, dict) else {}


def model_labels(task: Task, model: Model, given: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the model's class names, spelled as the task does, in the order of its outputs.

    Names decide, never integers: the same three classes stand in three orders in published
    checkpoints.

    Raises:
      ConfigError: the model has no head for the task, its names are not the task's, two are alike,
        or those given are the model's own in another order.
    """
    head = "span" if task.kind == "span" else "sequence_classifier"
    if head not in model.params:
        raise ConfigError(
            f"model {model.source} has no {head.replace('_', ' ')}; fine-tune it on {task.name}"
        )
    if task.kind == "span":
        return ()
    outputs = int(np.shape(model.params[head]["output"]["bias"])[0])
    if (outputs == 1) != (task.kind == "score"):
        learnt = "a number" if outputs == 1 else f"{outputs:,} classes"
        raise ConfigError(
            f"model {model.source} has learnt {learnt}, which {task.name} does not ask for; "
            f"fine-tune it on {task.name}"
        )
    if task.kind == "score":
        return ()
    stored = named_labels(model)
    named = given or stored
    if given and len(given) != outputs:
        raise ConfigError(f"labels: {len(given)} names given for the model's {outputs} classes")
    spelled, own = ([name.casefold() for name in names] for names in (named, stored))
    if len(set(spelled)) < len(spelled):
        raise ConfigError(
            f"model {model.source}: two classes have one name in {listed(named)}; correct "
            f"{'labels' if given else 'id2label of its config.json'}"
        )
    if spelled != own and sorted(spelled) == sorted(own):
        raise ConfigError(
            f"labels {', '.join(given)}: the config.json of model {model.source} has them in "
            f"another order, {', '.join(stored)}; leave labels out, or correct its id2label"
        )
    if not task.labels:
        return named
    known = {label.casefold(): label for label in task.labels}
    matched = tuple(known.get(name.casefold(), "") for name in named)
    if sorted(matched) != sorted(task.labels):
        raise ConfigError(
            f"model {model.source} calls its classes {listed(named) or 'nothing'}; {task.name} "
            f"has {', '.join(task.labels)}: give labels in the order of the model's outputs"
        )
    return matched


def named_labels(model: Model) -> tuple[str, ...]:
    """Returns `id2label` of the model's config in order; empty where there is none.

    Raises:
      ConfigError: its keys are not 0, 1, 2, …
    """
    stored = model.hf_config.get("id2label") or {}
    if not isinstance(stored, dict) or stored.keys() != {str(n) for n in range(len(stored))}:
        raise ConfigError(
            f"model {model.source}: id2label of its config.json is {json.dumps(stored):.80}; write "
            'a name for each output there: {"0": "name", "1": "other name"}'
        )
    return tuple(str(stored[str(n)]) for n in range(len(stored)))
