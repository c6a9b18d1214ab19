import json
import tracemalloc
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm_jax.data.batches import BatchConfig, Batches
from minilm_jax.data.prefetch import Prefetch
from minilm_jax.errors import ConfigError, DataError

LENGTHS = [*range(1, 60), 100, 3, 250, 30, 31, 62, 61, 7, 7, 7]


def pieces_of(batch, toy):
    """The pieces of a batch, each without its special tokens; checks what surrounds them."""
    found = []
    for ids, segments in zip(batch["input_ids"], batch["segments"], strict=True):
        assert (ids[segments == 0] == toy.pad_id).all()
        assert (np.diff((segments > 0).astype(int)) <= 0).all(), "padding is at the right end"
        for number in range(1, segments.max(initial=0) + 1):
            places = np.flatnonzero(segments == number)
            assert len(places) >= 3 and (np.diff(places) == 1).all()
            piece = ids[places]
            assert piece[0] == toy.cls_id and piece[-1] == toy.sep_id
            assert not np.isin(piece[1:-1], toy.special_ids).any()
            found.append(tuple(piece[1:-1].tolist()))
    return found


def expected_pieces(corpora, inside):
    pieces = Counter()
    for corpus in corpora:
        for i in range(len(corpus)):
            ids = corpus.document(i).tolist()
            pieces.update(tuple(ids[k : k + inside]) for k in range(0, len(ids), inside))
    return pieces


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
    "shape",
    [
        {"layout": "packed"},
        {"layout": "padded"},
        {"layout": "padded", "buckets": (8, 16)},
    ],
)
def test_each_document_once_an_epoch_without_loss(make_corpus, toy, shape):
    corpora = [make_corpus("a", LENGTHS), make_corpus("b", [5, 90, 2], first=200)]
    batches = Batches(
        corpora, BatchConfig(batch_size=4, sequence_length=32, **shape), seed=3, tokenizer=toy
    )
    expected = expected_pieces(corpora, 30)
    rows = []
    steps = 3 * batches.rows_per_epoch // 4 + 1
    for step in range(steps):
        batch = batches.at(step)
        rows += [pieces_of({k: v[i : i + 1] for k, v in batch.items()}, toy) for i in range(4)]
    for epoch in range(3):
        first = epoch * batches.rows_per_epoch
        assert Counter(chain(*rows[first : first + batches.rows_per_epoch])) == expected
    assert rows[: batches.rows_per_epoch] != rows[batches.rows_per_epoch :][: len(rows) // 3]


def test_the_contract_of_a_batch(make_corpus, toy):
    batches = Batches(
        [make_corpus("a", LENGTHS)],
        BatchConfig(batch_size=4, sequence_length=32),
        seed=3,
        tokenizer=toy,
    )
    batch = batches.at(0, rows=slice(2, 4))
    assert batch["input_ids"].shape == batch["segments"].shape == (2, 32)
    assert {v.dtype for v in batch.values()} == {np.dtype(np.int32)}
    assert batch["rows"].tolist() == [2, 3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layout": "padded", "buckets": (8, 16)},
        {"weights": (3.0, 1.0)},
        {"language_exponent": 0.3},
        {"weights": (3.0, 1.0), "language_exponent": 0.5, "layout": "padded", "buckets": (16,)},
    ],
)
def test_hosts_workers_and_resuming_do_not_change_the_order(
    make_corpus, toy, hosts, workers, settings
):
    def fresh():
        return Batches(
            [
                make_corpus("a", LENGTHS, languages=["en", "de"] * 34 + ["sw"] * 1),
                make_corpus("b", [40] * 9, first=99),
            ],
            BatchConfig(batch_size=8, sequence_length=32, **settings),
            seed=11,
            tokenizer=toy,
        )

    batches = fresh()
    # Over several epochs, each part read by a new process's worth of state.
    whole = {step: batches.at(step) for step in range(20)}
    for start, stop in ((0, 5), (5, 6), (6, 20)):
        parts = []
        for host in range(hosts):
            mine = slice(host * 8 // hosts, (host + 1) * 8 // hosts)
            resumed = fresh()
            with Prefetch(
                lambda step, b=resumed, m=mine: b.at(step, rows=m),
                start=start,
                stop=stop,
                workers=workers,
            ) as stream:
                parts.append(list(stream))
        for step, *shares in zip(range(start, stop), *parts, strict=True):
            joined = {name: np.concatenate([s[name] for s in shares]) for name in shares[0]}
            same(joined, whole[step])


def test_the_order_is_the_recorded_one(make_corpus, toy):
    """May change only with `_ORDER` in batches.py: a run resumed across it reads other text."""
    batches = Batches(
        [make_corpus("a", LENGTHS)],
        BatchConfig(batch_size=2, sequence_length=16),
        seed=7,
        tokenizer=toy,
    )
    first = batches.at(5)["input_ids"][:, 1:4].tolist()
    assert first == [[169, 176, 183], [35, 42, 49]]


def test_seeds_and_epochs_shuffle_everything(make_corpus, toy):
    corpus = make_corpus("a", [30] * 400)

    def order(seed, epoch):
        batches = Batches(
            [corpus], BatchConfig(batch_size=400, sequence_length=32), seed=seed, tokenizer=toy
        )
        return batches.at(epoch)["input_ids"][:, 1]

    natural = np.asarray([corpus.document(i)[0] for i in range(400)])
    orders = [natural, order(0, 0), order(0, 1), order(1, 0)]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.05
        np.testing.assert_array_equal(np.sort(a), np.sort(natural))


def test_weights_are_kept(make_corpus, toy):
    corpora = [make_corpus("a", [30] * 50), make_corpus("b", [31] * 7)]
    batches = Batches(
        corpora,
        BatchConfig(batch_size=64, sequence_length=64, layout="padded", weights=(1.0, 3.0)),
        seed=0,
        tokenizer=toy,
    )
    lengths = np.concatenate([(batches.at(s)["segments"] > 0).sum(1) for s in range(50)])
    assert (lengths == 33).mean() == pytest.approx(0.75, abs=0.02)
    assert batches.shares() == {"corpus 0": 0.25, "corpus 1": 0.75}
    read = {"corpus 0": (lengths == 32).sum() / 50, "corpus 1": (lengths == 33).sum() / 7}
    assert batches.passes(50) == pytest.approx(read, rel=0.05)
    # The small corpus has whole epochs of its own.
    seen = Counter(
        tuple(r.tolist()) for s in range(50) for r in batches.at(s)["input_ids"] if r[32] == 3
    )
    assert len(seen) == 7 and max(seen.values()) - min(seen.values()) <= 1


def test_languages_are_sampled_with_an_exponent(make_corpus, toy):
    languages = ["en"] * 64 + ["sw"] * 4
    corpus = make_corpus("a", [30] * 68, languages=languages)
    batches = Batches(
        [corpus],
        BatchConfig(batch_size=16, sequence_length=32, language_exponent=0.5),
        seed=0,
        tokenizer=toy,
    )
    # 64 to 4 documents: 8 to 2 after the square root.
    assert batches.shares() == pytest.approx({"en": 0.8, "sw": 0.2})
    # A row holds one of these documents: four steps read 51 of 64 and 13 of 4.
    assert batches.passes(4) == pytest.approx({"en": 0.8, "sw": 3.2})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=2, max_size=5), st.integers(0, 3))
