"""SQuAD's exact match and F1, versions 1.1 and 2.0, as the official scripts define them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from minilm_jax.tasks.examples import QuestionExample

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactF1(NamedTuple):
    """Exact match and F1 of one answer, or their sums."""

    exact: float
    f1: float


def normalize(text: str) -> str:
    """Returns the text lower-cased, without ASCII punctuation and articles, blanks made single."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """Returns the harmonic mean of precision and recall of the tokens, as multisets.

    0 where no token is shared, so also where both are empty.
    """
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def squad1_scores(
    examples: Sequence[QuestionExample], predictions: Mapping[str, str]
) -> dict[str, float]:
    """Returns `exact` and `f1` in percent; the best gold answer counts, no answer counts 0."""
    return percent(
        [
            best_of(predictions.get(example.id), example.golds, normalize, str.split)
            for example in examples
        ]
    )


def best_of(
    predicted: str | None,
    golds: Sequence[str],
    normalize: Callable[[str], str],
    tokens: Callable[[str], list[str]],
) -> ExactF1:
    """Returns the best exact match and the best F1 over the gold answers, each on its own."""
    if predicted is None or not golds:
        return ExactF1(0.0, 0.0)
    said = normalize(predicted)
    wanted = [normalize(gold) for gold in golds]
    return ExactF1(
        exact=float(said in wanted),
        f1=max(token_f1(tokens(said), tokens(gold)) for gold in wanted),
    )


def squad2_scores(
    examples: Sequence[QuestionExample],
    predictions: Mapping[str, str],
    *,
    no_answer_odds: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Returns SQuAD 2.0's figures in percent; "" says that there is no answer.

    Questions without a prediction are left out, as in the official script, and counted in
    `missing`.

    Args:
      examples: the split.
      predictions: what is scored: with answers withheld where the model would, for `exact` and
        `f1`.
      no_answer_odds: how much the model prefers no answer, by id. With it, `best_exact` and
        `best_f1` are the scores at the threshold that is best on this very split; they only mean
        something when `predictions` hold the best answer of every question, withheld or not.
    """
    scored = [example for example in examples if example.id in predictions]
    scores = {e.id: _score2(e, predictions[e.id]) for e in scored}
    result = {**percent(list(scores.values())), "total": float(len(scored))}
    for name, kind in (("has_answer", True), ("no_answer", False)):
        part = [scores[e.id] for e in scored if bool(e.answers) == kind]
        if part:
            result |= {f"{name}_{k}": v for k, v in percent(part).items()}
    if len(scored) < len(examples):
        result["missing"] = float(len(examples) - len(scored))
    if no_answer_odds is not None:
        for index, name in enumerate(ExactF1._fields):
            each = {i: score[index] for i, score in scores.items()}
            best = _best_threshold(scored, predictions, each, no_answer_odds)
            result[f"best_{name}"], result[f"best_{name}_threshold"] = best
    return result


def golds2(example: QuestionExample) -> list[str]:
    """Returns the gold answers that count: those not empty once normalised, or [""]."""
    return [gold for gold in example.golds if normalize(gold)] or [""]


def _score2(example: QuestionExample, predicted: str) -> ExactF1:
    found = [_score2_one(predicted, gold) for gold in golds2(example)]
    return ExactF1(max(s.exact for s in found), max(s.f1 for s in found))


def _score2_one(predicted: str, gold: str) -> ExactF1:
    said, wanted = normalize(predicted), normalize(gold)
    # Unlike version 1.1, an empty answer has full marks where, and only where, the gold is empty.
    if not said or not wanted:
        return ExactF1(exact=float(said == wanted), f1=float(said == wanted))
    return best_of(predicted, [gold], normalize, str.split)


def _best_threshold(
    examples: Sequence[QuestionExample],
    predictions: Mapping[str, str],
    scores: Mapping[str, float],
    odds: Mapping[str, float],
) -> tuple[float, float]:
    """Returns (score in percent, threshold): answers are given while odds are not above it."""
    withheld = float(sum(not example.answers for example in examples))
    total = best = withheld
    threshold = 0.0
    for example in sorted(examples, key=lambda e: odds[e.id]):
        if example.answers:
            total += scores[example.id]
        elif predictions[example.id]:
            total -= 1.0
        if total > best:
            best, threshold = total, odds[example.id]
    return 100.0 * best / max(len(examples), 1), threshold


def percent(scores: Sequence[ExactF1]) -> dict[str, float]:
    """Returns the means `exact` and `f1`, in percent; 0 of none."""
    count = max(len(scores), 1)
    return {
        "exact": 100.0 * sum(score.exact for score in scores) / count,
        "f1": 100.0 * sum(score.f1 for score in scores) / count,
    }
