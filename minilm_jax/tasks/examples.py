"""What every reader yields, and the list of what a reader left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minilm_jax.errors import DataError

LISTED = 20
"""Skipped examples, or classes, that are named one by one; the rest is only counted."""


@dataclass(frozen=True, kw_only=True)
class TextExample:
    """A text or a pair of texts to classify or to score."""

    id: str
    """What the official submission calls it, usually the row's index."""
    text: str
    text_pair: str | None = None
    label: str | float | None = None
    """A class name, a score (STS-B), or None where the split hides it."""
    language: str = "en"
    origin: str = ""
    """Where it stands, for messages: file and line."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A gold answer: its text and the character of the context it begins at."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The character after the last one."""
        return self.start + len(self.text)


@dataclass(frozen=True, kw_only=True)
class QuestionExample:
    """A question on a context that holds its answer, or does not (SQuAD 2.0)."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None = None
    """Gold answers; empty where the context holds none, None where the split hides them."""
    language: str = "en"
    """Of the context and so of the answer: it decides MLQA's metric."""
    question_language: str = "en"
    origin: str = ""
    """File and line, or file and id."""

    @property
    def golds(self) -> list[str]:
        """Texts of the gold answers."""
        return [answer.text for answer in self.answers or ()]


def listed(names: Sequence[str]) -> str:
    """Returns names for a message: a training set may have thousands of classes."""
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown}, … ({len(names):,} in all)"


@dataclass
class Skips:
    """What was left out, counted by reason and listed by origin."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    def add(self, reason: str, origin: str) -> None:
        """Counts one example that is left out."""
        self.counts[reason] += 1
        if len(self.listed) < LISTED:
            self.listed.append(f"{origin}: {reason}")

    def lines(self) -> list[str]:
        """Returns a line a reason, then the listed ones."""
        summary = [f"skipped {count:,}: {reason}" for reason, count in self.counts.items()]
        hidden = sum(self.counts.values()) - len(self.listed)
        return summary + self.listed + ([f"… and {hidden:,} more"] if hidden else [])


def check_some(
    found: Sequence[object], what: Literal["example", "question"], skips: Skips, *, name: str
) -> None:
    """Raises DataError where nothing was found, which says why if all of it was left out."""
    if found:
        return
    if not skips.counts:
        raise DataError(f"{name}: holds no {what}")
    reasons = "; ".join(skips.lines()[: len(skips.counts) + 1])
    raise DataError(f"{name}: every {what} is left out: {reasons}")


def check_examples(
    examples: Sequence[TextExample] | Sequence[QuestionExample],
    key: Literal["label", "answers"],
    *,
    file: Path,
) -> None:
    """Raises DataError where only some examples have `key`, or two of them have one id.

    A figure needs the gold of all; predictions by id would overwrite each other.
    """
    hidden = [example for example in examples if getattr(example, key) is None]
    if 0 < len(hidden) < len(examples):
        raise DataError(
            f"{hidden[0].origin}: {key} is missing where {len(examples) - len(hidden):,} of"
            f" {len(examples):,} examples have it; give it to all of them, or to none to predict"
            " them"
        )
    ids = Counter(example.id for example in examples)
    repeated = [i for i, count in ids.items() if count > 1]
    if repeated:
        raise DataError(
            f"{file}: the id {repeated[0]!r} occurs {ids[repeated[0]]} times"
            f" ({len(repeated):,} such ids); give each example its own"
        )