def test_the_schedule_gives_each_place_of_each_stream_once(weights, seed):
    from minilm_jax.data.batches import _BLOCK, _Schedule

    schedule = _Schedule(weights, seed=seed)
    numbers, places = schedule.look_up(np.arange(2 * _BLOCK))
    for stream in range(len(weights)):
        mine = np.sort(places[numbers == stream])
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
        assert len(mine) / (2 * _BLOCK) == pytest.approx(schedule.weights[stream], abs=1e-4)


@pytest.mark.parametrize("shape", [{}, {"layout": "padded"}, {"layout": "padded", "buckets": (9,)}])
def test_evaluation_reads_every_document_once_and_pads_with_empty_rows(make_corpus, toy, shape):
    corpora = [make_corpus("a", LENGTHS), make_corpus("b", [40] * 3, first=99)]
    config = BatchConfig(batch_size=8, sequence_length=32, weights=(1.0, 5.0), **shape)
    batches = Batches(corpora, config, seed=0, tokenizer=toy)
    found = list(batches.evaluation_batches())
    assert Counter(chain(*(pieces_of(b, toy) for b in found))) == expected_pieces(corpora, 30)
    assert all(len(b["rows"]) == 8 for b in found)
    empty = [(b["segments"] == 0).all(axis=1) for b in found]
    partial = [number for number, rows in enumerate(empty) if rows.any()]
    assert len(partial) <= 1
    assert "buckets" in shape or partial in ([], [len(found) - 1])
    assert not any(rows[0] for rows in empty)
    halves = [list(batches.evaluation_batches(rows=slice(a, a + 4))) for a in (0, 4)]
    for whole, left, right in zip(found, *halves, strict=True):
        same(whole, {k: np.concatenate([left[k], right[k]]) for k in whole})


