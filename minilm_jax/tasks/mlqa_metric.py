"""MLQA's exact match and F1: SQuAD 1.1's with a normalisation for each language.

The quirks of the official script (Lewis et al. 2020) are kept, because the published figures have
them: see `normalize`.
"""

import re
import string
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache, partial

from minilm_jax.errors import ConfigError
from minilm_jax.tasks.examples import QuestionExample
from minilm_jax.tasks.languages import MLQA_LANGUAGES
from minilm_jax.tasks.squad_metric import ExactF1, best_of, percent

_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    # The official pattern's first alternative can never match; the second one takes the article
    # out of the middle of words, too.
    "ar": "ال",
}
_HAN = re.compile("([\u4e00-\u9fa5])")


@cache
def _punctuation() -> dict[int, None]:
    """Every character of a Unicode category P*, and ASCII's; currency signs beyond ASCII stay."""
    every = (chr(i) for i in range(sys.maxunicode + 1))
    punctuation = {c for c in every if unicodedata.category(c).startswith("P")}
    return dict.fromkeys(map(ord, punctuation | set(string.punctuation)))


def normalize(text: str, *, language: str) -> str:
    """Returns the text lower-cased, without punctuation, then articles, then surplus blanks.

    In Arabic every "ال" becomes a blank, even inside a word. Hindi and Chinese have no articles.
    In Chinese each character of U+4E00–U+9FA5 becomes a token of its own; rarer characters and
    kana stay with their neighbours.
    """
    text = text.lower().translate(_punctuation())
    if language in _ARTICLES:
        text = re.sub(_ARTICLES[language], " ", text)
    if language == "zh":
        text = _HAN.sub(r" \1 ", text)
    return " ".join(text.split())


def mlqa_scores(
    examples: Sequence[QuestionExample], predictions: Mapping[str, str], *, language: str
) -> dict[str, float]:
    """Returns `exact` and `f1` in percent; a question without a prediction counts 0.

    Args:
      examples: of one context language.
      predictions: by id.
      language: of the contexts, which is that of the answers.
    """
    if language not in MLQA_LANGUAGES:
        raise ConfigError(f"MLQA has no language {language!r}; it has {', '.join(MLQA_LANGUAGES)}")
    return percent([_score(example, predictions.get(example.id), language) for example in examples])


def _score(example: QuestionExample, predicted: str | None, language: str) -> ExactF1:
    return best_of(predicted, example.golds, partial(normalize, language=language), str.split)
