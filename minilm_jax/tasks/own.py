"""A user's own data: texts as tsv, csv or jsonl, questions as jsonl or SQuAD's JSON."""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from minilm_jax.errors import DataError
from minilm_jax.tasks.examples import (
    QuestionExample,
    Skips,
    TextExample,
    check_examples,
    check_some,
    listed,
)
from minilm_jax.tasks.files import read_csv, read_jsonl, read_tsv
from minilm_jax.tasks.squad import answer_to_learn, gold_answers, read_squad

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_COLUMNS = ("text", "label", "text_pair", "id", "language")
# A cell that CSV writers put in quotes because it holds some, which they double.
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


def read_texts(
    file: Path,
    *,
    labels: tuple[str, ...] | None = None,
    hidden: bool = False,
    language: str = "",
) -> list[TextExample]:
    """Returns the texts of a file, each of a class.

    Columns or keys: `text`, `label`, and optionally `text_pair`, `id`, `language`.

    Args:
      file: a .tsv with a header line (quotes are text), a .csv with one, or a .jsonl.
      labels: the classes there may be; None takes what comes.
      hidden: whether all labels may be missing: the file is to be predicted.
      language: of the rows to return; "" returns all.
    """

    def name(said: Any, origin: str) -> str:
        if isinstance(said, list | dict):
            raise DataError(
                f"{origin}: label {json.dumps(said):.60} is a {type(said).__name__};"
                " expected one class name"
            )
        if isinstance(said, bool):
            said = json.dumps(said)
        if isinstance(said, float) and said.is_integer():
            said = int(said)  # pandas makes 1 a 1.0 where a row has no label
        _check_cell("label", said, origin)
        if str(said) != str(said).strip():
            raise DataError(f"{origin}: label {said!r} begins or ends with a space; remove it")
        if labels is not None and str(said) not in labels:
            raise DataError(
                f"{origin}: label {str(said)!r:.60} is none of the model's classes, which are those"
                f" of its training set: {listed(labels)}"
            )
        return str(said)

    return _read_texts(file, name, hidden=hidden, language=language)


def read_scores(file: Path, *, hidden: bool = False, language: str = "") -> list[TextExample]:
    """Returns the texts of a file, each with a number as its label; else as `read_texts`."""

    def score(said: Any, origin: str) -> float:
        try:
            number = isinstance(said, int | float) or _NUMBER.fullmatch(str(said).strip())
            value = float(said) if number and not isinstance(said, bool) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{origin}: label {said!r:.60} is no number; classes are learnt by task texts"
            )
        return value

    return _read_texts(file, score, hidden=hidden, language=language)


def _read_texts(
    file: Path, parse: Callable[[Any, str], str | float], *, hidden: bool, language: str
) -> list[TextExample]:
    found = []
    for number, origin, row in _spoken(_records(file, hidden=hidden), language, file):
        said = _given(row, "label")
        if said is None and not hidden:
            raise DataError(f"{origin}: label is missing; give each text one")
        pair, name = row.get("text_pair"), _given(row, "id", number)
        _check_cell("id", name, origin)
        if not _text(row, "text", origin).strip():
            raise DataError(f"{origin}: the text is empty; write one or remove the row")
        found.append(
            TextExample(
                id=str(name),
                text=_text(row, "text", origin),
                text_pair=None if pair is None or pair != pair else _text(row, "text_pair", origin),
                label=None if said is None else parse(said, origin),
                language=_language(row),
                origin=origin,
            )
        )
    if not found:
        raise DataError(f"{file}: holds no example")
    check_examples(found, "label", file=file)
    return found


def label_names(examples: list[TextExample], *, name: str) -> tuple[str, ...]:
    """Returns the classes of a training set in alphabetical order.

    Raises:
      DataError: there is one alone, two differ in case only, or they are numbers to be learnt.
    """
    labels = sorted({str(e.label) for e in examples})
    if len(labels) < 2:
        raise DataError(f"{name}: all labels are {labels[0]!r}; at least two classes are needed")
    for one, other in itertools.pairwise(sorted(labels, key=str.casefold)):
        if one.casefold() == other.casefold():
            raise DataError(f"{name}: labels {one!r} and {other!r} differ only in case")
    if all(_NUMBER.fullmatch(label) for label in labels):
        whole = [label for label in labels if float(label).is_integer()]
        if len(whole) < len(labels):
            raise DataError(
                f"{name}: labels are numbers ({listed(labels)}), and task texts would take each for"
                " a class; task scores learns numbers"
            )
    return tuple(labels)


