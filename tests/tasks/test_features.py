"""Rows, windows and answers: nothing is cut wrongly, nothing is lost, offsets lead back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_files import CONTEXTS
from tiny_models import write_sentencepiece, write_wordpiece

from minilm_jax.data.tokenizers import load_tokenizer
from minilm_jax.errors import ConfigError
from minilm_jax.tasks.answers import AnswerConfig, answer, cut
from minilm_jax.tasks.batches import RowConfig, TaskBatches
from minilm_jax.tasks.examples import Answer, QuestionExample, Skips, TextExample
from minilm_jax.tasks.features import (
    Feature,
    LengthConfig,
    Window,
    _shares,
    _widest,
    _window_starts,
    question_features,
    text_features,
)


@pytest.fixture(scope="module", params=["wordpiece", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write = {"wordpiece": write_wordpiece, "sentencepiece": write_sentencepiece}[request.param]
    return load_tokenizer(write(folder))


def question(context, gold, *, question="Who ?"):
    answers = (Answer(text=gold, start=context.index(gold)),) if gold else ()
    return QuestionExample(id="q", question=question, context=context, answers=answers)


# Texts


@pytest.mark.parametrize(
    ("a", "b", "room", "kept"),
    [(3, 4, 10, (3, 4)), (10, 2, 8, (6, 2)), (2, 10, 8, (2, 6)), (9, 9, 7, (3, 4)),
     (9, 8, 7, (4, 3)), (20, 0, 8, (8, 0))],
)  # fmt: skip
def test_the_longer_text_gives_way(a, b, room, kept):
    assert _shares(a, b, room=room) == kept


@pytest.mark.torch
def test_pairs_are_cut_as_transformers_cuts_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_wordpiece(tmp_path)
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    words = CONTEXTS["en"][0].split()
    for a in (1, 3, 9, 12):
        for b in (1, 4, 9, 15):
            example = TextExample(id="0", text=" ".join(words[:a]), text_pair=" ".join(words[:b]))
            for length in (9, 10, 16):
                config = LengthConfig(max_length=length)
                (ours,) = text_features([example], tokenizer, config=config)
                expected = theirs(
                    example.text, example.text_pair, truncation=True, max_length=length
                )
                assert ours.ids.tolist() == expected["input_ids"]
                assert ours.token_type_ids.tolist() == expected["token_type_ids"]


def test_labels_are_found_by_name_in_the_models_order(tokenizer):
    examples = [TextExample(id="0", text="a", label="neutral"), TextExample(id="1", text="b")]
    labels = ("contradiction", "entailment", "neutral")
    found = text_features(examples, tokenizer, config=LengthConfig(), labels=labels)
    assert [feature.label for feature in found] == [2, None]


# Windows


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_everything_once_widest(length, room, stride):
    stride = min(stride, room)
    starts = _window_starts(length, room=room, stride=stride)
    assert starts[0] == 0 and starts[-1] + room >= length
    assert all(start + room < length for start in starts[:-1])
    widest = _widest(length, starts, room)
    for position in range(length):
        # BERT's definition, written out: the first window of the largest score.
        scores = [
            min(position - s, min(s + room, length) - 1 - position)
            + 0.01 * (min(s + room, length) - s)
            if s <= position < min(s + room, length)
            else -1.0
            for s in starts
        ]
        assert widest[position] == int(np.argmax(scores))


def test_windows_hold_the_answer_or_point_at_cls(tokenizer):
    context, pairs = CONTEXTS["en"]
    context = "It is a plain film. " * 4 + context
    example = question(context, pairs[1][1])
    config = LengthConfig(max_length=40, max_query_length=8, doc_stride=12)
    found = question_features([example], tokenizer, config=config, purpose="train", skips=Skips())
    assert len(found) > 2
    assert any(feature.label != (0, 0) for feature in found)
    for feature in found:
        assert len(feature.ids) <= 40 and feature.ids[0] == tokenizer.cls_id
        assert feature.ids[feature.window.first - 1] == tokenizer.sep_id
        if feature.label != (0, 0):
            first, last = (column - feature.window.first for column in feature.label)
            start, end = feature.window.offsets[first, 0], feature.window.offsets[last, 1]
            assert pairs[1][1] in context[start:end]


def test_a_stride_that_leaves_gaps_is_refused(tokenizer):
    config = LengthConfig(max_length=40, max_query_length=20, doc_stride=30)
    message = (
        "text in between would never be read; give a smaller --lengths.doc-stride or --lengths"
    )
    with pytest.raises(ConfigError, match=message):
        question_features(
            [question("a b", "a")], tokenizer, config=config, purpose="train", skips=Skips()
        )


# Answers


def logits_for(features, example, config):
    """Logits of a model that is sure of the first gold answer, wherever a window holds it."""
    start = [np.zeros(config.max_length, np.float32) for _ in features]
    end = [np.zeros(config.max_length, np.float32) for _ in features]
    gold = example.answers[0]
    for row, feature in enumerate(features):
        offsets = feature.window.offsets
        inside = np.flatnonzero((offsets[:, 1] > gold.start) & (offsets[:, 0] < gold.end))
        if len(inside):
            start[row][feature.window.first + inside[0]] = 9
            end[row][feature.window.first + inside[-1]] = 9
    return start, end


@pytest.mark.parametrize("language", CONTEXTS)
def test_every_languages_answers_come_back_to_the_character(tokenizer, language):
    """No blanks, right to left, vowel signs, decomposed accents; in windows of 12 tokens."""
    context, pairs = CONTEXTS[language]
    for padding in ("", "  . " * 9):
        for _, gold in pairs:
            example = question(padding + context, gold, question="?")
            config = LengthConfig(max_length=40, max_query_length=4, doc_stride=12)
            features = question_features(
                [example], tokenizer, config=config, purpose="train", skips=Skips()
            )
            found = answer(
                example.context,
                features,
                *logits_for(features, example, config),
                config=AnswerConfig(),
                no_answer="impossible",
            )
            assert found.text == gold
            best = found.n_best[0]
            assert example.context[best.start : best.end] == gold
            assert sum(c.probability for c in found.n_best) == pytest.approx(1.0)


def plain(context, scores, *, first=2, widest=None, offsets=None):
    """A feature of one-letter words and its start and end logits, [CLS] first."""
    count = len(context.split())
    places = [(2 * i, 2 * i + 1) for i in range(count)] if offsets is None else offsets
    window = Window(
        first=first,
        offsets=np.array(places, np.int32).reshape(-1, 2),
        widest=np.ones(count, bool) if widest is None else np.array(widest),
    )
    none = np.empty(0, np.int32)
    feature = Feature(example=0, ids=none, token_type_ids=none.astype(np.uint8), window=window)
    return feature, *(np.array(values, np.float32) for values in scores)


def ask(context, *windows, **config):
    features, starts, ends = zip(*windows, strict=True)
    return answer(
        context, features, starts, ends, config=AnswerConfig(**config), no_answer="possible"
    )


def test_the_best_span_ends_after_it_begins_and_lies_in_the_context():
    # The question's column 1 and the padding's column 5 score highest, and count for nothing.
    window = plain("a b c", ([1, 9, 2, 5, 0, 9], [1, 9, 6, 0, 4, 9]))
    found = ask("a b c", window)
    assert found.text == "b c"  # 5 + 4; "a" alone is 2 + 6; b before a is no span
    assert found.no_answer_odds == pytest.approx(2 - 9)
    assert [c.text for c in found.n_best] == ["b c", "a", "a b c", "b", "c", "a b", ""][:7]


def test_no_answer_is_given_beyond_the_threshold_only():
    window = plain("a b c", ([4, 0, 2, 0, 0], [4, 0, 2, 0, 0]))
    assert ask("a b c", window).text == ""
    assert ask("a b c", window).best_text == "a"
    assert ask("a b c", window).no_answer_odds == 4
    assert ask("a b c", window, null_threshold=4.0).text == "a"


def test_the_smallest_score_of_no_answer_counts():
    one = plain("a b", ([9, 0, 2, 0], [9, 0, 2, 0]))
    two = plain("a b", ([1, 0, 0, 0], [1, 0, 0, 0]))
    assert ask("a b", one, two).text == ask("a b", two, one).text == "a"


def test_answers_begin_only_where_the_window_is_widest():
    one = plain("a b", ([0, 0, 9, 1], [0, 0, 9, 1]), widest=[False, True])
    assert ask("a b", one).best_text == "b"


def test_long_answers_and_few_candidates():
    window = plain("a b c d", ([0, 0, 9, 0, 0, 0], [0, 0, 0, 0, 0, 9]))
    assert ask("a b c d", window).text == "a b c d"
    # The best end is too far away, and with n_best 1 no other is looked at.
    short = ask("a b c d", window, max_answer_length=2, n_best=1)
    assert (short.text, short.best_text, short.no_answer_odds) == ("", "", 1e4)


def test_a_word_that_is_repeated_takes_one_place_among_the_best():
    window = plain("a a", ([0, 0, 4, 5, 0], [0, 0, 5, 4, 0]))
    found = ask("a a", window, n_best=2)
    assert [(c.text, c.score) for c in found.n_best] == [("a", 9), ("a a", 8), ("", 0)]


def test_marks_after_a_letter_belong_to_it():
    assert cut("Ko\u0308nig", 0, 2) == (0, 3)
    assert cut(" हिन्दी ", 0, 6) == (1, 7)
    assert cut("a  b", 0, 3) == (0, 1)


# Batches


def rows(*lengths):
    return [
        Feature(
            example=i,
            ids=np.full(n, 7, np.int32),
            token_type_ids=np.zeros(n, np.uint8),
            label=i % 2,
        )
        for i, n in enumerate(lengths)
    ]


def test_every_row_is_scored_once_whatever_the_layout():
    features = rows(3, 40, 7, 33, 5)
    for layout, shapes in (("padded", {64}), ("bucketed", {64, 32})):
        config = RowConfig(batch_size=2, layout=layout)
        batches = TaskBatches(features, config=config, max_length=64, pad_id=1)
        seen, weights, lengths = [], 0, set()
        for index, batch in batches.in_order():
            seen += index.tolist()
            weights += batch["weights"].sum()
            lengths.add(batch["input_ids"].shape[1])
            tokens = (batch["segments"] > 0).sum(1)
            assert tokens[: len(index)].tolist() == [len(features[i].ids) for i in index]
            assert (tokens[len(index) :] == 0).all()
            assert (batch["input_ids"][batch["segments"] == 0] == 1).all()
        assert sorted(seen) == [0, 1, 2, 3, 4] and weights == 5 and lengths == shapes


def test_an_epoch_holds_every_row_once_and_the_next_is_another(monkeypatch):
    features = rows(*range(1, 12))
    batches = TaskBatches(features, config=RowConfig(batch_size=4), max_length=64, pad_id=0)
    assert batches.steps_an_epoch == 3

    def epoch(number, seed):
        steps = range(3 * number, 3 * number + 3)
        made = [batches.at(step, seed=seed) for step in steps]
        return [n for batch in made for n in (batch["segments"] > 0).sum(1).tolist() if n]

    assert sorted(epoch(0, 1)) == sorted(epoch(1, 1)) == list(range(1, 12))
    assert epoch(0, 1) == epoch(0, 1) != epoch(1, 1)
    assert epoch(0, 1) != epoch(0, 2)
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", None)
        assert len(epoch(0, 2)) == 11  # shuffled once, not at each of its steps
    last = batches.at(2, seed=1)
    assert last["weights"].tolist() == [1, 1, 1, 0]
