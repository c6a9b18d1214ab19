"""The evaluation job: checkpoints and a task in; predictions, a CSV row a figure, tables out."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from minilm_jax.convert.model import Model
from minilm_jax.differences import differences
from minilm_jax.encoder.config import Compute
from minilm_jax.errors import ConfigError
from minilm_jax.jobs.evaluator import Evaluator, describe_scores, report_skips
from minilm_jax.jobs.results import PREDICTIONS, RESULTS, TABLES, result_rows, write_tables
from minilm_jax.jobs.trained_model import check_length, load, model_labels
from minilm_jax.settings import Count, Settings, check, check_distinct
from minilm_jax.signals import stoppable
from minilm_jax.tasks.answers import AnswerConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TASKS, Part, Task, TaskData, TaskName, all_pairs
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.tasks.tables import ResultRow, append_rows, read_rows
from minilm_jax.train.devices import Devices, Lift
from minilm_jax.train.hardware import memory_explained
from minilm_jax.train.run_folder import CONFIG, METRICS, read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Settings):
    """One evaluation of one or several checkpoints on one task."""

    task: TaskName
    """GLUE's nine, squad1, squad2, xnli, mlqa; texts and questions are your own data."""
    models: tuple[str, ...]
    """Hugging Face folders, Hub ids, or folders of fine-tuning runs, whose best model is taken."""
    data: TaskData
    output: Path
    """Gets predictions/, results.csv (added to) and tables.md."""
    name: str = ""
    """What tables call the model; "" is the end of its path, as long as tells several models
    apart. Evaluations of one name and several tasks share a row."""
    splits: tuple[str, ...] = ("dev",)
    """dev, test; also dev-mm, test-mm and ax of MNLI."""
    languages: tuple[str, ...] = ()
    """Languages to evaluate; none given: all of the task, or own data as a whole. Own data has
    its language in a column or key `language`, en where there is none."""
    pairs: Literal["same", "all"] = "same"
    """MLQA: question in the context's language (XLT), or all 49 pairs (G-XLT)."""
    labels: tuple[str, ...] = ()
    """The model's class names in the order of its outputs, where its config has none."""
    lengths: LengthConfig = dataclasses.field(default_factory=LengthConfig)
    answers: AnswerConfig = dataclasses.field(default_factory=AnswerConfig)
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


@stoppable()
@memory_explained("try a smaller --batch.batch-size")
def run(config: EvaluateConfig, *, say: Callable[[str], None] = print) -> list[ResultRow]:
    """Returns the figures measured, after writing predictions, results.csv and tables.md."""
    check("config", config, EvaluateConfig)
    names = model_names(config)
    check_output(config.output)
    task = TASKS[config.task]
    devices = Devices(config.lift)
    devices.check_batch(config.batch.batch_size)
    rows: list[ResultRow] = []
    asked = parts(config)
    for source, name in zip(config.models, names, strict=True):
        model, tokenizer = load(source)
        check_name(name, task, model, config.output / RESULTS)
        check_length(config.lengths, model)
        _tell_other_lengths(config, model, say)
        labels = model_labels(task, model, config.labels)
        evaluator = Evaluator(
            task,
            model,
            tokenizer,
            labels=labels,
            devices=devices,
            lengths=config.lengths,
            answers=config.answers,
            batch=config.batch,
            compute=config.compute,
        )
        folder = config.output / PREDICTIONS / _as_folder(name)
        # All of them before the first is scored: a missing file must not come to light after it.
        for data in [evaluator.read(config.data, part, limit=config.limit) for part in asked]:
            report_skips(data, say)
            result = evaluator.score(model.params, data)
            evaluator.write(result, folder)
            found = result_rows(
                result, name=name, task=task, model=model, tokenizer=tokenizer, settings=config
            )
            append_rows(config.output / RESULTS, found)
            rows += found
            say(f"{name}  {task.name} {data.part}  {describe_scores(result.scores)}")
    write_tables(config.output)
    say(f"\npredictions  {config.output / PREDICTIONS}\nresults      {config.output / RESULTS}")
    say(f"tables       {config.output / TABLES}")
    return rows


def _tell_other_lengths(config: EvaluateConfig, model: Model, say: Callable[[str], None]) -> None:
    """Says where a run of ours was fine-tuned with other lengths: its own score was another."""
    run = model.folder and model.folder.parent
    if run is None or not ((run / METRICS).is_file() and (run / CONFIG).is_file()):
        return
    before = read_json(run / CONFIG).get("lengths")
    if not isinstance(before, dict):
        return
    changed = differences(before, dataclasses.asdict(config.lengths), "lengths")
    if changed:
        lines = "; ".join(line for _, line in changed)
        say(f"note: {run} was fine-tuned with other lengths ({lines}); give it its own to compare")


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


def check_name(name: str, task: Task, model: Model, results: Path) -> None:
    """Raises ConfigError where a file of results has figures of another model by this name.

    Tables would show one of them for the other. The same folder, trained again, is no other model.
    """
    for row in read_rows(results) if results.exists() else ():
        same = model.source == row.model or model.fingerprint == row.model_sha256
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
