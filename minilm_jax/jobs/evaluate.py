"""The evaluation job: checkpoints and a task in; predictions, a CSV row a figure, tables out."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.encoder.config import Compute
from minilm_jax.errors import ConfigError
from minilm_jax.jobs.evaluator import Evaluator, PartData, describe_scores, report_skips
from minilm_jax.jobs.results import PREDICTIONS, RESULTS, TABLES, result_rows, write_tables
from minilm_jax.jobs.trained_model import check_length, load, model_labels, own_settings
from minilm_jax.settings import Count, Settings, check, check_distinct, over
from minilm_jax.tasks.answers import AnswerOptions
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TASKS, Part, Task, TaskData, TaskName, all_pairs
from minilm_jax.tasks.features import LengthOptions
from minilm_jax.tasks.tables import ResultRow, append_rows, read_rows
from minilm_jax.train.devices import Devices, Lift
from minilm_jax.train.hardware import memory_explained


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """One evaluation of one or several checkpoints on one task."""

    task: TaskName
    """GLUE's nine, squad1, squad2, xnli, mlqa; your own data: texts
    (classes), scores (numbers), questions."""
    models: tuple[str, ...]
    """Hugging Face folders, Hub ids, or folders of fine-tuning runs, whose best model is taken."""
    data: TaskData
    output: Path
    """Gets predictions/, results.csv (added to) and tables.md."""
    name: str = ""
    """What tables call the model; "" is the end of its path, as long as
    tells several models apart. Evaluations of one name and several tasks
    share a row."""
    splits: tuple[str, ...] = ("dev",)
    """dev, test; also dev-mm, test-mm and ax of MNLI."""
    languages: tuple[str, ...] = ()
    """Languages to evaluate; none given: all of the task, or own data as a
    whole. Own data has its language in a column or key `language`, en
    where there is none."""
    pairs: Literal["same", "all"] = "same"
    """MLQA: question in the context's language (XLT), or all 49 pairs (G-XLT)."""
    labels: tuple[str, ...] = ()
    """The model's class names in the order of its outputs, where its config has none."""
    lengths: LengthOptions = dataclasses.field(default_factory=LengthOptions)
    answers: AnswerOptions = dataclasses.field(default_factory=AnswerOptions)
    batch: RowConfig = dataclasses.field(default_factory=RowConfig)
    compute: Compute = dataclasses.field(default_factory=Compute)
    lift: Lift = "pmap"
    """pmap: data parallel. mesh: jit over the devices."""
    limit: Count = 0
    """Examples of each part at most, to try things; 0 is all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct("splits", self.splits)
        check_distinct("languages", self.languages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """A model and all that it is to be scored on."""

    config: EvaluateConfig
    """With the model's own settings where the evaluation has none."""
    name: str
    model: Model
    tokenizer: Tokenizer
    evaluator: Evaluator
    parts: list[PartData]


@memory_explained("try a smaller --batch.batch-size")
def run(config: EvaluateConfig, *, say: Callable[[str], None] = print) -> list[ResultRow]:
    """Returns the figures measured, after writing predictions, results.csv and tables.md."""
    check("config", config, EvaluateConfig)
    models = list(zip(config.models, model_names(config), strict=True))
    check_output(config.output)
    devices = Devices(config.lift)
    devices.check_batch(config.batch.batch_size)
    if len(models) > 1:
        # What would be refused must not come to light after hours of the others. All of them are
        # read twice, where all at once might not fit.
        for source, name in models:
            _open(config, source, name, devices)
    rows: list[ResultRow] = []
    for source, name in models:
        rows += _score(_open(config, source, name, devices), say)
        write_tables(config.output)
    say(f"\npredictions  {config.output / PREDICTIONS}\nresults      {config.output / RESULTS}")
    say(f"tables       {config.output / TABLES}")
    return rows


