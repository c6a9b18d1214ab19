"""The evaluation job: checkpoints and a task in; predictions, a CSV row a figure, tables out."""

import dataclasses
import datetime
import functools
import hashlib
import json
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from minilm_jax import __version__
from minilm_jax.convert.folder import read_model
from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer, load_tokenizer
from minilm_jax.encoder.config import Compute
from minilm_jax.errors import ConfigError
from minilm_jax.jobs.running import BEST, STUDENT, jsonable
from minilm_jax.signals import stoppable
from minilm_jax.tasks.answers import AnswerConfig, Prediction, answer
from minilm_jax.tasks.batches import RowConfig, TaskBatches
from minilm_jax.tasks.catalog import TASKS, Part, Task, TaskData, TaskName, all_pairs, read_part
from minilm_jax.tasks.examples import QuestionExample, Skips, TextExample
from minilm_jax.tasks.features import Feature, LengthConfig, question_features, text_features
from minilm_jax.tasks.losses import TaskModel
from minilm_jax.tasks.scoring import score_questions, score_texts
from minilm_jax.tasks.submissions import write_questions, write_texts
from minilm_jax.tasks.tables import ResultRow, append_rows, read_rows, tables
from minilm_jax.train.devices import Devices

RESULTS, TABLES, PREDICTIONS = "results.csv", "tables.md", "predictions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
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
    lift: Literal["pmap", "mesh"] = "pmap"
    """pmap: data parallel. mesh: jit over the devices."""
    limit: int = 0
    """Examples of each part at most, to try things; 0 is all."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"limit must not be negative, got {self.limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartData:
    """One part of a task, ready to be scored."""

    part: Part
    examples: Sequence[TextExample] | Sequence[QuestionExample]
    skips: Skips
    sha256: str
    tokenize: Callable[[], list[Feature]]

    @functools.cached_property
    def features(self) -> list[Feature]:
        """The examples as rows, made when first needed: a finished run never needs them."""
        return self.tokenize()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartResult:
    """What a model made of a part."""

    data: PartData
    scores: dict[str, float]
    """In percent; empty where the labels are hidden."""
    texts: list[str | float] = dataclasses.field(default_factory=list)
    """Of classification: the class names, or the scores."""
    questions: dict[str, Prediction] = dataclasses.field(default_factory=dict)


@stoppable()
def run(config: EvaluateConfig, *, say: Callable[[str], None] = print) -> list[ResultRow]:
    """Returns the figures measured, after writing predictions, results.csv and tables.md."""
    names = model_names(config)
    check_output(config.output)
    task = TASKS[config.task]
    devices = Devices(config.lift)
    devices.check_batch(config.batch.batch_size)
    rows: list[ResultRow] = []
    for source, name in zip(config.models, names, strict=True):
        model, tokenizer = load(source)
        check_name(name, task, model, config.output / RESULTS)
        check_length(config.lengths, model)
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
        for part in parts(config):
            data = evaluator.read(config.data, part, limit=config.limit)
            report_skips(data, say)
            result = evaluator.score(model.params, data)
            evaluator.write(result, folder)
            found = result_rows(
                result, name=name, task=task, model=model, tokenizer=tokenizer, settings=config
            )
            append_rows(config.output / RESULTS, found)
            rows += found
            say(f"{name}  {task.name} {part}  {describe_scores(result.scores)}")
    write_tables(config.output)
    say(f"\npredictions  {config.output / PREDICTIONS}\nresults      {config.output / RESULTS}")
    say(f"tables       {config.output / TABLES}")
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
                f"name={config.name} cannot stand for {len(config.models)} models: evaluate each "
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
    """Makes the folder of an evaluation; ConfigError where nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise ConfigError(
            f"output {folder} is a file, not a folder; choose another --output"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"output {folder} cannot be written to ({error.strerror}); choose another --output"
        ) from None


def load(source: str) -> tuple[Model, Tokenizer]:
    """Returns a model and its tokenizer.

    Args:
      source: a Hugging Face folder, a Hub id, or the folder of one of our runs, which stands for
        its best model or its student.
    """
    for inner in (BEST, STUDENT):
        if (Path(source) / inner / "config.json").is_file():
            source = str(Path(source) / inner)
    model = read_model(source)
    if model.tokenizer_folder is None:
        raise ConfigError(f"model {source} has no tokenizer files; copy them into its folder")
    return model, load_tokenizer(model.tokenizer_folder, vocab_size=model.config.vocab_size)


