"""The tasks by name: their kind, metrics, splits and languages, and one way to read any of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from minilm_jax.errors import ConfigError, DataError
from minilm_jax.settings import Settings
from minilm_jax.tasks.examples import QuestionExample, Skips, TextExample
from minilm_jax.tasks.files import listed_beside
from minilm_jax.tasks.glue import GLUE, GlueName, read_glue
from minilm_jax.tasks.languages import MLQA_LANGUAGES, XNLI_LANGUAGES
from minilm_jax.tasks.mlqa import read_mlqa
from minilm_jax.tasks.own import read_questions, read_scores, read_texts
from minilm_jax.tasks.squad import read_squad
from minilm_jax.tasks.tfds_source import glue_examples, question_examples, xnli_examples
from minilm_jax.tasks.xnli import read_xnli, read_xnli_train

TaskName = Literal[
    "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli",
    "squad1", "squad2", "xnli", "mlqa", "texts", "scores", "questions",
]  # fmt: skip
Kind = Literal["classes", "score", "span"]
OWN = ("texts", "scores", "questions")
"""The tasks of a user's own files."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the jobs need to know of a task beside its examples."""

    name: TaskName
    kind: Kind
    """classes and score put a classifier on the encoder, span a pair of start and end logits."""
    labels: tuple[str, ...] = ()
    """Class names in the order of a new classifier's outputs; () where the data decides."""
    metrics: tuple[str, ...]
    """The first one selects checkpoints."""
    languages: tuple[str, ...] = ("en",)
    """The first one is trained and selected on where nothing else is said; "" of own data."""
    trains_on: tuple[str, ...] = ()
    """Languages that there is a training set in, where that is not all of them."""
    no_answer: Literal["possible", "impossible"] = "impossible"
    """Whether a question may have no answer."""


def _task(name: TaskName) -> Task:
    match name:
        case "squad1":
            return Task(name=name, kind="span", metrics=("f1", "exact"))
        case "mlqa":
            # Its training set is SQuAD's.
            return replace(_task("squad1"), name=name, languages=MLQA_LANGUAGES, trains_on=("en",))
        case "squad2":
            return Task(name=name, kind="span", metrics=("f1", "exact"), no_answer="possible")
        case "xnli":
            return Task(
                name=name,
                kind="classes",
                labels=tuple(GLUE["mnli"].labels.values()),
                metrics=("accuracy",),
                languages=XNLI_LANGUAGES,
            )
        case "texts":
            metrics = ("accuracy", "macro_f1")
            return Task(name=name, kind="classes", metrics=metrics, languages=("",))
        case "scores":
            metrics = ("pearson", "spearman")
            return Task(name=name, kind="score", metrics=metrics, languages=("",))
        case "questions":
            return replace(_task("squad2"), name=name, languages=("",))
        case _:
            spec = GLUE[name]
            kind: Kind = "classes" if spec.labels else "score"
            labels = tuple(spec.labels.values())
            return Task(name=name, kind=kind, labels=labels, metrics=spec.metrics)


TASKS: dict[TaskName, Task] = {name: _task(name) for name in get_args(TaskName)}


