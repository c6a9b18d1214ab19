"""Texts to embeddings with a sentence model, as sentence-transformers computes them."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from minilm_jax.convert.model import Model
from minilm_jax.convert.sentence import Sentence
from minilm_jax.encoder.config import Compute
from minilm_jax.encoder.encoder import encode
from minilm_jax.encoder.heads import Pooling, pool
from minilm_jax.errors import ConfigError
from minilm_jax.jobs.trained_model import load, tokenizer_of
from minilm_jax.settings import Positive, check
from minilm_jax.train.devices import Devices

_SHORTEST_ROW = 16
_RUNS_AHEAD = 4
"""Batches that may be on the device while the next one is made."""


class SentenceEncoder:
    """A sentence model with its tokenizer, on this process's devices; each takes part of the texts.

    >>> encoder = SentenceEncoder("sentence-transformers/all-MiniLM-L6-v2")
    >>> encoder(["one text", "another"]).shape
    (2, 384)
    """

    sentence: Sentence
    """Pooling, normalisation and the length at which texts are cut."""
    width: int
    """Numbers in an embedding."""

    def __init__(
        self,
        source: str | Path | Model,
        *,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        compute: Compute | None = None,
    ) -> None:
        """Reads the model; what is not given is as the model's own files say.

        Args:
          source: a folder, a Hub id, the folder of a run of ours, or a model that was read from
            one of them.
          pooling: "mean" of the tokens or the first one's state, "cls". Needed where the source is
            an encoder alone.
          normalize: whether embeddings have length 1; False for an encoder alone.
          max_length: tokens at which a text is cut, the two special ones included.
          compute: dtype and kernels; fp32 if not given.

        Raises:
          CheckpointError: the source is not there, broken or of another family.
          ConfigError: it is an encoder alone and `pooling` is not given; it has no tokenizer; or
            `max_length` does not fit.
        """
        check("pooling", pooling, Pooling | None)
        check("normalize", normalize, bool | None)
        check("max_length", max_length, int | None)
        check("compute", compute, Compute | None)
        check("source", source, str | Path | Model)
        if isinstance(source, Model):
            model, self._tokenizer = source, tokenizer_of(source)
        else:
            model, self._tokenizer = load(str(source))
        config = model.config
        sentence = model.sentence
        if sentence is None:
            if pooling is None:
                raise ConfigError(
                    f"model {model.source} does not say how its states become an embedding: it has "
                    "no modules.json; give pooling='mean' or pooling='cls'"
                )
            sentence = Sentence(pooling=pooling, normalize=False, max_length=config.max_length)
        given = {"pooling": pooling, "normalize": normalize, "max_length": max_length}
        changes: Any = {name: value for name, value in given.items() if value is not None}
        self.sentence = sentence = dataclasses.replace(sentence, **changes)
        if not 3 <= sentence.max_length <= config.max_length:
            raise ConfigError(
                f"max_length is {sentence.max_length}: give 3 to {config.max_length}, the model's "
                "positions"
            )
        self.width = config.hidden_size
        self._devices = Devices("mesh", devices=jax.local_devices())
        self._params = self._devices.place(model.params["encoder"])
        compute = Compute() if compute is None else compute

        def embed(params: Any, _: None, batch: Mapping[str, Array]) -> Float[Array, "B D"]:
            hidden = encode(config, params, batch, compute=compute).last_hidden_state
            return pool(
                hidden,
                segments=batch["pooled"],
                pooling=sentence.pooling,
                normalize=sentence.normalize,
            )

        self._embed = self._devices.lift_evaluation(embed)

    def __call__(
        self, texts: Iterable[str], *, prompt: str | None = None, batch_tokens: int = 4096
    ) -> Float32[np.ndarray, "N D"]:
        """Returns the embeddings of the texts, in their order.

        Texts are sorted by length first. A batch is as long as its longest text, rounded up to one
        of few lengths, and has the more rows the shorter they are. Special tokens that are spelled
        out in a text stay text.

        Args:
          texts: any number of them.
          prompt: put in front of each; the model's default prompt if not given. Models such as E5
            need one ("query: ").
          batch_tokens: of a batch on one device, padding included; more suit an accelerator.

        Raises:
          ConfigError: an argument is of another type, such as one string for `texts`.
        """
        if isinstance(texts, str | Mapping | Set):
            raise ConfigError(f"texts is one {type(texts).__name__}, {texts!r:.60}: give a list")
        check("prompt", prompt, str | None)
        check("batch_tokens", batch_tokens, Positive)
        texts = list(texts)
        for index, text in enumerate(texts):
            check(f"texts[{index}]", text, str)
        prompt = self._default_prompt() if prompt is None else prompt
        encoded = self._tokenizer.encode([self._clean(prompt + text) for text in texts])
        unpooled = 0
        if prompt and not self.sentence.include_prompt:
            unpooled = 1 + len(self._tokenizer.encode([self._clean(prompt)])[0])
            if unpooled > self.sentence.max_length - 2:
                raise ConfigError(
                    f"prompt has {unpooled - 1} tokens, and max_length is"
                    f" {self.sentence.max_length}: give a shorter prompt, no text is left"
                )
        order = np.argsort([-len(ids) for ids in encoded], kind="stable")
        embeddings = np.empty((len(encoded), self.width), np.float32)
        running: deque[tuple[np.ndarray, jax.Array]] = deque()

        def finish() -> None:
            chosen, found = running.popleft()
            embeddings[chosen] = np.asarray(found)[: len(chosen)]

        count = self._devices.count
        while len(order):
            length = self._row_length(encoded[order[0]])
            room = max(1, batch_tokens // length)
            chosen, order = np.split(order, [room * count])
            batch = self._tokenizer.pad(
                [encoded[index] for index in chosen],
                max_length=self.sentence.max_length,
                multiple_of=length,
            )
            batch["pooled"] = batch["segments"].copy()
            batch["pooled"][:, :unpooled] = 0
            each = -(-len(chosen) // count)
            rows = count * min(room, 1 << (each - 1).bit_length())
            filled = ((0, rows - len(chosen)), (0, 0))
            placed = self._devices.place_batch({k: np.pad(x, filled) for k, x in batch.items()})
            # Dispatched, not waited for: the next batch is made meanwhile.
            running.append((chosen, self._embed(self._params, None, placed)))
            if len(running) > _RUNS_AHEAD:
                finish()
        while running:
            finish()
        return embeddings

    def _row_length(self, ids: np.ndarray) -> int:
        """Returns 2ⁿ or 3·2ⁿ tokens: a corpus of all lengths compiles a dozen shapes."""
        needed = max(len(ids) + 2, _SHORTEST_ROW)
        power = 1 << (needed - 1).bit_length()
        length = power * 3 // 4 if needed <= power * 3 // 4 else power
        return min(length, self.sentence.max_length)

    def _clean(self, text: str) -> str:
        # Half of a surrogate pair is no Unicode, and tokenizers refuse it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
        return text.lower() if self.sentence.lower_case else text

    def _default_prompt(self) -> str:
        settings = self.sentence.settings
        name = settings.get("default_prompt_name")
        prompts = settings.get("prompts")
        found = prompts.get(name) if name and isinstance(prompts, Mapping) else ""
        if not isinstance(found, str):
            raise ConfigError(f"the model's prompts have no text {name!r}: give prompt=")
        return found
