"""Tokenising by the word: each distinct word of a corpus goes through the tokenizer once.

Text repeats itself, and in WordPiece and byte-level BPE what stands between two spaces is
tokenised without a look at its neighbours. So joining the remembered ids of words gives exactly
what the tokenizer gives for the whole text, several times as fast.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

EncodeBatch = Callable[[Sequence[str]], list[np.ndarray]]

_ENTRIES = 1 << 19
# Scripts without spaces have no words to remember.
_LONGEST_MEAN_WORD = 24
# BERT's cleaning deletes these control characters; Python takes them for spaces.
_NOT_BERTS_SPACES = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
# Before a single space byte-level BPE always begins a new word, and takes the space along.
_BYTE_LEVEL_WORD = re.compile(r"(?<=\S)(?= \S)")


class WordCache:
    """Encodes like the given function, remembering words."""

    def __init__(self, encode: EncodeBatch, *, words: Literal["bert", "byte-level"]) -> None:
        self._encode = encode
        self._words = _bert_words if words == "bert" else _byte_level_words
        self._known: dict[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, uint32."""
        split = [self._words(text) for text in texts]
        whole = [text for text, words in zip(texts, split, strict=True) if words is None]
        ids_of = self._learn(set().union(*(words for words in split if words is not None)))
        encoded_whole = iter(self._encode(whole) if whole else [])
        return [
            next(encoded_whole)
            if words is None
            else np.frombuffer(b"".join(map(ids_of, words)), np.uint32)
            for words in split
        ]

    def _learn(self, words: set[str]) -> Callable[[str], bytes]:
        """Returns the look-up that knows these words.

        Not the dictionary: other threads write to it, and who looks through it meets that.
        """
        known = self._known
        new = {word for word in words if word not in known}
        if len(known) + len(new) > _ENTRIES:
            # Not cleared: another thread may be reading it.
            known = self._known = {}
            new = words
        # Sorted: a set's order differs between processes, and so would any error's place.
        order = sorted(new)
        for word, ids in zip(order, self._encode(order) if order else [], strict=True):
            known[word] = ids.tobytes()
        return known.__getitem__


def _bert_words(text: str) -> list[str] | None:
    if _NOT_BERTS_SPACES.search(text):
        return None
    words = text.split()
    return words if len(text) <= _LONGEST_MEAN_WORD * (len(words) + 1) else None


def _byte_level_words(text: str) -> list[str] | None:
    if not text:
        return []
    words = _BYTE_LEVEL_WORD.split(text)
    return words if len(text) <= _LONGEST_MEAN_WORD * (len(words) + 1) else None
