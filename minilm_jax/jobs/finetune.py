"""The fine-tuning job: a distilled model and a task in; the best checkpoint and its scores out."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from minilm_jax.convert.folder import write_model
from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.encoder.config import Compute
from minilm_jax.encoder.encoder import init_params
from minilm_jax.errors import ConfigError
from minilm_jax.jobs.evaluate import (
    BEST,
    PREDICTIONS,
    RESULTS,
    Evaluator,
    PartData,
    check_length,
    describe_scores,
    digest,
    load,
    named_labels,
    report_skips,
    result_rows,
    write_tables,
)
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
)
from minilm_jax.signals import stoppable
from minilm_jax.tasks.answers import AnswerConfig
from minilm_jax.tasks.batches import RowConfig, TaskBatches
from minilm_jax.tasks.catalog import (
    TASKS,
    Kind,
    Part,
    Task,
    TaskData,
    TaskName,
    all_languages,
    read_part,
)
from minilm_jax.tasks.examples import Skips
from minilm_jax.tasks.features import LengthConfig, question_features, text_features
from minilm_jax.tasks.losses import TaskModel, init_head
from minilm_jax.tasks.own import label_names
from minilm_jax.tasks.tables import ResultRow, append_rows, mean_and_deviation, read_rows
from minilm_jax.train.devices import Devices
from minilm_jax.train.hosts import wait_for_all, writes
from minilm_jax.train.loop import EngineConfig, Evaluation, TrainConfig
from minilm_jax.train.optimizer import (
    OptimizerConfig,
    evaluated_params,
    make_optimizer,
    make_schedule,
)
from minilm_jax.train.run_folder import (
    RESULT,
    read_json,
    write_json,
)
from minilm_jax.train.state import TrainState, create_state
from minilm_jax.train.step import make_step

EVALUATIONS = "evaluations.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long a run trains, and what it looks at on the way."""

    epochs: int = 3
    """Passes over the training set."""
    max_steps: int = 0
    """Steps in all, whatever the epochs; 0: the epochs decide."""
    warmup_ratio: float = 0.0
    """Share of the steps that warms up; 0: optimizer.warmup_steps decide."""
    evaluate_every: int = 0
    """Steps between evaluations on the selection parts; 0: an epoch."""
    patience: int = 0
    """Evaluations without improvement after which the run ends; 0: never."""
    keep_models: Literal["best", "all"] = "best"
    """all: each evaluated checkpoint is kept as a model, too (step-…)."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "evaluate_every", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name} must not be negative")
        if self.epochs < 1:
            raise ConfigError(f"schedule.epochs must be at least 1, got {self.epochs}")
        if not 0.0 <= self.warmup_ratio < 1.0:
            raise ConfigError(f"schedule.warmup_ratio must be in [0, 1), got {self.warmup_ratio}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Values to try in all combinations; what is not given stays as the run has it."""

    learning_rates: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()
    """Figures of one learning rate and number of epochs become mean ± standard deviation."""

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if len(set(values)) < len(values):
                raise ConfigError(
                    f"sweep.{name} has a value twice ({', '.join(map(str, values))}); each is one "
                    "run: give it once"
                )

    @property
    def given(self) -> bool:
        """Whether there is anything to sweep."""
        return bool(self.learning_rates or self.epochs or self.seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tuning run, or a sweep of them."""

    task: TaskName
    """GLUE's nine, squad1, squad2, xnli, mlqa; texts and questions are your own data."""
    model: str
    """A Hugging Face folder or a Hub id: the encoder to start from, with its tokenizer."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """random draws every weight anew: the baseline that shows what the checkpoint is worth."""
    data: TaskData
    output: Path
    """The run's folder: config, metrics, evaluations, checkpoints, the best model, tables."""
    train_languages: tuple[str, ...] = ()
    """none given: English, or all rows of own data. XNLI: English alone is zero-shot transfer;
    several are translate-train."""
    select_languages: tuple[str, ...] = ()
    """Dev sets that select checkpoints; none given: the task's own rule (XNLI: all 15 together,
    MLQA: English; own data: all rows)."""
    report: Literal["task", "none"] = "task"
    """What the best model is scored on at the end: the split the papers report, or nothing."""
    name: str = ""
    """What tables call the model; "" is the output folder's name."""
    lengths: LengthConfig = dataclasses.field(default_factory=LengthConfig)
    answers: AnswerConfig = dataclasses.field(default_factory=AnswerConfig)
    batch: RowConfig = dataclasses.field(default_factory=RowConfig)
    compute: Compute = dataclasses.field(default_factory=Compute)
    optimizer: OptimizerConfig = dataclasses.field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=5e-5, warmup_steps=0, eps=1e-8, weight_decay=0.0
        )
    )
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: EngineConfig = dataclasses.field(default_factory=lambda: EngineConfig(log_every=50))
    sweep: SweepConfig = dataclasses.field(default_factory=SweepConfig)
    limit: int = 0
    """Examples of each part at most, to try things; 0 is all."""
    override: tuple[str, ...] = ()
    """Dotted names of settings that may differ from the run that is resumed."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"limit must not be negative, got {self.limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a finished run reports."""

    model: str
    """The best checkpoint: a Hugging Face folder."""
    steps: int
    """Taken; fewer than planned where the run ended early."""
    best_step: int
    selection: float
    """The selecting figure at the best step, in percent."""
    scores: dict[str, dict[str, float]]
    """Part → metric → percent, of the best model."""


