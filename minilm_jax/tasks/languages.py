"""Whether texts are in the language they are said to be in, by script and common words.

Coarse on purpose: it is to catch a file in the wrong place, not a foreign word in a sentence.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

from minilm_jax.errors import DataError

XNLI_LANGUAGES = (
    *("en", "fr", "es", "de", "el", "bg", "ru", "tr"),
    *("ar", "vi", "th", "zh", "hi", "sw", "ur"),
)
"""In the papers' column order."""
MLQA_LANGUAGES = ("en", "es", "de", "ar", "hi", "vi", "zh")

_SCRIPTS = {
    **dict.fromkeys(("ru", "bg"), "CYRILLIC"),
    **dict.fromkeys(("ar", "ur"), "ARABIC"),
    "el": "GREEK",
    "th": "THAI",
    "hi": "DEVANAGARI",
    "zh": "CJK",
}
_COMMON = {
    "en": "the of and to in is that was for it with as his on be at by this had not are",
    "fr": "le la les des et est une dans que qui pour pas au du sur il elle nous vous sont",
    "es": "el la los las de que y en un una por con para es su del se no al como",
    "de": "der die das in und ist nicht ein eine zu den von mit sich des auf für im dem es war",
    "tr": "ve bir bu için da de çok ile ne gibi daha olarak var ama o kadar değil sonra olan ki",
    "sw": "ya na wa kwa ni katika za la kuwa hii cha ambayo lakini kama hiyo watu alikuwa vya si",
    "vi": "và của là có không được một các cho những trong người đã này với để tôi đó khi ở",
}
_ENOUGH = 40
"""Common words found before their language counts as recognised."""
_LOOKED_AT = 200


def check_language(texts: Iterable[str], language: str, *, name: str) -> None:
    """Raises DataError where texts are clearly in another language than `language`.

    Args:
      texts: looked at up to the first 200.
      language: the code they are said to have; one that is not known here is not checked.
      name: what the error calls them: a file.
    """
    if language not in _SCRIPTS and language not in _COMMON:
        return
    text = " ".join(text for _, text in zip(range(_LOOKED_AT), texts, strict=False))
    scripts = Counter(_script(character) for character in text if character.isalpha())
    if scripts.total() < 20:
        return
    wanted = _SCRIPTS.get(language, "LATIN")
    # Names, units and quotations are Latin everywhere, so a third is enough.
    if scripts[wanted] * 3 < scripts.total():
        found = scripts.most_common(1)[0][0].title()
        raise DataError(
            f"{name}: is said to be {language!r} but is written in {found} letters; the file"
            " belongs to another language"
        )
    if language not in _COMMON:
        return
    words = Counter(re.findall(r"\w+", text.lower()))
    hits = {code: sum(words[w] for w in known.split()) for code, known in _COMMON.items()}
    best = max(hits, key=lambda code: hits[code])
    if hits[best] >= _ENOUGH and hits[language] * 4 < hits[best]:
        raise DataError(
            f"{name}: is said to be {language!r} but reads like {best!r} ({hits[best]} common"
            f" words of it, {hits[language]} of {language!r}); the file belongs to another language"
        )


def _script(character: str) -> str:
    first = unicodedata.name(character, "?").split(" ")[0]
    return {"HIRAGANA": "CJK", "KATAKANA": "CJK"}.get(first, first)
