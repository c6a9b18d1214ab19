"""The fine-tuning job: a distilled model and a task in; the best checkpoint and its scores out."""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.convert.folder import write_model
from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.jobs.evaluator import (
    Evaluator,
    PartData,
    describe_scores,
    digest,
    report_skips,
)
from minilm_jax.jobs.finetune_config import (
    FinetuneConfig,
    FinetuneResult,
    report_parts,
    selection_parts,
)
from minilm_jax.jobs.finetune_model import class_names, make_loss, start_model
from minilm_jax.jobs.results import PREDICTIONS, result_rows, write_results
from minilm_jax.jobs.running import (
    Say,
    describe,
    describe_devices,
    join_hosts,
    open_checkpoints,
    open_devices,
    open_goodput,
    own_folder,
    train,
    write_result,
)
from minilm_jax.jobs.sweep import sweep
from minilm_jax.jobs.trained_model import check_length, load
from minilm_jax.signals import stoppable
from minilm_jax.tasks.batches import TaskBatches
from minilm_jax.tasks.catalog import TASKS, Part, Task, read_part
from minilm_jax.tasks.examples import Skips
from minilm_jax.tasks.features import question_features, text_features
from minilm_jax.train.devices import Devices
from minilm_jax.train.hosts import wait_for_all, writes
from minilm_jax.train.loop import Evaluation, TrainConfig
from minilm_jax.train.optimizer import evaluated_params, make_optimizer, make_schedule
from minilm_jax.train.run_folder import BEST, RESULT, read_json, write_json
from minilm_jax.train.state import TrainState

EVALUATIONS = "evaluations.json"


def run(
    config: FinetuneConfig, *, say: Callable[[str], None] = print
) -> FinetuneResult | list[FinetuneResult]:
    """Returns the result of a run, or those of a sweep.

    Started again after an interruption it continues; started again when finished it says so.
    """
    say = join_hosts(config.train, say)
    with stoppable():
        if config.sweep.given:
            return sweep(config, lambda one: _run(one, say), say=say)
        return _run(config, say)


def _run(config: FinetuneConfig, say: Say) -> FinetuneResult:
    began = time.monotonic()
    task = TASKS[config.task]
    devices = open_devices(config.train, batch_size=config.batch.batch_size)
    source, tokenizer = load(config.model)
    check_length(config.lengths, source)
    skips = Skips()
    examples = _training_examples(config, skips)
    labels = class_names(task, source, examples)
    evaluator = Evaluator(
        task,
        source,
        tokenizer,
        labels=labels,
        devices=devices,
        lengths=config.lengths,
        answers=config.answers,
        batch=config.batch,
        compute=config.compute,
    )
    # Read before the first step: a missing dev set must not come to light after an hour. A part
    # that selects and is reported is read once.
    selecting, reporting = selection_parts(config), report_parts(config)
    parts = {
        part: evaluator.read(config.data, part, limit=config.limit)
        for part in dict.fromkeys(selecting + reporting)
    }
    described = describe(
        config,
        model=source.fingerprint,
        data={"train": digest(examples), **{str(part): parts[part].sha256 for part in parts}},
    )
    if (config.output / RESULT).exists():
        with own_folder(config.output, described, override=config.override):
            result = FinetuneResult(**read_json(config.output / RESULT))
        say(f"{config.output} is finished ({result.steps} steps); nothing left to do.")
        _summarise(config, result, say)
        return result
    batches = _batches(config, task, tokenizer, examples, labels, skips)
    for line in skips.lines():
        say(f"  {line}")
    training = _Training(
        config,
        model=start_model(config, task, source, labels),
        batches=batches,
        devices=devices,
        tokenizer=tokenizer,
        evaluator=evaluator,
        selection=[parts[part] for part in selecting],
        described=described,
        began=began,
        say=say,
    )
    with own_folder(config.output, described, override=config.override):
        say(
            f"{task.name}: {len(examples):,} examples, {len(batches.features):,} rows; model "
            f"{config.model}; {describe_devices(devices)}"
        )
        if labels:
            counts = collections.Counter(example.label for example in examples)
            say("classes  " + ", ".join(f"{label} {counts[label]:,}" for label in labels))
        best = training.run()
        reported = [parts[part] for part in reporting]
        result = _report(config, task, tokenizer, evaluator, reported, best, say)
        write_result(config.output, result)
        _summarise(config, result, say)
        return result