def run(
    config: FinetuneConfig, *, say: Callable[[str], None] = print
) -> FinetuneResult | list[FinetuneResult]:
    """Returns the result of a run, or those of a sweep.

    Started again after an interruption it continues; started again when finished it says so.
    """
    say = join_hosts(config.train, say)
    with stoppable():
        return _sweep(config, say) if config.sweep.given else _run(config, say)


def _run(config: FinetuneConfig, say: Say) -> FinetuneResult:
    began = time.monotonic()
    task = TASKS[config.task]
    devices = open_devices(config.train, batch_size=config.batch.batch_size)
    source, tokenizer = load(config.model)
    check_length(config.lengths, source)
    skips = Skips()
    examples = _training_examples(config, skips)
    labels = _labels(task, source, examples)
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
    model, params = _start(config, task, source, labels)
    batches = _batches(config, task, tokenizer, examples, labels, skips)
    for line in skips.lines():
        say(f"  {line}")
    training = _Training(
        config,
        model=model,
        params=params,
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
        best = training.run()
        reported = [parts[part] for part in reporting]
        result = _report(config, task, tokenizer, evaluator, reported, best, say)
        if writes():
            write_json(config.output / RESULT, dataclasses.asdict(result))
        wait_for_all("reported")
        _summarise(config, result, say)
        return result


def selection_parts(config: FinetuneConfig) -> list[Part]:
    """Returns what selects the best checkpoint: dev sets, never the split that is reported.

    XNLI: the dev sets of all 15 languages together. MLQA: English dev, the only one zero-shot
    transfer may look at. GLUE and SQuAD report their dev sets, as the papers do.
    """
    dev = Part(split="dev", language=TASKS[config.task].languages[0])
    if config.select_languages:
        return [dataclasses.replace(dev, language=code) for code in config.select_languages]
    return all_languages("xnli", dev) if config.task == "xnli" else [dev]


def report_parts(config: FinetuneConfig) -> list[Part]:
    """Returns what the best model is scored on: what the papers report."""
    if config.report == "none":
        return []
    match config.task:
        case "xnli" | "mlqa":
            return all_languages(config.task, Part(split="test"))
        case "mnli":
            return [Part(split="dev"), Part(split="dev-mm")]
        case "texts" | "questions":
            return [Part(split="dev" if config.data.test is None else "test", language="")]
        case _:
            return [Part(split="dev")]


class _Training:
    """The training, and the evaluations on the way: the best model is written when it is found."""

    def __init__(
        self,
        config: FinetuneConfig,
        *,
        model: Model,
        params: dict[str, Any],
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
        classes = 1
        if self.task.kind == "classes":
            classes = int(np.shape(params["sequence_classifier"]["output"]["bias"])[0])
        task_model = TaskModel(
            model.config,
            self.task.kind,
            classes=classes,
            compute=config.compute,
            head_dropout=head_dropout(model, self.task.kind),
        )
        step = make_step(
            task_model.loss,
            self.optimizer,
            seed=config.train.seed,
            accumulate=config.train.accumulate,
            nonfinite=config.train.nonfinite,
        )
        self.step = devices.lift_step(step)
        self.start = partial(create_state, params, self.optimizer)

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
                    self.step,
                    self.start,
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


def _training_examples(config: FinetuneConfig, skips: Skips) -> list[Any]:
    found: list[Any] = []
    for code in config.train_languages or TASKS[config.task].languages[:1]:
        part = Part(split="train", language=code)
        read: list[Any] = list(
            read_part(config.task, config.data, part, purpose="train", skips=skips)
        )
        found += read[: config.limit or None]
    return found


def _labels(task: Task, model: Model, examples: Sequence[Any]) -> tuple[str, ...]:
    """Returns class names in the order of the outputs: the checkpoint's where it knows them."""
    if task.kind != "classes":
        return ()
    wanted = task.labels or label_names(list(examples), name="the training set")
    known = {label.casefold(): label for label in wanted}
    stored = tuple(known.get(name.casefold(), "") for name in named_labels(model))
    return stored if sorted(stored) == sorted(wanted) else wanted


def _start(
    config: FinetuneConfig, task: Task, source: Model, labels: tuple[str, ...]
) -> tuple[Model, dict[str, Any]]:
    """Returns the model to be written, and the parameters to start from."""
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
    hf_config = {**source.hf_config, "finetuning_task": task.name}
    for name in ("id2label", "label2id", "num_labels", "problem_type"):
        hf_config.pop(name, None)
    if labels:
        hf_config["id2label"] = {str(i): name for i, name in enumerate(labels)}
        hf_config["label2id"] = {name: i for i, name in enumerate(labels)}
        hf_config["problem_type"] = "single_label_classification"
    elif task.kind == "score":
        hf_config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        hf_config["problem_type"] = "regression"
    # What embedded sentences no longer does.
    return dataclasses.replace(source, hf_config=hf_config, params=params, sentence=None), params


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
        _write_rows(config.output, rows)
    return FinetuneResult(
        model=str(folder),
        steps=best["last"],
        best_step=best["step"],
        selection=best["selection"],
        scores=scores,
    )


def _write_rows(output: Path, rows: Sequence[ResultRow]) -> None:
    # A start that was cut off here has written none or all of them.
    (output / RESULTS).unlink(missing_ok=True)
    append_rows(output / RESULTS, rows)
    write_tables(output)


def _summarise(config: FinetuneConfig, result: FinetuneResult, say: Say) -> None:
    say(f"\nbest at step {result.best_step:,} of {result.steps:,}: {result.selection:.2f}")
    for part, scores in result.scores.items():
        say(f"  {part:<12} {describe_scores(scores)}")
    say(f"model   {result.model}  (a Hugging Face folder: loads in transformers)")
    say(f"tables  {config.output / 'tables.md'}")


# Sweeps


def _sweep(config: FinetuneConfig, say: Say) -> list[FinetuneResult]:
    """Returns every run's result, after writing results.csv, tables.md and sweep.json.

    The best setting is that of the best mean of the selecting figure; the tables show its seeds
    as mean ± standard deviation.
    """
    results: list[FinetuneResult] = []
    rows: list[ResultRow] = []
    settings: list[dict[str, Any]] = []
    began = time.monotonic()
    # All of them made before the first one runs: a value that cannot be is refused at once.
    for (rate, passes), configs in sweep_runs(config).items():
        found = []
        for inner in configs:
            say(f"\n{inner.output.name}")
            result = _run(inner, say)
            found.append(result)
            rows += read_rows(inner.output / RESULTS)
        values = [result.selection for result in found]
        settings.append(
            {
                "learning_rate": rate,
                "epochs": passes,
                "seeds": [inner.train.seed for inner in configs],
                "selection": values,
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "models": [result.model for result in found],
            }
        )
        results += found
    best = max(settings, key=lambda setting: setting["mean"])
    if writes():
        write_json(config.output / "sweep.json", {"settings": settings, "best": best})
        _write_rows(config.output, rows)
    metric = TASKS[config.task].metrics[0]
    seconds = time.monotonic() - began
    say(f"\n{len(results)} runs in {seconds:.0f} s; {metric} on the selection parts")
    for setting in settings:
        mark = "  best" if setting is best else ""
        say(
            f"  lr {setting['learning_rate']}  epochs {setting['epochs']}  "
            f"{mean_and_deviation(setting['selection'])}{mark}"
        )
    return results


def sweep_runs(config: FinetuneConfig) -> dict[tuple[float, int], list[FinetuneConfig]]:
    """Returns the runs of a sweep, one a seed, by learning rate and epochs."""
    sweep, name = config.sweep, config.name or config.output.name
    rates = sweep.learning_rates or (config.optimizer.learning_rate,)
    epochs = sweep.epochs or (config.schedule.epochs,)
    return {
        (rate, passes): [
            dataclasses.replace(
                config,
                # Every digit of the rate: what is close by is still another run.
                output=config.output / f"lr{rate}-epochs{passes}-seed{seed}",
                name=f"{name} lr {rate}, {passes} epochs",
                optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
                schedule=dataclasses.replace(config.schedule, epochs=passes),
                train=dataclasses.replace(config.train, seed=seed),
                sweep=SweepConfig(),
            )
            for seed in sweep.seeds or (config.train.seed,)
        ]
        for rate, passes in itertools.product(rates, epochs)
    }
