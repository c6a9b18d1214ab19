"""GLUE's nine tasks (Wang et al. 2018) and its diagnostic set, read from the official tsv files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minilm_jax.errors import ConfigError, DataError
from minilm_jax.tasks.examples import Skips, TextExample, check_some, listed
from minilm_jax.tasks.files import Row, read_tsv

GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """Where a task's columns stand and what its labels are called."""

    folder: str
    text: str
    text_pair: str | None
    label: str
    labels: dict[str, str]
    """What the files say → our class name, in the order of a new classifier's outputs; empty for
    a score. Names are those of tensorflow-datasets and Hugging Face."""
    metrics: tuple[str, ...]
    """The first one selects checkpoints: it is what the MiniLM tables report."""
    submission: dict[str, str]
    """Test split → file name at gluebenchmark.com."""


_BINARY = {"0": "not_entailment", "1": "entailment"}
_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
NLI_LABELS = {name: name for name in ("entailment", "neutral", "contradiction")}

GLUE: dict[GlueName, GlueTask] = {
    "cola": GlueTask(
        folder="CoLA",
        text="sentence",
        text_pair=None,
        label="label",
        labels={"0": "unacceptable", "1": "acceptable"},
        metrics=("matthews", "accuracy"),
        submission={"test": "CoLA.tsv"},
    ),
    "sst2": GlueTask(
        folder="SST-2",
        text="sentence",
        text_pair=None,
        label="label",
        labels={"0": "negative", "1": "positive"},
        metrics=("accuracy",),
        submission={"test": "SST-2.tsv"},
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        text="#1 String",
        text_pair="#2 String",
        label="Quality",
        labels={"0": "not_equivalent", "1": "equivalent"},
        metrics=("accuracy", "f1"),
        submission={"test": "MRPC.tsv"},
    ),
    "stsb": GlueTask(
        folder="STS-B",
        text="sentence1",
        text_pair="sentence2",
        label="score",
        labels={},
        metrics=("pearson", "spearman"),
        submission={"test": "STS-B.tsv"},
    ),
    "qqp": GlueTask(
        folder="QQP",
        text="question1",
        text_pair="question2",
        label="is_duplicate",
        labels={"0": "not_duplicate", "1": "duplicate"},
        metrics=("accuracy", "f1"),
        submission={"test": "QQP.tsv"},
    ),
    "mnli": GlueTask(
        folder="MNLI",
        text="sentence1",
        text_pair="sentence2",
        label="gold_label",
        labels=NLI_LABELS,
        metrics=("accuracy",),
        submission={"test": "MNLI-m.tsv", "test-mm": "MNLI-mm.tsv", "ax": "AX.tsv"},
    ),
    "qnli": GlueTask(
        folder="QNLI",
        text="question",
        text_pair="sentence",
        label="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        submission={"test": "QNLI.tsv"},
    ),
    "rte": GlueTask(
        folder="RTE",
        text="sentence1",
        text_pair="sentence2",
        label="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        submission={"test": "RTE.tsv"},
    ),
    "wnli": GlueTask(
        folder="WNLI",
        text="sentence1",
        text_pair="sentence2",
        label="label",
        labels=_BINARY,
        metrics=("accuracy",),
        submission={"test": "WNLI.tsv"},
    ),
}
_SPLITS = {"train": "train.tsv", "dev": "dev.tsv", "test": "test.tsv"}
_MNLI_SPLITS = {
    "train": "train.tsv",
    "dev": "dev_matched.tsv",
    "dev-mm": "dev_mismatched.tsv",
    "test": "test_matched.tsv",
    "test-mm": "test_mismatched.tsv",
}
# CoLA's files with labels have no header line.
_COLA_COLUMNS = ("source", "label", "star", "sentence")


def read_glue(folder: Path, *, task: GlueName, split: str, skips: Skips) -> list[TextExample]:
    """Returns a split of a task.

    Args:
      folder: holds the tasks' folders (CoLA, SST-2, …), or is the task's own.
      task: which one.
      split: train, dev, test; for MNLI also dev-mm, test-mm and ax, the diagnostic set.
      skips: counts the rows the official readers skip: broken ones of QQP, and pairs whose
        annotators disagreed ("-") of MNLI.

    Raises:
      DataError: a column, a label or the file is missing or not what it should be.
    """
    spec = GLUE[task]
    file = _file(folder, spec, task, split)
    hidden = split.startswith(("test", "ax"))
    names = _COLA_COLUMNS if task == "cola" and not hidden else None
    texts = [name for name in (spec.text, spec.text_pair) if name is not None]
    needs = texts if hidden else [*texts, spec.label]
    ragged: Literal["skip", "refuse"] = "skip" if task == "qqp" else "refuse"
    found = []
    rows = read_tsv(file, needs=needs, names=names, ragged=ragged, skips=skips)
    for number, row in enumerate(rows):
        label = None if hidden else _label(row, spec, skips)
        if label is None and not hidden:
            continue
        found.append(
            TextExample(
                id=_id(row, number) if hidden else str(number),
                text=row.values[spec.text],
                text_pair=row.values[spec.text_pair] if spec.text_pair else None,
                label=label,
                origin=row.origin,
            )
        )
    check_some(found, "example", skips, name=str(file))
    return found


def _file(folder: Path, spec: GlueTask, task: GlueName, split: str) -> Path:
    splits = _MNLI_SPLITS if task == "mnli" else _SPLITS
    if split == "ax" and task == "mnli":
        places = [folder / "AX" / "AX.tsv", folder / "diagnostic" / "diagnostic.tsv"]
        places += [folder / "diagnostic.tsv", folder / "AX.tsv", folder.parent / "AX" / "AX.tsv"]
        return next((place for place in places if place.is_file()), places[0])
    if split not in splits:
        known = [*splits, "ax"] if task == "mnli" else splits
        raise ConfigError(f"{task} has no split {split!r}; it has {', '.join(known)}")
    nested, own = folder / spec.folder / splits[split], folder / splits[split]
    return own if own.is_file() and not nested.is_file() else nested


def _id(row: Row, number: int) -> str:
    """Returns what the submission calls a row; QQP calls `id` what is `index` elsewhere."""
    return row.values.get("index", row.values.get("id", str(number)))


def _label(row: Row, spec: GlueTask, skips: Skips) -> str | float | None:
    said = row.values[spec.label].strip()
    if not spec.labels:
        return score(said, column=spec.label, origin=row.origin)
    if said == "-" and spec.labels is NLI_LABELS:
        skips.add("no gold label: the annotators disagreed", row.origin)
        return None
    return class_name(said, labels=spec.labels, column=spec.label, origin=row.origin)


def class_name(said: str, *, labels: dict[str, str], column: str, origin: str) -> str:
    """Returns the class a file's label stands for; DataError where it is missing or unknown."""
    if not said:
        raise DataError(f"{origin}: column {column!r} is empty; a label belongs there")
    if said not in labels:
        raise DataError(
            f"{origin}: label {said!r} is not one of {listed(list(labels))}; is the file of another"
            " task?"
        )
    return labels[said]


def score(said: str, *, column: str, origin: str) -> float:
    """Returns a similarity score of 0 to 5; DataError where it is none."""
    try:
        value = float(said)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 5.0:
        what = f"{said!r} in column" if said else "nothing in column"
        raise DataError(f"{origin}: {what} {column!r} where a score of 0 to 5 belongs")
    return value