def _open(config: EvaluateConfig, source: str, name: str, devices: Devices) -> _Scored:
    """Returns a model with the parts read; ConfigError or DataError where they do not fit."""
    task = TASKS[config.task]
    model, tokenizer = load(source)
    check_name(name, task, model, config.output / RESULTS, source=source)
    labels = model_labels(task, model, config.labels)
    lengths, answers = own_settings(task, model)
    lengths, answers = over(lengths, config.lengths), over(answers, config.answers)
    check_length(lengths, model)
    evaluator = Evaluator(
        task,
        model,
        tokenizer,
        labels=labels,
        devices=devices,
        lengths=lengths,
        answers=answers,
        batch=config.batch,
        compute=config.compute,
    )
    return _Scored(
        config=dataclasses.replace(
            config,
            lengths=LengthOptions(**vars(lengths)),
            answers=AnswerOptions(**vars(answers)),
        ),
        name=name,
        model=model,
        tokenizer=tokenizer,
        evaluator=evaluator,
        # All of them before the first is scored: a missing file must not come to light after it.
        parts=[evaluator.read(config.data, part, limit=config.limit) for part in parts(config)],
    )


def _score(scored: _Scored, say: Callable[[str], None]) -> list[ResultRow]:
    """Returns a model's figures, after writing them and its predictions."""
    config, model, task = scored.config, scored.model, TASKS[scored.config.task]
    rows: list[ResultRow] = []
    for data in scored.parts:
        report_skips(data, say)
        result = scored.evaluator.score(model.params, data)
        scored.evaluator.write(result, config.output / PREDICTIONS / _as_folder(scored.name))
        found = result_rows(
            result,
            name=scored.name,
            task=task,
            model=model,
            tokenizer=scored.tokenizer,
            settings=config,
        )
        append_rows(config.output / RESULTS, found)
        rows += found
        say(f"{scored.name}  {task.name} {data.part}  {describe_scores(result.scores)}")
    return rows


def parts(config: EvaluateConfig) -> list[Part]:
    """Returns the parts an evaluation is asked for."""
    if config.pairs == "all":
        if config.task != "mlqa":
            raise ConfigError(f"pairs=all needs task mlqa, not {config.task}")
        pairs = [pair for split in config.splits for pair in all_pairs(Part(split=split))]
        chosen = config.languages or TASKS["mlqa"].languages
        return [p for p in pairs if p.language in chosen and p.question_language in chosen]
    languages = config.languages or TASKS[config.task].languages
    return [Part(split=split, language=code) for split in config.splits for code in languages]


def model_names(config: EvaluateConfig) -> list[str]:
    """Returns what tables and folders of predictions call the models, each by a name of its own.

    Raises:
      ConfigError: there is no model, one stands there twice, or several would share `name`.
    """
    if not config.models:
        raise ConfigError("models: give at least one")
    if config.name:
        if len(config.models) > 1:
            raise ConfigError(
                f"name={config.name} cannot name {len(config.models)} models: evaluate each "
                "by itself, or leave the name out"
            )
        return [config.name]
    paths = [Path(source) for source in config.models]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-depth:]).as_posix() for path in paths]
        if len(set(map(_as_folder, names))) == len(names):
            return names
    raise ConfigError(f"models: {', '.join(config.models)} holds a model twice; give each once")


def _as_folder(name: str) -> str:
    return name.replace("/", "_")


def check_name(name: str, task: Task, model: Model, results: Path, *, source: str) -> None:
    """Raises ConfigError where a file of results has figures of another model by this name.

    Tables would show one of them for the other. The same folder, trained again, is no other model,
    nor is the best of a sweep that has grown.

    Args:
      name: what tables are to call the model.
      task: it is scored on.
      model: to be scored.
      results: the file, which need not be there.
      source: what the user calls the model.
    """
    for row in read_rows(results) if results.exists() else ():
        same = model.fingerprint == row.model_sha256 or Path(row.model).is_relative_to(source)
        if (row.name, row.task) == (name, task.name) and not same:
            raise ConfigError(
                f"{results} calls {row.model} {name!r} on {task.name}, so {model.source} needs "
                "another name: give --name, or another output"
            )


def check_output(folder: Path) -> None:
    """Raises ConfigError where nothing can be written into a folder, or it cannot be made."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise ConfigError(
                f"output {folder}: {there} is a file, not a folder; choose another --output"
            )
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"output {folder} cannot be written to ({error.strerror}); choose another --output"
        ) from None
