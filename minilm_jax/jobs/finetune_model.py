"""The model that a fine-tuning run trains: a checkpoint with a head for the task, and its loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from minilm_jax.convert.hf_config import without_task
from minilm_jax.convert.model import Model
from minilm_jax.encoder.encoder import init_params
from minilm_jax.jobs.finetune_config import FinetuneConfig
from minilm_jax.jobs.trained_model import named_labels, scored_as
from minilm_jax.tasks.catalog import Kind, Task
from minilm_jax.tasks.losses import TaskModel, init_head
from minilm_jax.tasks.own import label_names
from minilm_jax.train.step import LossFunction


def class_names(task: Task, model: Model, examples: Sequence[Any]) -> tuple[str, ...]:
    """Returns class names in the order of the outputs: the checkpoint's where it knows them."""
    if task.kind != "classes":
        return ()
    wanted = task.labels or label_names(list(examples), name="the training set")
    known = {label.casefold(): label for label in wanted}
    stored = tuple(known.get(name.casefold(), "") for name in named_labels(model))
    return stored if sorted(stored) == sorted(wanted) else wanted


def start_model(
    config: FinetuneConfig, task: Task, source: Model, labels: tuple[str, ...]
) -> Model:
    """Returns the model as training begins: it has the task's head, and names the classes.

    Args:
      config: of the run.
      task: what it is to learn.
      source: the checkpoint.
      labels: class names in the order of the outputs; none where the task has no classes.
    """
    key = jax.random.key(config.train.seed)
    known = dict(source.params)
    if config.init == "random":
        known = {"encoder": init_params(jax.random.fold_in(key, 1), source.config)}
    same = tuple(name.casefold() for name in named_labels(source)) == tuple(
        name.casefold() for name in labels
    )
    if task.kind == "classes" and not same and "sequence_classifier" in known:
        # Outputs that stood for other classes are no start for these.
        head = dict(known["sequence_classifier"])
        head.pop("output")
        known["sequence_classifier"] = head
    params = init_head(
        key, source.config, task.kind, classes=len(labels) if labels else 1, params=known
    )
    hf_config = without_task(source.hf_config) | scored_as(task, config.lengths, config.answers)
    if labels:
        hf_config["id2label"] = {str(i): name for i, name in enumerate(labels)}
        hf_config["label2id"] = {name: i for i, name in enumerate(labels)}
        hf_config["problem_type"] = "single_label_classification"
    elif task.kind == "score":
        hf_config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        hf_config["problem_type"] = "regression"
    # What embedded sentences no longer does.
    return dataclasses.replace(source, hf_config=hf_config, params=params, sentence=None)


def make_loss(
    config: FinetuneConfig, task: Task, source: Model, labels: tuple[str, ...]
) -> LossFunction:
    """Returns the task's loss of what `start_model` makes of the same."""
    return TaskModel(
        source.config,
        task.kind,
        classes=len(labels) if labels else 1,
        compute=config.compute,
        head_dropout=head_dropout(source, task.kind),
    ).loss


def head_dropout(model: Model, kind: Kind) -> float:
    """Returns the rate of dropout in a task's head, as in transformers.

    A classifier's is its own where its config has one, or else the encoder's. Of the heads that
    find answers only DistilBERT's has dropout.
    """
    family = model.config.model_type
    if kind == "span" and family != "distilbert":
        return 0.0
    name, default = "classifier_dropout", model.config.hidden_dropout_prob
    if family == "distilbert":
        name, default = ("qa_dropout", 0.1) if kind == "span" else ("seq_classif_dropout", 0.2)
    elif family == "xlm":
        name, default = "summary_first_dropout", 0.1
    found = model.hf_config.get(name)
    return default if found is None else float(found)