class _Training:
    """The training, and the evaluations on the way: the best model is written when it is found."""

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        model: Model,
        batches: TaskBatches,
        devices: Devices,
        tokenizer: Tokenizer,
        evaluator: Evaluator,
        selection: Sequence[PartData],
        described: dict[str, Any],
        began: float,
        say: Say,
    ) -> None:
        """Compiles nothing yet, and does not look at the run's folder."""
        schedule = config.schedule
        self.selection, self.described, self.began, self.say = selection, described, began, say
        self.records: list[dict[str, Any]] = []
        self.config, self.model, self.devices = config, model, devices
        self.batches, self.tokenizer, self.evaluator = batches, tokenizer, evaluator
        self.task = TASKS[config.task]
        self.steps = schedule.max_steps or schedule.epochs * batches.steps_an_epoch
        self.every = schedule.evaluate_every or batches.steps_an_epoch
        self.optimizer_config = config.optimizer
        if schedule.warmup_ratio:
            self.optimizer_config = dataclasses.replace(
                config.optimizer, warmup_steps=round(schedule.warmup_ratio * self.steps)
            )
        self.optimizer = make_optimizer(self.optimizer_config, steps=self.steps)

    def run(self) -> dict[str, Any]:
        """Returns the best evaluation's record, after what is left of the training."""
        output = self.config.output
        if (output / EVALUATIONS).exists():
            self.records = read_json(output / EVALUATIONS)
        goodput = open_goodput(output, began=self.began)
        if not self._enough():
            with open_checkpoints(
                output, self.config.train, metadata={"config": self.described}
            ) as checkpoints:
                state = train(
                    make_loss(self.config, self.task, self.model),
                    self.optimizer,
                    lambda: self.model.params,
                    None,
                    self._batch,
                    output=output,
                    config=TrainConfig(
                        **vars(self.config.train), steps=self.steps, evaluate_every=self.every
                    ),
                    described=self.described,
                    devices=self.devices,
                    checkpoints=checkpoints,
                    schedule=make_schedule(self.optimizer_config, steps=self.steps),
                    goodput=goodput,
                    evaluate=self._evaluate,
                )
            if not self.records or self.records[-1]["step"] < int(state.step):
                # It had gone that far already: its steps were overridden, or its records lost.
                self._evaluate(state)
        self.say(f"time {goodput.account()}")
        best = max(self.records, key=lambda record: record["selection"])
        return {**best, "last": self.records[-1]["step"]}

    def _enough(self) -> bool:
        """Returns whether the last step was evaluated, or the patience has come to its end."""
        if not self.records:
            return False
        selections = [record["selection"] for record in self.records]
        waited = len(selections) - 1 - selections.index(max(selections))
        patience = self.config.schedule.patience
        return self.records[-1]["step"] >= self.steps or bool(patience and waited >= patience)

    def _evaluate(self, state: TrainState) -> Evaluation:
        """Returns whether the run ends here, after scoring and recording what the state is worth.

        The best model is written before its record: a record means that the model is there.
        """
        step, output = int(state.step), self.config.output
        params = self.devices.fetch(evaluated_params(state, self.optimizer_config))
        record = self._score(step, params)
        # A start that was cut off may have recorded steps which were not saved any more.
        before = [earlier for earlier in self.records if earlier["step"] < step]
        self.say(
            f"step {step:,}  {record['metric']} {record['selection']:.2f} on "
            + ", ".join(record["scores"])
        )
        if self.config.schedule.keep_models == "all":
            self._write(params, output / f"step-{step}")
        if all(record["selection"] > earlier["selection"] for earlier in before):
            self._write(params, output / BEST)
        self.records = [*before, record]
        if writes():
            write_json(output / EVALUATIONS, self.records)
        return Evaluation(enough=self._enough())

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        rows = self.devices.rows(self.config.batch.batch_size)
        batch = self.batches.at(step, seed=self.config.train.seed)
        return {name: x[rows] for name, x in batch.items()}

    def _score(self, step: int, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the record of a step."""
        metric = self.task.metrics[0]
        scores = {}
        weighted = 0.0
        for data in self.selection:
            result = self.evaluator.score(params, data)
            scores[str(data.part)] = result.scores
            weighted += result.scores[metric] * len(data.examples)
        total = sum(len(data.examples) for data in self.selection)
        return {"step": step, "metric": metric, "selection": weighted / total, "scores": scores}

    def _write(self, params: dict[str, Any], folder: Path) -> None:
        if writes():
            model = dataclasses.replace(self.model, params=params)
            write_model(model, folder, tokenizer_files=self.tokenizer.files)


def _training_examples(config: FinetuneConfig, skips: Skips) -> list[Any]:
    found: list[Any] = []
    for code in config.train_languages or TASKS[config.task].languages[:1]:
        part = Part(split="train", language=code)
        read: list[Any] = list(
            read_part(config.task, config.data, part, purpose="train", skips=skips)
        )
        found += read[: config.limit or None]
    return found


def _batches(
    config: FinetuneConfig,
    task: Task,
    tokenizer: Tokenizer,
    examples: Sequence[Any],
    labels: tuple[str, ...],
    skips: Skips,
) -> TaskBatches:
    if task.kind == "span":
        features = question_features(
            examples, tokenizer, config=config.lengths, purpose="train", skips=skips
        )
    else:
        features = text_features(examples, tokenizer, config=config.lengths, labels=labels)
    return TaskBatches(
        features,
        config=config.batch,
        max_length=config.lengths.max_length,
        pad_id=tokenizer.pad_id,
    )


def _report(
    config: FinetuneConfig,
    task: Task,
    tokenizer: Tokenizer,
    evaluator: Evaluator,
    reported: Sequence[PartData],
    best: dict[str, Any],
    say: Say,
) -> FinetuneResult:
    """Returns the result, after scoring the best model and writing its predictions and tables."""
    folder = config.output / BEST
    wait_for_all("written")
    model, _ = load(str(folder))
    scores, rows = {}, []
    for data in reported:
        report_skips(data, say)
        result = evaluator.score(model.params, data)
        if writes():
            evaluator.write(result, config.output / PREDICTIONS)
        scores[str(data.part)] = result.scores
        rows += result_rows(
            result,
            name=config.name or config.output.name,
            task=task,
            model=model,
            tokenizer=tokenizer,
            settings=config,
            seed=str(config.train.seed),
        )
    if writes():
        write_results(config.output, rows)
    return FinetuneResult(
        model=str(folder),
        steps=best["last"],
        best_step=best["step"],
        selection=best["selection"],
        scores=scores,
    )


def _summarise(config: FinetuneConfig, result: FinetuneResult, say: Say) -> None:
    say(f"\nbest at step {result.best_step:,} of {result.steps:,}: {result.selection:.2f}")
    for part, scores in result.scores.items():
        say(f"  {part:<12} {describe_scores(scores)}")
    say(f"model   {result.model}  (a Hugging Face folder: loads in transformers)")
    say(f"tables  {config.output / 'tables.md'}")
