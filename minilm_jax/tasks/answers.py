"""From start and end scores of windows to answers cut out of the original text."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from minilm_jax.settings import Positive, Settings
from minilm_jax.tasks.features import Feature

# What a question without any possible span is as sure of as one can be, and JSON can write.
_SURE = 1e4
_JOINERS = "\u200c\u200d\ufe0e\ufe0f"


@dataclass(frozen=True, kw_only=True)
class AnswerConfig(Settings, name="answers"):
    """How spans are chosen; the defaults are those of the official tools."""

    n_best: Positive = 20
    """Starts and ends looked at in a window, and answers kept."""
    max_answer_length: Positive = 30
    """Tokens of the longest answer."""
    null_threshold: float = 0.0
    """SQuAD 2.0: no answer is given where its score leads the best span's by more."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Settings, name="answers"):
    """Another choice of spans than the one a model was fine-tuned with; None keeps its own."""

    n_best: Positive | None = None
    """Starts and ends looked at in a window, and answers kept; else 20."""
    max_answer_length: Positive | None = None
    """Tokens of the longest answer; else 30."""
    null_threshold: float | None = None
    """SQuAD 2.0: no answer is given where its score leads the best span's by more; else 0."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One possible answer; start == end == 0 and no text: that there is none."""

    text: str
    start: int
    """Character of the context."""
    end: int
    score: float
    """Start logit + end logit."""
    probability: float = 0.0
    """Among the candidates kept."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model answers to one question."""

    text: str
    """The answer given; "" where it is withheld."""
    best_text: str
    """The best span, withheld or not."""
    no_answer_odds: float
    """Score of no answer minus that of the best span."""
    n_best: tuple[Candidate, ...]


def answer(
    context: str,
    windows: Sequence[Feature],
    start_logits: Sequence[Float[np.ndarray, "L"]],
    end_logits: Sequence[Float[np.ndarray, "L"]],
    *,
    config: AnswerConfig,
    no_answer: Literal["possible", "impossible"],
) -> Prediction:
    """Returns the best answer over all windows of one question.

    A span begins at a token that has its widest context in that window, ends at or after it in
    the context, and is at most `max_answer_length` tokens long. The score of no answer is that of
    the [CLS] token, the smallest of all windows.

    Args:
      context: the text to cut answers from.
      windows: the question's rows.
      start_logits: of each row; columns beyond the row's tokens are ignored.
      end_logits: the same for the end.
      config: of the search.
      no_answer: whether to withhold.
    """
    found: list[Candidate] = []
    null = np.inf
    for feature, start, end in zip(windows, start_logits, end_logits, strict=True):
        null = min(null, float(start[0]) + float(end[0]))
        found += _spans(context, feature, start, end, config)
    found.sort(key=lambda candidate: -candidate.score)
    kept: dict[str, Candidate] = {}
    for candidate in found:
        kept.setdefault(candidate.text, candidate)
        if len(kept) == config.n_best:
            break
    best = next(iter(kept.values()), None)
    odds = null - best.score if best is not None else _SURE
    if no_answer == "possible" or best is None:
        kept.setdefault("", Candidate(text="", start=0, end=0, score=float(null)))
    best_text = best.text if best is not None else ""
    withheld = no_answer == "possible" and odds > config.null_threshold
    return Prediction(
        text="" if withheld else best_text,
        best_text=best_text,
        no_answer_odds=odds,
        n_best=_with_probabilities(kept.values()),
    )


def _spans(
    context: str,
    feature: Feature,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    config: AnswerConfig,
) -> list[Candidate]:
    window = feature.window
    if window is None:
        raise ValueError("answers need features made by question_features")
    inside = slice(window.first, window.first + len(window.offsets))
    start, end = start_logits[inside], end_logits[inside]
    starts = np.flatnonzero(window.widest)
    starts = starts[np.argsort(-start[starts], kind="stable")[: config.n_best]]
    ends = np.argsort(-end, kind="stable")[: config.n_best]
    length = ends[None, :] - starts[:, None] + 1
    rows, columns = np.nonzero((length >= 1) & (length <= config.max_answer_length))
    scores = start[starts[rows]].astype(np.float64) + end[ends[columns]]
    found: dict[str, Candidate] = {}
    for position in np.argsort(-scores, kind="stable"):
        first, last = starts[rows[position]], ends[columns[position]]
        begin, stop = cut(
            context, int(window.offsets[first, 0]), int(window.offsets[: last + 1, 1].max())
        )
        text = context[begin:stop]
        if text and text not in found:
            score = float(scores[position])
            found[text] = Candidate(text=text, start=begin, end=stop, score=score)
            if len(found) == config.n_best:
                break
    return list(found.values())


def cut(context: str, start: int, end: int) -> tuple[int, int]:
    """Returns the characters of a span with the marks that belong to its last letter.

    Tokenizers that strip accents leave combining marks and vowel signs outside of every token.
    """
    while end < len(context) and (
        unicodedata.category(context[end]) in ("Mn", "Mc", "Me") or context[end] in _JOINERS
    ):
        end += 1
    while start < end and context[start].isspace():
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    return start, end


def _with_probabilities(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    ordered = sorted(candidates, key=lambda candidate: -candidate.score)
    scores = np.array([candidate.score for candidate in ordered])
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    return tuple(
        Candidate(text=c.text, start=c.start, end=c.end, score=c.score, probability=float(p))
        for c, p in zip(ordered, weights, strict=True)
    )
