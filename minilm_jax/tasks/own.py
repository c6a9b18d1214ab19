"""A user's own data: classification as tsv or jsonl, questions as jsonl or SQuAD's JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from minilm_jax.errors import DataError
from minilm_jax.tasks.examples import (
    QuestionExample,
    Skips,
    TextExample,
    check_gold,
    check_ids,
)
from minilm_jax.tasks.files import read_jsonl, read_tsv
from minilm_jax.tasks.glue import class_name
from minilm_jax.tasks.squad import answer_to_learn, gold_answers, read_squad


def read_texts(
    file: Path, *, labels: tuple[str, ...] | None = None, hidden: bool = False
) -> list[TextExample]:
    """Returns the rows of a .tsv with a header line, or the objects of a .jsonl.

    Columns: `text`, `label`, and optionally `text_pair`, `id`, `language`.

    Args:
      file: what to read.
      labels: the classes there may be; None takes what comes.
      hidden: whether all labels may be missing: the file is to be predicted.
    """
    found = []
    for number, (origin, row) in enumerate(_records(file, hidden=hidden)):
        said = row.get("label")
        if said is None or said == "":
            if not hidden:
                raise DataError(f"{origin}: label is missing; a class name belongs there")
            label = None
        else:
            allowed = {x: x for x in labels} if labels is not None else {str(said): str(said)}
            label = class_name(str(said), labels=allowed, column="label", origin=origin)
        pair = row.get("text_pair")
        found.append(
            TextExample(
                id=str(row.get("id", number)),
                text=_text(row, "text", origin),
                text_pair=None if pair is None else _text(row, "text_pair", origin),
                label=label,
                language=str(row.get("language", "en")),
                origin=origin,
            )
        )
    if not found:
        raise DataError(f"{file}: holds no example")
    check_gold(found, "label")
    check_ids([example.id for example in found], name=str(file))
    return found


def label_names(examples: list[TextExample], *, name: str) -> tuple[str, ...]:
    """Returns the classes of a training set in alphabetical order."""
    labels = sorted({str(e.label) for e in examples})
    if len(labels) < 2:
        raise DataError(f"{name}: all labels are {labels[0]!r}; at least two classes belong there")
    return tuple(labels)


def read_questions(
    file: Path, *, purpose: Literal["train", "evaluate"], skips: Skips, hidden: bool = False
) -> list[QuestionExample]:
    """Returns the questions of a .json in SQuAD's format, or of a .jsonl.

    A .jsonl has an object a question: `id`, `question`, `context`, and `answers`, a list of
    `{"text", "answer_start"}` that is empty where the context does not answer it.

    Args:
      file: what to read.
      purpose: as in `read_squad`.
      skips: where skipped questions are counted and listed.
      hidden: whether all answers may be missing: the file is to be predicted.
    """
    if file.suffix == ".json":
        return read_squad(file, purpose=purpose, version="any", skips=skips, hidden=hidden)
    found = []
    for number, (origin, row) in enumerate(read_jsonl(file)):
        question = _text(row, "question", origin)
        if not question.strip():
            raise DataError(f"{origin}: the question is empty; write one or remove the line")
        answers = gold_answers(row, origin, hidden=hidden)
        context = _text(row, "context", origin)
        if purpose == "train" and answers:
            answers = answer_to_learn(answers, context, origin, skips)
            if not answers:
                continue
        language = str(row.get("language", "en"))
        found.append(
            QuestionExample(
                id=str(row.get("id", number)),
                question=question,
                context=context,
                answers=answers,
                language=language,
                question_language=str(row.get("question_language", language)),
                origin=origin,
            )
        )
    if not found:
        raise DataError(f"{file}: holds no question")
    check_gold(found, "answers")
    check_ids([example.id for example in found], name=str(file))
    return found


def _records(file: Path, *, hidden: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    match file.suffix:
        case ".jsonl":
            yield from read_jsonl(file)
        case ".tsv":
            for row in read_tsv(file, needs=("text",) if hidden else ("text", "label")):
                yield row.origin, dict(row.values)
        case _:
            raise DataError(f"{file}: is neither .tsv (with a header line) nor .jsonl")


def _text(row: dict[str, Any], key: str, origin: str) -> str:
    if not isinstance(row.get(key), str):
        raise DataError(f"{origin}: no text {key!r}; there is {', '.join(row) or 'nothing'}")
    return row[key]
