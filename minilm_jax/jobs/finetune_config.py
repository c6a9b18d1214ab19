"""The settings of a fine-tuning run or a sweep of them, and what a run reports."""

import dataclasses
from pathlib import Path
from typing import Literal

from minilm_jax.encoder.config import Compute
from minilm_jax.errors import ConfigError
from minilm_jax.settings import Count, Positive, Rate, Settings, Weight, check_distinct
from minilm_jax.tasks.answers import AnswerConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TASKS, Part, TaskData, TaskName, all_languages
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings, name="schedule"):
    """How long a run trains, and what it looks at on the way."""

    epochs: Positive = 3
    """Passes over the training set."""
    max_steps: Count = 0
    """Steps in all, whatever the epochs; 0: the epochs decide."""
    warmup_ratio: Rate = 0.0
    """Share of the steps that warms up; 0: optimizer.warmup_steps decide."""
    evaluate_every: Count = 0
    """Steps between evaluations on the selection parts; 0: an epoch."""
    patience: Count = 0
    """Evaluations without improvement after which the run ends; 0: never."""
    keep_models: Literal["best", "all"] = "best"
    """all: each evaluated checkpoint is kept as a model, too (step-…)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings, name="sweep"):
    """Values to try in all combinations; what is not given stays as the run has it."""

    learning_rates: tuple[Weight, ...] = ()
    epochs: tuple[Positive, ...] = ()
    seeds: tuple[Count, ...] = ()
    """Figures of one learning rate and number of epochs become mean ± standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in vars(self).items():
            check_distinct(f"sweep.{name}", values, each="each is one run: ")

    @property
    def given(self) -> bool:
        """Whether there is anything to sweep."""
        return bool(self.learning_rates or self.epochs or self.seeds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
    """One fine-tuning run, or a sweep of them."""

    task: TaskName
    """GLUE's nine, squad1, squad2, xnli, mlqa; your own data: texts
    (classes), scores (numbers), questions."""
    model: str
    """A Hugging Face folder or a Hub id: the encoder to start from, with its tokenizer."""
    init: Literal["checkpoint", "random"] = "checkpoint"
    """random draws every weight anew: the baseline that shows what the checkpoint is worth."""
    data: TaskData
    output: Path
    """The run's folder: config, metrics, evaluations, checkpoints, the best model, tables."""
    train_languages: tuple[str, ...] = ()
    """none given: English, or all rows of own data. XNLI: English alone is
    zero-shot transfer; several are translate-train."""
    select_languages: tuple[str, ...] = ()
    """Dev sets that select checkpoints; none given: the task's own rule
    (XNLI: all 15 together, MLQA: English; own data: all rows)."""
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
    limit: Count = 0
    """Examples of each part at most, to try things; 0 is all."""
    override: tuple[str, ...] = ()
    """Dotted names of settings that may differ from the run that is resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct("train_languages", self.train_languages)
        check_distinct("select_languages", self.select_languages)
        if self.sweep.epochs and self.schedule.max_steps:
            raise ConfigError(
                f"sweep.epochs changes nothing beside schedule.max_steps={self.schedule.max_steps},"
                " which ends every run; leave one of them out (--schedule.max-steps 0)"
            )


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
        case "texts" | "scores" | "questions":
            return [Part(split="dev" if config.data.test is None else "test", language="")]
        case _:
            return [Part(split="dev")]
