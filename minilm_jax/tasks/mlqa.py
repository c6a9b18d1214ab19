"""MLQA (Lewis et al. 2020): seven languages, context and question in any pair of them."""

from pathlib import Path
from typing import Literal

from minilm_jax.errors import ConfigError, DataError
from minilm_jax.tasks.examples import QuestionExample, Skips
from minilm_jax.tasks.languages import MLQA_LANGUAGES, check_language
from minilm_jax.tasks.squad import read_squad


def read_mlqa(
    folder: Path,
    *,
    split: Literal["dev", "test"],
    language: str,
    question_language: str,
    skips: Skips,
) -> list[QuestionExample]:
    """Returns `{split}/{split}-context-{language}-question-{question_language}.json`.

    Args:
      folder: holds MLQA_V1, or dev and test, or the files themselves.
      split: dev or test.
      language: of the contexts, and so of the answers.
      question_language: the same for cross-lingual transfer (XLT), another for G-XLT.
      skips: where skipped questions are counted.
    """
    for code in (language, question_language):
        if code not in MLQA_LANGUAGES:
            raise ConfigError(f"MLQA has no language {code!r}; it has {', '.join(MLQA_LANGUAGES)}")
    name = f"{split}-context-{language}-question-{question_language}.json"
    places = [folder / "MLQA_V1" / split / name, folder / split / name, folder / name]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(
            f"{folder}: no {name}, MLQA_V1/{split}/{name} or {split}/{name}; not every pair of"
            " languages exists"
        )
    found = read_squad(
        file,
        purpose="evaluate",
        version="1.1",
        skips=skips,
        language=language,
        question_language=question_language,
    )
    check_language((e.context for e in found), language, name=f"{file} (contexts)")
    check_language((e.question for e in found), question_language, name=f"{file} (questions)")
    return found
