"""What a fine-tuning run reads: the model to start from, the task's data, the devices.

No setting that a sweep varies has a part in it, so that all runs of a sweep share one: text is read
and tokenised once, and the programs that train and that score are compiled once.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import optax

from minilm_jax.jobs.evaluator import Evaluator, PartData, digest
from minilm_jax.jobs.finetune_config import FinetuneConfig, report_parts, selection_parts
from minilm_jax.jobs.finetune_model import class_names, make_loss
from minilm_jax.jobs.running import describe_devices, lift_step, open_devices
from minilm_jax.jobs.trained_model import check_length, load
from minilm_jax.tasks.batches import TaskBatches
from minilm_jax.tasks.catalog import TASKS, Part, read_part
from minilm_jax.tasks.examples import Skips, listed
from minilm_jax.tasks.features import question_features, text_features
from minilm_jax.train.optimizer import make_optimizer


class Inputs:
    """Everything a run is given, read and checked before its first step."""

    def __init__(self, config: FinetuneConfig) -> None:
        """Reads the model and all parts: a missing dev set must not come to light after an hour."""
        self._config = config
        self.task = TASKS[config.task]
        self.devices = open_devices(config.train, batch_size=config.batch.batch_size)
        self.source, self.tokenizer = load(config.model)
        check_length(config.lengths, self.source)
        self._skips = Skips()
        self.examples = _training_examples(config, self._skips)
        self.labels = class_names(self.task, self.source, self.examples)
        """In the order of the outputs; none where the task has no classes."""
        self.evaluator = Evaluator(
            self.task,
            self.source,
            self.tokenizer,
            labels=self.labels,
            devices=self.devices,
            lengths=config.lengths,
            answers=config.answers,
            batch=config.batch,
            compute=config.compute,
        )
        selecting, reporting = selection_parts(config), report_parts(config)
        # A part that selects and is reported is read once.
        parts = {
            part: self.evaluator.read(config.data, part, limit=config.limit)
            for part in dict.fromkeys(selecting + reporting)
        }
        self.selecting: list[PartData] = [parts[part] for part in selecting]
        self.reporting: list[PartData] = [parts[part] for part in reporting]
        self.digests = {
            "train": digest(self.examples),
            **{str(part): found.sha256 for part, found in parts.items()},
        }

    @functools.cached_property
    def batches(self) -> TaskBatches:
        """The training set as rows, made when first needed: a finished run never needs them."""
        lengths = self._config.lengths
        if self.task.kind == "span":
            features = question_features(
                self.examples, self.tokenizer, config=lengths, purpose="train", skips=self._skips
            )
        else:
            features = text_features(
                self.examples, self.tokenizer, config=lengths, labels=self.labels
            )
        return TaskBatches(
            features,
            config=self._config.batch,
            max_length=lengths.max_length,
            pad_id=self.tokenizer.pad_id,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer of every run; the learning rate is among what the step is given."""
        return make_optimizer(self._config.optimizer)

    @functools.cached_property
    def step(self) -> Callable[..., Any]:
        """The lifted step of every run."""
        return lift_step(
            make_loss(self._config, self.task, self.source, self.labels),
            self.optimizer,
            config=self._config.train,
            devices=self.devices,
        )

    def describe(self) -> list[str]:
        """Returns the lines that say what is trained, on what, and what of it was left out."""
        rows = len(self.batches.features)  # making them may leave out more
        lines = [f"  {line}" for line in self._skips.lines()]
        lines.append(
            f"{self.task.name}: {len(self.examples):,} examples, {rows:,} rows; model "
            f"{self._config.model}; {describe_devices(self.devices)}"
        )
        if self.labels:
            counts = collections.Counter(example.label for example in self.examples)
            shown = [f"{label} {counts[label]:,}" for label in self.labels]
            lines.append(f"classes  {listed(shown)}")
        return lines


def _training_examples(config: FinetuneConfig, skips: Skips) -> Sequence[Any]:
    found: list[Any] = []
    for code in config.train_languages or TASKS[config.task].languages[:1]:
        part = Part(split="train", language=code)
        read: list[Any] = list(
            read_part(config.task, config.data, part, purpose="train", skips=skips)
        )
        found += read[: config.limit or None]
    return found
