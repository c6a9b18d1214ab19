"""The fine-tuning job: a distilled model and a task in; the best checkpoint and its scores out."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.convert.folder import write_model
from minilm_jax.jobs.evaluator import describe_scores, report_skips
from minilm_jax.jobs.finetune_config import FinetuneConfig, FinetuneResult
from minilm_jax.jobs.finetune_inputs import Inputs
from minilm_jax.jobs.finetune_model import start_model
from minilm_jax.jobs.results import PREDICTIONS, result_rows, write_results
from minilm_jax.jobs.running import (
    SAVES_MEMORY,
    Say,
    describe,
    join_hosts,
    open_checkpoints,
    open_goodput,
    own_folder,
    shape_digest,
    train,
    write_result,
)
from minilm_jax.jobs.sweep import Runs, check_folder, sweep, sweep_runs
from minilm_jax.jobs.trained_model import load
from minilm_jax.settings import check
from minilm_jax.signals import stoppable
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.hardware import memory_explained
from minilm_jax.train.hosts import fail_together, wait_for_all, writes
from minilm_jax.train.loop import Evaluation
from minilm_jax.train.optimizer import Schedule, evaluated_params, make_schedule
from minilm_jax.train.run_folder import BEST, RESULT, check_run, read_json, write_json
from minilm_jax.train.state import TrainState, create_state
from minilm_jax.train.step import make_given

EVALUATIONS = "evaluations.json"


def run(
    config: FinetuneConfig, *, say: Callable[[str], None] = print
) -> FinetuneResult | list[FinetuneResult]:
    """Returns the result of a run, or those of a sweep.

    Started again after an interruption it continues; started again when finished it says so.
    """
    check("config", config, FinetuneConfig)
    say = join_hosts(config.train, say)
    with stoppable():
        began = time.monotonic()
        # All of them made before anything is read: a value that cannot be is refused at once.
        runs = sweep_runs(config) if config.sweep.given else None
        with fail_together():
            inputs = Inputs(config)
        if runs is None:
            return _run(config, inputs, say, began=began)
        _check_sweep(config, runs, inputs)
        return sweep(config, runs, lambda one: _run(one, inputs, say), say=say)


def _check_sweep(config: FinetuneConfig, runs: Runs, inputs: Inputs) -> None:
    """Raises ConfigError where a run of a sweep would be refused: the last as soon as the first."""
    configs = list(itertools.chain(*runs.values()))
    with fail_together():
        if writes():
            check_folder(config.output)
            for one in configs:
                check_run(one.output, _described(one, inputs), override=one.override)
    for one in configs:
        if not (one.output / RESULT).exists():
            _plan(one, inputs)


def _described(config: FinetuneConfig, inputs: Inputs) -> dict[str, Any]:
    return describe(
        config,
        model=inputs.source.fingerprint,
        model_config=shape_digest(inputs.source.config),
        tokenizer=inputs.tokenizer.fingerprint,
        data=inputs.digests,
    )


def _plan(config: FinetuneConfig, inputs: Inputs) -> tuple[TrainConfig, Schedule]:
    """Returns how long a run trains, when it evaluates, and its learning rate.

    Raises:
      ConfigError: warm-up or profile do not fit into the steps.
    """
    an_epoch = inputs.batches.steps_an_epoch
    steps = config.schedule.max_steps or config.schedule.epochs * an_epoch
    optimizer = config.optimizer
    if config.schedule.warmup_ratio:
        # Of very few steps, at least the last is none of warm-up.
        warmup = min(round(config.schedule.warmup_ratio * steps), steps - 1)
        optimizer = dataclasses.replace(optimizer, warmup_steps=warmup)
    every = config.schedule.evaluate_every or an_epoch
    return (
        TrainConfig(**vars(config.train), steps=steps, evaluate_every=every),
        make_schedule(optimizer, steps=steps),
    )


def _run(
    config: FinetuneConfig, inputs: Inputs, say: Say, *, began: float | None = None
) -> FinetuneResult:
    described = _described(config, inputs)
    if (config.output / RESULT).exists():
        with own_folder(config.output, described, override=config.override):
            found = FinetuneResult(**read_json(config.output / RESULT))
        # The folder may have been moved since.
        result = dataclasses.replace(found, model=str(config.output / BEST))
        say(f"{config.output} is finished ({result.steps} steps); nothing to do.")
        _summarise(config, result, say)
        return result
    began = time.monotonic() if began is None else began
    with fail_together():
        training = _Training(config, inputs, described=described, began=began, say=say)
    with (
        own_folder(config.output, described, override=config.override),
        memory_explained(SAVES_MEMORY),
    ):
        for line in inputs.describe():
            say(line)
        best = training.run()
        result = _report(config, inputs, best, say)
        write_result(config.output, result)
        _summarise(config, result, say)
        return result


class _Training:
    """The training, and the evaluations on the way: the best model is written when it is found."""

    def __init__(
        self,
        config: FinetuneConfig,
        inputs: Inputs,
        *,
        described: dict[str, Any],
        began: float,
        say: Say,
    ) -> None:
        """Compiles nothing yet, and does not look at the run's folder."""
        self.config, self.inputs = config, inputs
        self.described, self.began, self.say = described, began, say
        self.records: list[dict[str, Any]] = []
        self.model = start_model(config, inputs.task, inputs.source, inputs.labels)
        self.train, self.schedule = _plan(config, inputs)

    def run(self) -> dict[str, Any]:
        """Returns the best evaluation's record, after what is left of the training."""
        output, devices = self.config.output, self.inputs.devices
        if (output / EVALUATIONS).exists():
            self.records = read_json(output / EVALUATIONS)
        goodput = open_goodput(output, began=self.began)
        if not self._enough():
            given = make_given(None, seed=self.config.train.seed, schedule=self.schedule)
            with open_checkpoints(
                output, self.config.train, metadata={"config": self.described}
            ) as checkpoints:
                state = train(
                    self.inputs.step,
                    lambda: create_state(self.model.params, self.inputs.optimizer),
                    devices.place(given),
                    self._batch,
                    output=output,
                    config=self.train,
                    described=self.described,
                    devices=devices,
                    checkpoints=checkpoints,
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
        return self.records[-1]["step"] >= self.train.steps or bool(patience and waited >= patience)

    def _evaluate(self, state: TrainState) -> Evaluation:
        """Returns whether the run ends here, after scoring and recording what the state is worth.

        The best model is written before its record: a record means that the model is there.
        """
        step, output = int(state.step), self.config.output
        params = self.inputs.devices.fetch(evaluated_params(state, self.config.optimizer))
        record = self._score(step, params)
        # A start that was cut off may have recorded steps which were not saved any more.
        before = [earlier for earlier in self.records if earlier["step"] < step]
        self.say(
            f"step {step:,}  {record['metric']} {record['selection']:.2f} on "
            + ", ".join(record["scores"])
        )
        if self.config.schedule.keep_models == "all":
            self._write(params, output / f"step-{step}", record)
        if all(record["selection"] > earlier["selection"] for earlier in before):
            self._write(params, output / BEST, record)
        self.records = [*before, record]
        if writes():
            write_json(output / EVALUATIONS, self.records)
        return Evaluation(enough=self._enough())

    def _batch(self, step: int) -> dict[str, np.ndarray]:
        rows = self.inputs.devices.rows(self.config.batch.batch_size)
        batch = self.inputs.batches.at(step, seed=self.config.train.seed)
        return {name: x[rows] for name, x in batch.items()}

    def _score(self, step: int, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the record of a step."""
        metric = self.inputs.task.metrics[0]
        scores = {}
        weighted = 0.0
        for data in self.inputs.selecting:
            result = self.inputs.evaluator.score(params, data)
            scores[str(data.part)] = result.scores
            weighted += result.scores[metric] * len(data.examples)
        total = sum(len(data.examples) for data in self.inputs.selecting)
        return {"step": step, "metric": metric, "selection": weighted / total, "scores": scores}

    def _write(self, params: dict[str, Any], folder: Path, record: dict[str, Any]) -> None:
        if writes():
            model = dataclasses.replace(self.model, params=params)
            files, origin = self.inputs.tokenizer.files, self._origin(record)
            write_model(model, folder, tokenizer_files=files, origin=origin)

    def _origin(self, record: dict[str, Any]) -> dict[str, str]:
        """Returns how the model of a step came about, for its card."""
        config, source = self.config, self.inputs.source
        figure = f"{record['metric']} {record['selection']:.2f}"
        start = {"fine-tuned from": source.source, "SHA-256 of its weights": source.fingerprint}
        if config.init == "random":
            start = {"trained from random weights": f"the shape of {source.source}"}
        return {
            **start,
            "task": f"{config.task}, {len(self.inputs.examples):,} examples to train on",
            "steps": f"{record['step']:,} of {self.train.steps:,} × {config.batch.batch_size} rows "
            f"of up to {config.lengths.max_length} tokens",
            "learning rate, seed": f"{config.optimizer.learning_rate}, {config.train.seed}",
            "selected by": f"{figure} on {', '.join(record['scores'])}",
        }


def _report(
    config: FinetuneConfig, inputs: Inputs, best: dict[str, Any], say: Say
) -> FinetuneResult:
    """Returns the result, after scoring the best model and writing its predictions and tables."""
    folder = config.output / BEST
    wait_for_all("written")
    model, _ = load(str(folder))
    scores, rows = {}, []
    for data in inputs.reporting:
        report_skips(data, say)
        result = inputs.evaluator.score(model.params, data)
        if writes():
            inputs.evaluator.write(result, config.output / PREDICTIONS)
        scores[str(data.part)] = result.scores
        rows += result_rows(
            result,
            name=config.name or config.output.name,
            task=inputs.task,
            model=model,
            tokenizer=inputs.tokenizer,
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
