"""Results as rows of a CSV file, and as Markdown tables laid out like the papers'."""

import csv
import fcntl
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from minilm_jax.atomic import write_atomically
from minilm_jax.errors import DataError
from minilm_jax.tasks import published
from minilm_jax.tasks.languages import MLQA_LANGUAGES, XNLI_LANGUAGES


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One figure with everything needed to get it again."""

    name: str
    """What tables call the model; rows of one name and several seeds become mean ± deviation."""
    task: str
    split: str
    language: str
    """"" where own data was not told apart by it."""
    question_language: str
    metric: str
    value: float
    """In percent, thresholds apart."""
    examples: int
    skipped: int
    seed: str
    """Of the fine-tuning; "" where the model was only evaluated."""
    model: str
    model_sha256: str
    tokenizer_sha256: str
    data_sha256: str
    """Of ids, texts and labels, wherever they were read from."""
    settings: str
    """The whole resolved config as JSON."""
    versions: str
    """Of this package, JAX and Python, and the devices."""
    date: str
    """UTC."""


_COLUMNS = tuple(field.name for field in fields(ResultRow))


def append_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Adds rows to a CSV file, with a header where it is new.

    Raises:
      DataError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        # Two evaluations may share a folder: one of them writes the header.
        fcntl.flock(file, fcntl.LOCK_EX)
        new = path.stat().st_size == 0
        if not new:
            read_rows(path)
        # In one piece, whenever the process is killed.
        file.write(_as_csv(rows, header=new).encode())


def write_rows(path: Path, rows: Sequence[ResultRow]) -> None:
    """Writes a CSV file of these rows alone; a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _as_csv(rows, header=True))


def _as_csv(rows: Sequence[ResultRow], *, header: bool) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS)
    if header:
        writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def read_rows(path: Path) -> list[ResultRow]:
    """Returns the rows of a CSV file that `append_rows` wrote.

    Raises:
      DataError: it is another file, or a row is damaged: what is left where a disk was full.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise DataError(f"{path}: is no results file of ours; choose another name")
        rows = []
        for row in reader:
            try:
                rows.append(_parsed(row))
            except (TypeError, ValueError):
                raise DataError(
                    f"{path}: the row that ends in line {reader.line_num} is damaged; remove it"
                ) from None
        return rows


def _parsed(row: dict[str, Any]) -> ResultRow:
    if None in row or None in row.values():
        raise ValueError("cells are missing, or there are more than columns")
    numbers = {"value": float(row["value"])}
    counts = {name: int(row[name]) for name in ("examples", "skipped")}
    return ResultRow(**{**row, **numbers, **counts})


def tables(rows: Sequence[ResultRow]) -> str:
    """Returns Markdown: the papers' tables these rows have figures for, then every figure."""
    parts = []
    figures = _figures(rows)
    english = {
        column: (task, split, "en", "", metric)
        for column, (task, split, metric) in published.ENGLISH_COLUMNS.items()
    }
    xnli = {code: ("xnli", "test", code, "", "accuracy") for code in XNLI_LANGUAGES}
    groups = (
        ("English (dev sets)", _table(figures, english), published.ENGLISH, (*english, "avg")),
        ("XNLI (test sets, accuracy)", _table(figures, xnli), published.XNLI, ("avg", *xnli)),
        ("MLQA (test sets, F1/EM)", _mlqa(figures), published.MLQA, ("avg", *MLQA_LANGUAGES)),
    )
    for title, ours, theirs, columns in groups:
        if ours:
            both = {f"{name} (published)": row for name, row in theirs.items()} | ours
            parts.append(f"## {title}\n\n{markdown(both, columns)}")
    for name in dict.fromkeys(row.name for row in rows):
        matrix = _pairs([row for row in rows if row.name == name])
        if matrix:
            table = markdown(matrix, MLQA_LANGUAGES, corner="context \\ question")
            parts.append(f"## G-XLT of {name} (MLQA test, F1)\n\n{table}")
    parts.append(f"## Every figure\n\n{_all(rows, figures)}")
    return "\n\n".join(parts) + "\n"


def markdown(
    rows: Mapping[str, Mapping[str, str]], columns: Sequence[str], *, corner: str = "model"
) -> str:
    """Returns a Markdown table; "–" where a figure is missing."""
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [
        f"| {name} | {' | '.join(row.get(column, '–') for column in columns)} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Returns "84.3", or "84.3 ± 0.4" of several: the sample's standard deviation."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


Key = tuple[str, str, str, str, str]
"""Task, split, language, question language, metric."""
Figures = dict[str, dict[Key, list[float]]]
"""Model name → key → its seeds' values."""


def _figures(rows: Sequence[ResultRow]) -> Figures:
    """Returns the values of the rows.

    A figure measured again replaces the one before; without a seed, a name is one model's.
    """
    found: dict[str, dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        key = (row.task, row.split, row.language, row.question_language, row.metric)
        found[row.name][key][row.seed] = row.value
    return {
        name: {key: list(values.values()) for key, values in figures.items()}
        for name, figures in found.items()
    }


def _table(figures: Figures, columns: Mapping[str, Key]) -> dict[str, dict[str, str]]:
    """Returns model name → column → what it says, of the models that have any of the figures."""
    found = {
        name: _with_average({column: values.get(key, []) for column, key in columns.items()})
        for name, values in figures.items()
    }
    return {name: row for name, row in found.items() if row}


def _mlqa(figures: Figures) -> dict[str, dict[str, str]]:
    f1, exact = (
        _table(figures, {code: ("mlqa", "test", code, "", metric) for code in MLQA_LANGUAGES})
        for metric in ("f1", "exact")
    )
    return {
        name: {column: f"{value}/{exact[name][column]}" for column, value in row.items()}
        for name, row in f1.items()
    }


def _with_average(columns: Mapping[str, list[float]]) -> dict[str, str]:
    """Returns the columns there are; `avg` only where all are, or it would mean something else."""
    row = {name: mean_and_deviation(values) for name, values in columns.items() if values}
    if row and len(row) == len(columns):
        row["avg"] = f"{statistics.fmean(map(statistics.fmean, columns.values())):.1f}"
    return row


def _pairs(rows: Sequence[ResultRow]) -> dict[str, dict[str, str]]:
    """Returns the matrix of context and question languages, where pairs across were measured."""
    found: dict[str, dict[str, str]] = {}
    crossed = False
    for row in rows:
        if (row.task, row.split, row.metric) == ("mlqa", "test", "f1"):
            crossed = crossed or bool(row.question_language)
            asked = row.question_language or row.language
            found.setdefault(row.language, {})[asked] = f"{row.value:.1f}"
    return {code: found[code] for code in MLQA_LANGUAGES if code in found} if crossed else {}


def _all(rows: Sequence[ResultRow], figures: Figures) -> str:
    columns = ("split", "language", "metric", "value", "examples")
    lines = [f"| model | task | {' | '.join(columns)} |", "|---|---|---|---|---|---:|---:|"]
    counts = {
        (r.name, r.task, r.split, r.language, r.question_language, r.metric): r.examples
        for r in rows
    }
    for name, measured in figures.items():
        for (task, split, language, asked, metric), values in measured.items():
            if metric == "total":
                continue  # SQuAD's name for the examples, which have a column
            spoken = f"{language}/{asked}" if asked else language or "all"
            count = counts[name, task, split, language, asked, metric]
            shown = mean_and_deviation(values)
            lines.append(
                f"| {name} | {task} | {split} | {spoken} | {metric} | {shown} | {count:,} |"
            )
    return "\n".join(lines)
