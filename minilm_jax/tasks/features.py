"""From examples to ids: pairs cut to length, and long documents as overlapping windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from minilm_jax.data.tokenizers import Encoded, Tokenizer
from minilm_jax.errors import ConfigError
from minilm_jax.settings import Positive, Settings
from minilm_jax.tasks.examples import QuestionExample, Skips, TextExample


@dataclass(frozen=True, kw_only=True)
class LengthConfig(Settings, name="lengths"):
    """How long inputs are, in tokens."""

    max_length: Positive = 128
    """Of a row, special tokens included; longer pairs are cut, longer contexts become windows."""
    max_query_length: Positive = 64
    """Questions are cut to this."""
    doc_stride: Positive = 128
    """Tokens from the beginning of one window to that of the next."""


@dataclass(frozen=True, kw_only=True)
class LengthOptions(Settings, name="lengths"):
    """Other lengths than those that a model was fine-tuned with; None keeps its own."""

    max_length: Positive | None = None
    """Of a row, special tokens included. Models that do not say theirs: 128, of questions 384."""
    max_query_length: Positive | None = None
    """Questions are cut to this; else 64."""
    doc_stride: Positive | None = None
    """Tokens from the beginning of one window to that of the next; else 128."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """The part of a context that a row holds, and its way back to the text."""

    first: int
    """Column of the row at which the context's tokens begin."""
    offsets: Int32[np.ndarray, "C 2"]
    """First character of each token and the one after its last, in the context."""
    widest: Bool[np.ndarray, "C"]
    """Whether the token has more context here than in any other window: answers begin only at
    such tokens."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One row of a batch."""

    example: int
    """Index of the example it is made of."""
    ids: Int32[np.ndarray, "L"]
    """Arrays, not lists: translate-train has six million rows."""
    token_type_ids: UInt8[np.ndarray, "L"]
    label: int | float | tuple[int, int] | None = None
    """Class index, score, or columns of the answer's first and last token ((0, 0), the [CLS]:
    not in this window)."""
    window: Window | None = None


def text_features(
    examples: Sequence[TextExample],
    tokenizer: Tokenizer,
    *,
    config: LengthConfig,
    labels: Sequence[str] = (),
) -> list[Feature]:
    """Returns one row an example, the longer text of a pair cut first.

    Args:
      examples: texts or pairs.
      tokenizer: of the model.
      config: lengths.
      labels: the model's class names in the order of its outputs; none for scores.
    """
    check_room(tokenizer, config)
    index = {name: i for i, name in enumerate(labels)}
    first = tokenizer.encode([example.text for example in examples])
    second = tokenizer.encode([example.text_pair or "" for example in examples])
    specials = {paired: _specials(tokenizer, paired=paired) for paired in (False, True)}
    found = []
    for number, example in enumerate(examples):
        paired = example.text_pair is not None
        room = config.max_length - specials[paired]
        lengths = _shares(len(first[number]), len(second[number]), room=room)
        row = tokenizer.build(
            first[number][: lengths[0]], second[number][: lengths[1]] if paired else None
        )
        label = index[example.label] if isinstance(example.label, str) else example.label
        found.append(_feature(number, row, label))
    return found


def check_room(tokenizer: Tokenizer, config: LengthConfig) -> None:
    """Raises ConfigError where a row has no place for a token of each text of a pair."""
    if config.max_length < _specials(tokenizer, paired=True) + 2:
        raise ConfigError(
            f"lengths.max_length={config.max_length} leaves no room for text; give a larger "
            "--lengths.max-length"
        )


def check_windows(tokenizer: Tokenizer, config: LengthConfig) -> None:
    """Raises ConfigError where windows of a context have gaps, or there is no room for one."""
    overhead = _specials(tokenizer, paired=True)
    smallest = config.max_length - config.max_query_length - overhead
    if smallest < 1:
        raise ConfigError(
            f"lengths.max_length={config.max_length} leaves no room for a context beside a question"
            f" of lengths.max_query_length={config.max_query_length} and {overhead} special tokens"
        )
    if smallest < config.doc_stride:
        raise ConfigError(
            f"lengths.doc_stride={config.doc_stride} is longer than the window of {smallest} "
            f"tokens that lengths.max_length={config.max_length} leaves beside a question of "
            f"lengths.max_query_length={config.max_query_length}: text in between would never be "
            "read; give a smaller --lengths.doc-stride or --lengths.max-query-length, or a larger "
            "--lengths.max-length"
        )