@dataclass(frozen=True, kw_only=True)
class TaskData(Settings, name="data"):
    """Where a task's examples come from: give one of `folder`, `tfds`, or files of your own."""

    folder: Path | None = None
    """Official files, as downloaded: GLUE's tsv, SQuAD's json, XNLI-1.0 and
    XNLI-MT-1.0, MLQA_V1."""
    tfds: Path | None = None
    """A data_dir of tensorflow-datasets in which the task's builder is prepared."""
    train: Path | None = None
    """Own training data (tasks texts, scores, questions): .tsv, .csv, .jsonl, SQuAD's .json."""
    dev: Path | None = None
    """Own data to select checkpoints on."""
    test: Path | None = None
    """Own data to report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = [name for name in ("train", "dev", "test") if getattr(self, name) is not None]
        given = [name for name in ("folder", "tfds") if getattr(self, name) is not None]
        if len(given) + bool(own) != 1:
            said = ", ".join([*given, *own]) or "none"
            raise ConfigError(
                f"data: give one of folder, tfds, or own files (train, dev, test); given: {said}"
            )


@dataclass(frozen=True, kw_only=True, order=True)
class Part:
    """One set of examples that is scored by itself."""

    split: str
    """train, dev, test; dev-mm, test-mm and ax of MNLI."""
    language: str = "en"
    """Of the text, or of the contexts; "" is every row of own data, whatever its language."""
    question_language: str = ""
    """Of the questions where it is another one; "" is the same."""

    def __str__(self) -> str:
        if self.question_language not in ("", self.language):
            return f"{self.split}-{self.language}-{self.question_language}"
        return f"{self.split}-{self.language}" if self.language else self.split


Split = TypeVar("Split", bound=str)
_SQUAD_FILES = {"squad1": "{}-v1.1.json", "squad2": "{}-v2.0.json", "mlqa": "{}-v1.1.json"}


def read_part(
    task: TaskName,
    data: TaskData,
    part: Part,
    *,
    purpose: Literal["train", "evaluate"],
    skips: Skips,
    labels: tuple[str, ...] | None = None,
) -> list[TextExample] | list[QuestionExample]:
    """Returns the examples of one part of a task.

    Args:
      task: which one.
      data: where its examples lie.
      part: which of them.
      purpose: training refuses or skips what cannot be learnt from.
      skips: where skipped examples are counted.
      labels: the classes of task texts, once they are known.
    """
    spoken = part.question_language or part.language
    _check_language(task, part)
    hidden = purpose == "evaluate" and part.split == "test"
    if task == "texts":
        file = _own(task, data, part)
        return read_texts(file, labels=labels, hidden=hidden, language=part.language)
    if task == "scores":
        return read_scores(_own(task, data, part), hidden=hidden, language=part.language)
    if task == "questions":
        file = _own(task, data, part)
        return read_questions(
            file, purpose=purpose, skips=skips, hidden=hidden, language=part.language
        )
    if data.tfds is not None:
        return _read_tfds(task, data.tfds, part, purpose=purpose, skips=skips)
    if data.folder is None:
        raise ConfigError(
            f"task {task} needs data.folder or data.tfds; own files go with texts "
            "(classes), scores (numbers) and questions"
        )
    match task:
        case "xnli":
            if part.split == "train":
                return read_xnli_train(data.folder, language=part.language)
            return read_xnli(
                data.folder,
                split=_one_of(task, part.split, ("dev", "test")),
                language=part.language,
                skips=skips,
            )
        case "mlqa" if part.split != "train":
            return read_mlqa(
                data.folder,
                split=_one_of(task, part.split, ("dev", "test")),
                language=part.language,
                question_language=spoken,
                skips=skips,
            )
        case "squad1" | "squad2" | "mlqa":
            name = _one_of(task, part.split, ("train", "dev"))
            return read_squad(
                data.folder / _SQUAD_FILES[task].format(name),
                purpose=purpose,
                version="2.0" if task == "squad2" else "1.1",
                skips=skips,
            )
        case _:
            return read_glue(data.folder, task=task, split=part.split, skips=skips)


def all_languages(task: TaskName, part: Part) -> list[Part]:
    """Returns the part in each language of the task."""
    return [replace(part, language=code) for code in TASKS[task].languages]


def all_pairs(part: Part) -> list[Part]:
    """Returns MLQA's 49 pairs of context and question language: G-XLT."""
    return [
        replace(part, language=context, question_language=question)
        for context in MLQA_LANGUAGES
        for question in MLQA_LANGUAGES
    ]


def _read_tfds(
    task: TaskName,
    folder: Path,
    part: Part,
    *,
    purpose: Literal["train", "evaluate"],
    skips: Skips,
) -> list[TextExample] | list[QuestionExample]:
    if task == "xnli":
        return xnli_examples(split=part.split, language=part.language, data_dir=folder)
    if task in ("squad1", "squad2", "mlqa"):
        if part.question_language not in ("", part.language):
            raise ConfigError(
                f"tensorflow-datasets has no cross-language pair such as {part}; give the folder"
                " of MLQA_V1 instead"
            )
        return question_examples(
            task,
            split=part.split,
            language=part.language,
            data_dir=folder,
            purpose=purpose,
            skips=skips,
        )
    return glue_examples(cast(GlueName, task), split=part.split, data_dir=folder)


def _own(task: TaskName, data: TaskData, part: Part) -> Path:
    files = {"train": data.train, "dev": data.dev, "test": data.test}
    file = files[_one_of(task, part.split, ("train", "dev", "test"))]
    if file is None:
        there = [split for split, other in files.items() if other and split != "train"]
        ways = "".join(f", or --splits {split} for data.{split}" for split in there)
        raise ConfigError(
            f"task {task} needs a file for split {part.split!r}: give data.{part.split}"
            + (ways if part.split != "train" else "")
        )
    if not file.exists():
        raise DataError(
            f"{file}: no such file, and the task's {part.split} data is to be there; give another "
            f"with --data.{part.split}{listed_beside(file)}"
        )
    return file


def _check_language(task: TaskName, part: Part) -> None:
    known, of = TASKS[task].languages, ""
    if part.split == "train" and TASKS[task].trains_on:
        known, of = TASKS[task].trains_on, " to train on"
    if task not in OWN and part.language not in known:
        raise ConfigError(
            f"{task} has no language {part.language!r}{of}; it has {', '.join(known)}"
        )


def _one_of(task: str, split: str, splits: tuple[Split, ...]) -> Split:
    for known in splits:
        if split == known:
            return known
    raise ConfigError(f"{task} has no split {split!r}; it has {', '.join(splits)}")