def read_questions(
    file: Path,
    *,
    purpose: Literal["train", "evaluate"],
    skips: Skips,
    hidden: bool = False,
    language: str = "",
) -> list[QuestionExample]:
    """Returns the questions of a .json in SQuAD's format, or of a .jsonl.

    A .jsonl has an object a question: `id`, `question`, `context`, and `answers`, a list of
    `{"text", "answer_start"}` that is empty where the context does not answer it; optionally
    `language` (of the context) and `question_language`.

    Args:
      file: what to read.
      purpose: as in `read_squad`.
      skips: where skipped questions are counted and listed.
      hidden: whether all answers may be missing: the file is to be predicted.
      language: of the contexts to return; "" returns all.
    """
    if file.suffix == ".json":
        if language:
            raise DataError(
                f"{file}: SQuAD's format names no language, so none can be chosen; leave the"
                " languages out, or write a .jsonl"
            )
        return read_squad(file, purpose=purpose, version="any", skips=skips, hidden=hidden)
    if file.suffix != ".jsonl":
        raise DataError(f"{file}: is neither .jsonl nor SQuAD's .json, as questions are")
    found = []
    for number, origin, row in _spoken(read_jsonl(file), language, file):
        question = _text(row, "question", origin)
        if not question.strip():
            raise DataError(f"{origin}: the question is empty; write one or remove the line")
        answers = gold_answers(row, origin, hidden=hidden)
        context = _text(row, "context", origin)
        if not context.strip():
            raise DataError(f"{origin}: the context is empty; write one or remove the line")
        if purpose == "evaluate" and any(not answer.text.strip() for answer in answers or ()):
            raise DataError(
                f"{origin}: an answer is empty; where the context does not answer the question, "
                "the list answers is empty"
            )
        if purpose == "train" and answers:
            answers = answer_to_learn(answers, context, origin, skips)
            if not answers:
                continue
        found.append(
            QuestionExample(
                id=str(_given(row, "id", number)),
                question=question,
                context=context,
                answers=answers,
                language=_language(row),
                question_language=str(_given(row, "question_language", _language(row))),
                origin=origin,
            )
        )
    check_some(found, "question", skips, name=str(file))
    check_examples(found, "answers", file=file)
    return found


def _records(file: Path, *, hidden: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, (origin, row) in enumerate(_rows(file, hidden=hidden)):
        for key in row if number == 0 else ():
            meant = key.strip().casefold()
            if key != meant and meant in _COLUMNS and meant not in row:
                raise DataError(f"{origin}: there is {key!r}; the name is {meant!r}")
        yield origin, row


def _rows(file: Path, *, hidden: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    needs = ("text",) if hidden else ("text", "label")
    match file.suffix:
        case ".jsonl":
            yield from read_jsonl(file)
        case ".csv":
            for row in read_csv(file, needs=needs):
                yield row.origin, dict(row.values)
        case ".tsv":
            for row in read_tsv(file, needs=needs):
                for cell in row.values.values():
                    if _QUOTED.fullmatch(cell):
                        raise DataError(
                            f"{row.origin}: {cell:.40} is quoted as in CSV, but quotes of a .tsv"
                            " are text; write a .jsonl (pandas: to_json(file, orient='records',"
                            " lines=True)) or a .csv"
                        )
                yield row.origin, dict(row.values)
        case _:
            raise DataError(
                f"{file}: is none of .tsv and .csv (with a header line) and .jsonl;"
                " SQuAD's .json goes with task questions"
            )


def _spoken(
    records: Iterable[tuple[str, dict[str, Any]]], language: str, file: Path
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (number in the file, origin, record) of one language, of all where it is "".

    Raises:
      DataError: there are records, but none in this language.
    """
    there = set()
    for number, (origin, row) in enumerate(records):
        there.add(_language(row))
        if language in ("", _language(row)):
            yield number, origin, row
    if language and there and language not in there:
        raise DataError(
            f"{file}: no row has language {language!r}; it has {', '.join(sorted(there))}"
        )


def _language(row: dict[str, Any]) -> str:
    return str(_given(row, "language", "en"))


def _given(row: dict[str, Any], key: str, default: Any = None) -> Any:
    """Returns an optional value; an empty cell, null and pandas' NaN are none."""
    value = row.get(key)
    return default if value is None or value == "" or value != value else value


def _check_cell(key: str, value: Any, origin: str) -> None:
    """Raises DataError where a value is no cell of the .tsv that predictions are written to."""
    if re.search(r"[\t\r\n]", str(value)):
        raise DataError(
            f"{origin}: {key} {value!r:.60} contains a tab or a line break, which a .tsv of"
            " predictions cannot hold: remove it"
        )


def _text(row: dict[str, Any], key: str, origin: str) -> str:
    if not isinstance(row.get(key), str):
        raise DataError(f"{origin}: no text {key!r}; there is {', '.join(row) or 'nothing'}")
    return row[key]