def question_features(
    examples: Sequence[QuestionExample],
    tokenizer: Tokenizer,
    *,
    config: LengthConfig,
    purpose: str,
    skips: Skips,
) -> list[Feature]:
    """Returns one or several windows an example, examples in order.

    Args:
      examples: questions on contexts.
      tokenizer: of the model.
      config: lengths.
      purpose: "train" labels the windows with the first gold answer.
      skips: counts the answers no token stands for.

    Raises:
      ConfigError: windows would have gaps between them, or no room for a context.
    """
    check_windows(tokenizer, config)
    overhead = _specials(tokenizer, paired=True)
    questions = tokenizer.encode([example.question for example in examples])
    found = []
    # A context has several questions in a row, and encoding it is the slow part.
    context, located = None, None
    for number, example in enumerate(examples):
        if located is None or example.context != context:
            context = example.context
            (located,) = tokenizer.encode_with_offsets([context])
        question = questions[number][: config.max_query_length]
        span = None
        if purpose == "train" and example.answers:
            answer = example.answers[0]
            span = _tokens(located.offsets, answer.start, answer.end)
            if span is None:
                skips.add("no token stands for the answer", example.origin)
                continue
        room = config.max_length - overhead - len(question)
        starts = _window_starts(len(located.ids), room=room, stride=config.doc_stride)
        widest = _widest(len(located.ids), starts, room)
        for position, start in enumerate(starts):
            inside = slice(start, start + room)
            row = tokenizer.build(question, located.ids[inside])
            first = len(row.ids) - 1 - len(located.ids[inside])
            label = None
            if purpose == "train":
                label = (0, 0)
                if span is not None and start <= span[0] and span[1] < start + room:
                    label = (first + span[0] - start, first + span[1] - start)
            window = Window(
                first=first, offsets=located.offsets[inside], widest=widest[inside] == position
            )
            found.append(_feature(number, row, label, window))
    return found


def _feature(
    example: int,
    row: Encoded,
    label: int | float | tuple[int, int] | None,
    window: Window | None = None,
) -> Feature:
    return Feature(
        example=example,
        ids=np.asarray(row.ids, np.int32),
        token_type_ids=np.asarray(row.token_type_ids, np.uint8),
        label=label,
        window=window,
    )


def _specials(tokenizer: Tokenizer, *, paired: bool) -> int:
    return len(tokenizer.build([], [] if paired else None).ids)


def _shares(a: int, b: int, *, room: int) -> tuple[int, int]:
    """Returns how many tokens of each text are kept: the longer one gives way first.

    As the tokenizers library counts: both keep half where both are longer, and of an odd room the
    longer one (the second of equals) has the extra token.
    """
    if a + b <= room:
        return a, b
    shorter = min(a, b, room // 2)
    return (shorter, room - shorter) if a <= b else (room - shorter, shorter)


def _window_starts(length: int, *, room: int, stride: int) -> list[int]:
    """Returns where windows begin; the last one is the first to reach the end."""
    return list(range(0, max(length - room, 0) + stride, stride))


def _widest(length: int, starts: list[int], room: int) -> np.ndarray:
    """Returns for each token the window in which it has the most context.

    Context is the smaller one of the tokens to its left and right, and a little for the window's
    length, as in BERT's code.
    """
    best = np.full(length, -1.0)
    widest = np.zeros(length, np.int64)
    for index, start in enumerate(starts):
        stop = min(start + room, length)
        left = np.arange(stop - start)
        score = np.minimum(left, left[::-1]) + 0.01 * (stop - start)
        better = score > best[start:stop]
        best[start:stop][better] = score[better]
        widest[start:stop][better] = index
    return widest


def _tokens(offsets: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """Returns the first and the last token that stand for characters of [start, end)."""
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < end))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None