def check_length(lengths: LengthConfig, model: Model) -> None:
    """Raises ConfigError where rows would be longer than the model's positions."""
    if lengths.max_length > model.config.max_length:
        raise ConfigError(
            f"lengths.max_length={lengths.max_length} is longer than the model's "
            f"{model.config.max_length} positions"
        )


def model_labels(task: Task, model: Model, given: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the model's class names, spelled as the task does, in the order of its outputs.

    Names decide, never integers: the same three classes stand in three orders in published
    checkpoints.

    Raises:
      ConfigError: the model has no head for the task, or its names are not the task's.
    """
    head = "span" if task.kind == "span" else "sequence_classifier"
    if head not in model.params:
        raise ConfigError(
            f"model {model.source} has no {head.replace('_', ' ')}; fine-tune it on {task.name}"
        )
    if task.kind != "classes":
        return ()
    outputs = int(np.shape(model.params[head]["output"]["bias"])[0])
    named = given or named_labels(model)
    if given and len(given) != outputs:
        raise ConfigError(f"labels: {len(given)} names given for the model's {outputs} classes")
    if not task.labels:
        return named
    known = {label.casefold(): label for label in task.labels}
    matched = tuple(known.get(name.casefold(), "") for name in named)
    if sorted(matched) != sorted(task.labels):
        raise ConfigError(
            f"model {model.source} calls its classes {', '.join(named) or 'nothing'}; {task.name} "
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


class Evaluator:
    """Scores parameters of one model on parts of one task."""

    def __init__(
        self,
        task: Task,
        model: Model,
        tokenizer: Tokenizer,
        *,
        labels: tuple[str, ...],
        devices: Devices,
        lengths: LengthConfig,
        answers: AnswerConfig,
        batch: RowConfig,
        compute: Compute,
    ) -> None:
        """Compiles nothing yet; every part shares the programs."""
        self._task, self._tokenizer, self._labels = task, tokenizer, labels
        self._devices, self._lengths, self._answers, self._batch = devices, lengths, answers, batch
        classes = len(labels) if task.kind == "classes" else 1
        logits = TaskModel(model.config, task.kind, classes=classes, compute=compute).logits

        def predict(params: Any, frozen: Any, batch: Any, axis: str | None = None) -> Any:
            del frozen
            found = logits(params, batch)
            # Every device gets all rows: then they leave in the batch's order under both lifts.
            return jax.lax.all_gather(found, axis, tiled=True) if axis else found

        self._predict = devices.lift_evaluation(predict)

    def read(self, data: TaskData, part: Part, *, limit: int = 0) -> PartData:
        """Returns a part's examples, which become rows when they are needed."""
        skips = Skips()
        labels = self._labels if self._task.name == "texts" else None
        examples: Sequence[Any] = read_part(
            self._task.name, data, part, purpose="evaluate", skips=skips, labels=labels
        )
        examples = examples[: limit or None]

        def tokenize() -> list[Feature]:
            if self._task.kind == "span":
                return question_features(
                    examples, self._tokenizer, config=self._lengths, purpose="evaluate", skips=skips
                )
            hidden = [dataclasses.replace(example, label=None) for example in examples]
            return text_features(hidden, self._tokenizer, config=self._lengths)

        return PartData(
            part=part, examples=examples, skips=skips, sha256=digest(examples), tokenize=tokenize
        )

    def logits(self, params: Any, features: list[Feature]) -> list[np.ndarray]:
        """Returns each row's logits, in the rows' order, whatever the devices and the layout."""
        batches = TaskBatches(
            features,
            config=self._batch,
            max_length=self._lengths.max_length,
            pad_id=self._tokenizer.pad_id,
        )
        placed = self._devices.place(params)
        found: list[np.ndarray] = [np.empty(0)] * len(features)

        def keep(index: np.ndarray, out: Any) -> None:
            for row, logits in zip(index, self._devices.fetch(out), strict=False):
                found[row] = logits

        before: tuple[np.ndarray, Any] | None = None
        mine = self._devices.rows(self._batch.batch_size)
        for index, batch in batches.in_order():
            rows = {name: x[mine] for name, x in batch.items()}
            out = self._predict(placed, None, self._devices.place_batch(rows))
            # One batch behind: the devices compute while the last one is fetched.
            if before is not None:
                keep(*before)
            before = index, out
        if before is not None:
            keep(*before)
        return found

    def score(self, params: Any, data: PartData) -> PartResult:
        """Returns predictions and official figures of a part.

        Args:
          params: the encoder's and the head's.
          data: made by `read`.
        """
        head = "span" if self._task.kind == "span" else "sequence_classifier"
        params = {name: params[name] for name in ("encoder", head)}
        logits = self.logits(params, data.features)
        if self._task.kind == "span":
            return self._score_questions(data, logits)
        predicted: list[str | float] = [
            float(row[0]) if self._task.kind == "score" else self._labels[int(row.argmax())]
            for row in logits
        ]
        examples = cast(Sequence[TextExample], data.examples)
        return PartResult(
            data=data, scores=score_texts(self._task, examples, predicted), texts=predicted
        )

    def _score_questions(self, data: PartData, logits: list[np.ndarray]) -> PartResult:
        examples = cast(Sequence[QuestionExample], data.examples)
        windows: dict[int, list[int]] = {}
        for row, feature in enumerate(data.features):
            windows.setdefault(feature.example, []).append(row)
        predicted = {
            examples[index].id: answer(
                examples[index].context,
                [data.features[row] for row in found],
                [logits[row][0] for row in found],
                [logits[row][1] for row in found],
                config=self._answers,
                no_answer=self._task.no_answer,
            )
            for index, found in windows.items()
        }
        scores = score_questions(self._task, examples, predicted)
        return PartResult(data=data, scores=scores, questions=predicted)

    def write(self, result: PartResult, folder: Path) -> Path:
        """Returns the file of predictions in the official format."""
        part = result.data.part
        if self._task.kind == "span":
            return write_questions(folder, self._task, part, result.questions)
        examples = cast(Sequence[TextExample], result.data.examples)
        return write_texts(folder, self._task, part, examples, result.texts)


def report_skips(data: PartData, say: Callable[[str], None]) -> None:
    """Says what was left out, if anything was."""
    for line in data.skips.lines():
        say(f"  {line}")


def describe_scores(scores: Mapping[str, float]) -> str:
    """Returns "accuracy 84.3  f1 88.1"."""
    shown = [f"{name} {value:.1f}" for name, value in scores.items()]
    return "  ".join(shown) or "no labels: predictions written"


def digest(examples: Sequence[Any]) -> str:
    """Returns SHA-256 of what the examples say, wherever they were read from."""
    found = hashlib.sha256()
    for example in examples:
        content = dataclasses.asdict(example)
        content.pop("origin")
        found.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def result_rows(
    result: PartResult,
    *,
    name: str,
    task: Task,
    model: Model,
    tokenizer: Tokenizer,
    settings: Any,
    seed: str = "",
) -> list[ResultRow]:
    """Returns a row a figure, with what is needed to measure it again."""
    part, data = result.data.part, result.data
    devices = jax.devices()
    crossed = part.question_language not in ("", part.language)
    return [
        ResultRow(
            name=name,
            task=task.name,
            split=part.split,
            language=part.language,
            question_language=part.question_language if crossed else "",
            metric=metric,
            value=value,
            examples=len(data.examples),
            skipped=sum(data.skips.counts.values()),
            seed=seed,
            model=model.source,
            model_sha256=model.fingerprint,
            tokenizer_sha256=tokenizer.fingerprint,
            data_sha256=data.sha256,
            settings=json.dumps(jsonable(dataclasses.asdict(settings))),
            versions=(
                f"minilm_jax {__version__}, jax {jax.__version__}, Python "
                f"{platform.python_version()}, {len(devices)} × {devices[0].device_kind}"
            ),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        for metric, value in result.scores.items()
    ]


def write_results(folder: Path, rows: Sequence[ResultRow]) -> None:
    """Writes results.csv and tables.md of these rows alone.

    A start that was cut off here has written none or all of them.
    """
    (folder / RESULTS).unlink(missing_ok=True)
    append_rows(folder / RESULTS, rows)
    write_tables(folder)


def write_tables(folder: Path) -> None:
    """Writes tables.md of everything in results.csv, the published rows beside ours."""
    if (folder / RESULTS).exists():
        (folder / TABLES).write_text(tables(read_rows(folder / RESULTS)), "utf-8")
