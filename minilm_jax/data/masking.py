"""Masked language modelling targets: a pure function of (seed, step, row of the global batch)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from minilm_jax.data.batches import Batch
from minilm_jax.data.randomness import random_bits, uniform
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.errors import ConfigError
from minilm_jax.settings import Settings, Share, above, at_most

NOT_PREDICTED = -1
# Numbers that keep the draws of one row apart.
_CHOICE, _TREATMENT, _REPLACEMENT = 1, 2, 3


@dataclass(frozen=True)
class MaskingConfig(Settings, name="mask"):
    """What is predicted and what the model sees in its place."""

    unit: Literal["token", "word"] = "token"
    """What is chosen: single tokens, or whole words with all their pieces."""
    probability: Annotated[float, above(0), at_most(1)] = 0.15
    """Of a unit to be chosen."""
    masked: Share = 0.8
    """Share of the chosen tokens that become the mask token."""
    random: Share = 0.1
    """Share that become a random token; the rest stay as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked + self.random > 1:
            raise ConfigError(
                f"mask.masked is {self.masked}, mask.random {self.random}: give at most 1 in all"
            )


class Masking:
    """Adds `labels` to batches."""

    def __init__(self, config: MaskingConfig, *, seed: int, tokenizer: Tokenizer) -> None:
        self._config = config
        self._seed = seed
        self._mask_id = tokenizer.mask_id
        self._continuations = tokenizer.continuations
        special = list(tokenizer.special_ids)
        self._special = np.zeros(tokenizer.vocab_size, bool)
        self._special[special] = True
        # The unknown token is text that is predicted; the others are never drawn or chosen.
        self._special[tokenizer.unk_id] = False
        self._replacements = np.delete(np.arange(tokenizer.vocab_size, dtype=np.int32), special)

    def __call__(self, batch: Batch, *, step: int) -> Batch:
        """Returns the batch with tokens replaced and `labels` int32 [B, L].

        A label is the token that was there, or -1 where nothing is predicted. Padding and special
        tokens are never chosen. The draws depend on the seed, the step, `batch["rows"]` and the
        place in the row, so any slice of a global batch is masked as the whole is.
        """
        ids, segments = batch["input_ids"], batch["segments"]
        candidates = (segments > 0) & ~self._special[ids]
        places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        units = self._word_starts(ids, segments) if self._config.unit == "word" else places
        rows = batch["rows"].astype(np.int64)[:, None]
        key = (self._seed, step, rows)
        chosen = candidates & (uniform(*key, _CHOICE, units) < self._config.probability)
        draw = uniform(*key, _TREATMENT, places)
        picks = random_bits(*key, _REPLACEMENT, places) % np.uint64(len(self._replacements))
        masked = chosen & (draw < self._config.masked)
        replaced = chosen & ~masked & (draw < self._config.masked + self._config.random)
        seen = np.where(masked, np.int32(self._mask_id), ids)
        seen = np.where(replaced, self._replacements[picks.astype(np.int64)], seen)
        labels = np.where(chosen, ids, np.int32(NOT_PREDICTED))
        return {**batch, "input_ids": seen.astype(np.int32), "labels": labels.astype(np.int32)}

    def _word_starts(self, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """Returns the place [B, L] at which each token's word begins."""
        begins = ~self._continuations[ids]
        # After a special token or at a segment's beginning a word begins, whatever its piece.
        begins[:, 0] = True
        begins[:, 1:] |= self._special[ids[:, :-1]] | (segments[:, 1:] != segments[:, :-1])
        places = np.arange(ids.shape[1])
        return np.maximum.accumulate(np.where(begins, places, 0), axis=1)
