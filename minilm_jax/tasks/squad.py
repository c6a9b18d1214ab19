"""SQuAD's JSON, versions 1.1 and 2.0, which MLQA and many others use too."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from minilm_jax.errors import DataError
from minilm_jax.tasks.examples import (
    Answer,
    QuestionExample,
    Skips,
    check_examples,
    check_some,
)
from minilm_jax.tasks.files import read_json

Version = Literal["1.1", "2.0", "any"]


def read_squad(
    file: Path,
    *,
    purpose: Literal["train", "evaluate"],
    version: Version,
    skips: Skips,
    hidden: bool = False,
    language: str = "en",
    question_language: str = "en",
) -> list[QuestionExample]:
    """Returns the questions of a file.

    Args:
      file: `{"data": [{"paragraphs": [{"context", "qas": [...]}]}]}`.
      purpose: training needs each answer at its place, and skips and counts those that are not,
        as the official tools do; evaluation looks at the answers' texts only.
      version: 2.0 has questions without an answer, marked `is_impossible`; 1.1 has none.
      skips: where skipped questions are counted and listed.
      hidden: whether all answers may be missing: the file is to be predicted.
      language: of the contexts.
      question_language: of the questions.

    Raises:
      DataError: the structure, an id, a question or the version is not what it should be.
    """
    value = read_json(file)
    found = []
    marked = False
    for context, qa in _questions(value, file):
        # The id, and no line: official files have one line.
        origin = f"{file}, question {qa['id']!r}"
        marked = marked or "is_impossible" in qa
        impossible = qa.get("is_impossible") or False
        if impossible not in (True, False):
            raise DataError(
                f"{origin}: is_impossible is {impossible!r:.40}; expected true or false"
            )
        question = _text(qa, "question", origin)
        if not question.strip():
            raise DataError(f"{origin}: the question is empty; write one or remove it")
        # The gold is what the official scripts take: no answers, whatever stands beside the mark.
        answers = () if impossible else gold_answers(qa, origin, hidden=hidden)
        if impossible and version == "1.1":
            raise DataError(
                f"{origin}: is_impossible occurs only in SQuAD 2.0; take task squad2 or the file"
                " of version 1.1"
            )
        if purpose == "train" and not impossible:
            answers = answer_to_learn(answers or (), context, origin, skips)
            if not answers:
                continue
        found.append(
            QuestionExample(
                id=qa["id"],
                question=question,
                context=context,
                answers=answers,
                language=language,
                question_language=question_language,
                origin=origin,
            )
        )
    check_some(found, "question", skips, name=str(file))
    if version == "2.0" and not marked:
        raise DataError(
            f"{file}: no question has is_impossible, so it is SQuAD 1.1; take task squad1 or the"
            " file of version 2.0"
        )
    check_examples(found, "answers", file=file)
    return found


def _questions(value: Any, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (context, question) in the file's order."""
    for article in _list(value, "data", file):
        for paragraph in _list(article, "paragraphs", file):
            if not isinstance(paragraph.get("context"), str):
                raise DataError(f"{file}: a paragraph has no context; is it SQuAD's format?")
            for qa in _list(paragraph, "qas", file):
                if not isinstance(qa.get("id"), str):
                    raise DataError(
                        f"{file}: the question {qa.get('question')!r:.60} has no id in quotes"
                    )
                yield paragraph["context"], qa


def _list(value: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    found = value.get(key)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise DataError(
            f"{file}: no list {key!r} beside {', '.join(value)}; it is not in SQuAD's format"
        )
    return found


def _text(qa: dict[str, Any], key: str, origin: str) -> str:
    if not isinstance(qa.get(key), str):
        raise DataError(f"{origin}: {key} is missing or no text")
    return qa[key]


def gold_answers(qa: dict[str, Any], origin: str, *, hidden: bool) -> tuple[Answer, ...] | None:
    """Returns the list `answers` of a question; None where it is missing and may be.

    Raises:
      DataError: it is missing where it must not be, or holds something else than answers.
    """
    answers = qa.get("answers")
    if answers is None:
        if hidden:
            return None
        raise DataError(
            f"{origin}: answers is missing beside {', '.join(qa)}; expected a list, empty"
            " where the context does not answer the question"
        )
    if not isinstance(answers, list):
        raise DataError(
            f"{origin}: answers is a {type(answers).__name__}; expected a list of objects"
            ' such as {"text": "Rome", "answer_start": 3}'
        )
    found = []
    for answer in answers:
        fields = answer if isinstance(answer, dict) else {}
        text, start = fields.get("text"), fields.get("answer_start")
        if not isinstance(text, str) or type(start) is not int:
            raise DataError(f"{origin}: an answer needs a text and an integer answer_start")
        found.append(Answer(text=text, start=start))
    return tuple(found)


def answer_to_learn(
    answers: Sequence[Answer], context: str, origin: str, skips: Skips
) -> tuple[Answer, ...]:
    """Returns the first answer where the context holds it at its offset; else nothing, counted.

    Raises:
      DataError: there is no answer.
    """
    if not answers:
        raise DataError(f"{origin}: has no answer to learn from and is not marked is_impossible")
    answer = answers[0]
    text = answer.text.strip()
    if not text:
        skips.add("the answer is empty", origin)
        return ()
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    if start >= 0 and context[start : start + len(text)] == text:
        return (Answer(text=text, start=start),)
    if " ".join(text.split()) in " ".join(context.split()):
        skips.add("the answer does not stand at its answer_start", origin)
    else:
        skips.add("the answer does not stand in its context", origin)
    return ()