def test_an_evaluation_reads_a_part_alone(make_corpus, toy):
    mixed = make_corpus("a", LENGTHS, languages=["en", ""] * 34 + ["de"])
    german = make_corpus("b", [40] * 3, first=99, languages=["de"] * 3)
    config = BatchConfig(batch_size=8, sequence_length=32)

    def parts(*corpora):
        batches = Batches(corpora, config, seed=0, tokenizer=toy)
        return {
            name: Counter(
                chain(*(pieces_of(b, toy) for b in batches.evaluation_batches(documents=part)))
            )
            for name, part in batches.parts().items()
        }

    found = parts(mixed, german)
    whole = expected_pieces([mixed, german], 30)
    assert list(found) == [str(mixed.folder), str(german.folder), "no language", "de", "en"]
    assert found[str(german.folder)] == expected_pieces([german], 30)
    assert found[str(mixed.folder)] + found[str(german.folder)] == whole
    assert found["no language"] + found["de"] + found["en"] == whole
    assert found["de"] == expected_pieces([german], 30) + Counter(
        (*mixed.document(68)[i : i + 30],) for i in range(0, LENGTHS[68], 30)
    )
    assert not parts(german)
    # A language that is a corpus is told once.
    english = make_corpus("c", [12] * 4, languages=["en"] * 4)
    assert list(parts(german, english)) == [str(german.folder), str(english.folder)]


@pytest.mark.parametrize("shape", [{}, {"layout": "padded", "buckets": (8, 32)}])
def test_the_first_batches_of_an_evaluation_are_a_sample_of_all(make_corpus, toy, shape):
    """Rows are laid out by length; a measurement on the first of them must not be."""
    corpus = make_corpus("a", [126] * 300 + [5] * 300 + [20] * 300)
    config = BatchConfig(batch_size=4, sequence_length=128, **shape)
    batches = list(Batches([corpus], config, seed=0, tokenizer=toy).evaluation_batches())

    def longest_pieces(batches):
        found = list(chain(*(pieces_of(batch, toy) for batch in batches)))
        return np.mean([len(piece) == 126 for piece in found])

    third = longest_pieces(batches[: len(batches) // 3])
    assert third == pytest.approx(longest_pieces(batches), abs=0.1)


def test_packing_natural_documents_wastes_less_than_two_percent(bert, english, make_corpus, toy):
    corpus = make_corpus("a", [len(ids) for ids in bert.encode(english)])
    for length in (128, 512):
        batches = Batches(
            [corpus], BatchConfig(batch_size=8, sequence_length=length), seed=0, tokenizer=toy
        )
        assert batches.efficiency > 0.98


def test_what_decides_the_order_is_described(make_corpus, toy):
    """A run keeps the description and refuses to go on with another one."""
    corpus, other = make_corpus("a", LENGTHS), make_corpus("b", LENGTHS[:-1])
    config = BatchConfig(batch_size=8, sequence_length=32)
    old = Batches([corpus], config, seed=0, tokenizer=toy).describe()
    assert json.loads(json.dumps(old)) == old
    changed = BatchConfig(batch_size=16, sequence_length=64, language_exponent=0.3)
    new = Batches([corpus], changed, seed=0, tokenizer=toy).describe()
    differing = {name for name in old if old[name] != new[name]}
    assert differing == {"batch_size", "sequence_length", "language_exponent"}
    new = Batches([other], config, seed=0, tokenizer=toy).describe()
    assert {name for name in old if old[name] != new[name]} == {"corpora"}


def test_a_corpus_of_another_tokenizer_is_refused(make_corpus, bert):
    with pytest.raises(DataError, match=r"another tokenizer.*500 ids, not wordpiece, 30522"):
        Batches([make_corpus("a", LENGTHS)], BatchConfig(), seed=0, tokenizer=bert)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sequence_length": 2}, "sequence_length must be at least 3, got 2"),
        ({"buckets": (64,)}, "only layout padded"),
        ({"layout": "padded", "buckets": (64, 64)}, "growing lengths"),
        ({"layout": "padded", "buckets": (512,)}, "growing lengths"),
        ({"weights": (1.0, 0.0)}, "weights must be above 0 and finite"),
        ({"weights": (float("nan"),)}, "weights must be above 0 and finite"),
        ({"language_exponent": 1.5}, "at most 1, got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BatchConfig(**settings)


def test_weights_must_match_the_corpora(make_corpus, toy):
    with pytest.raises(ConfigError, match="2 entries for 1 corpora"):
        Batches([make_corpus("a", [5])], BatchConfig(weights=(1.0, 1.0)), seed=0, tokenizer=toy)
    with pytest.raises(DataError, match="no corpus"):
        Batches([], BatchConfig(), seed=0, tokenizer=toy)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_epochs_plan_takes_little_memory(layout):
    """Of a billion pieces a byte each is a gigabyte."""
    from minilm_jax.data.batches import _Stream

    lengths = np.random.default_rng(0).integers(1, 900, 100_000)
    config = BatchConfig(batch_size=8, sequence_length=256, layout=layout)
    stream = _Stream(np.arange(len(lengths)), lengths, config, seed=0, number=0)
    tracemalloc.start()
    try:
        plan = stream.plan(0)
        lasting, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lasting < 8.1 * stream.pieces
    assert most < 30 * stream.pieces
    assert sorted(plan.pieces.tolist()) == list(range(stream.pieces))
