"""Words are remembered once for all threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minilm_jax.data import word_cache
from minilm_jax.data.word_cache import WordCache


def test_threads_share_it_while_it_is_full(monkeypatch):
    monkeypatch.setattr(word_cache, "_ENTRIES", 50)

    def letters(texts):
        return [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in texts]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    cache = WordCache(letters, words="bert")

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(300):
            words = ["".join(chr(97 + x) for x in rng.integers(0, 26, 4)) for _ in range(30)]
            (ids,) = cache.encode([" ".join(words)])
            assert "".join(map(chr, ids)) == "".join(words)
        return True

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
