import numpy as np
import pytest

from minilm_jax.data.masking import Masking, MaskingConfig
from minilm_jax.errors import ConfigError


@pytest.fixture
def batch(bert, english):
    """Real text, two segments a row and some padding."""
    ids = np.zeros((16, 96), np.int32)
    segments = np.zeros((16, 96), np.int32)
    for row, tokens in enumerate(t for t in bert.encode(english) if len(t) > 100):
        if row == 16:
            break
        ids[row, :40] = [101, *tokens[:38], 102]
        ids[row, 40:90] = [101, *tokens[38:86], 102]
        segments[row, :90] = [1] * 40 + [2] * 50
    return {"input_ids": ids, "segments": segments, "rows": np.arange(16, dtype=np.int32)}


def mask(bert, batch, *, step=0, seed=0, **settings):
    return Masking(MaskingConfig(**settings), seed=seed, tokenizer=bert)(batch, step=step)


@pytest.mark.parametrize("unit", ["token", "word"])
def test_labels_are_what_was_there_and_specials_are_never_chosen(bert, batch, unit):
    out = mask(bert, batch, unit=unit, probability=0.5)
    chosen = out["labels"] >= 0
    assert out["labels"].dtype == out["input_ids"].dtype == np.int32
    np.testing.assert_array_equal(out["labels"][chosen], batch["input_ids"][chosen])
    np.testing.assert_array_equal(out["input_ids"][~chosen], batch["input_ids"][~chosen])
    assert (out["labels"][~chosen] == -1).all()
    assert not (chosen & (batch["segments"] == 0)).any()
    assert not np.isin(batch["input_ids"][chosen], [101, 102, 0]).any()
    assert not np.isin(out["input_ids"][chosen], [101, 102, 0]).any()


def test_the_shares_are_fifteen_and_eighty_ten_ten(bert, batch):
    candidates = chosen = masked = same = 0
    for step in range(100):
        out = mask(bert, batch, step=step)
        where = out["labels"] >= 0
        candidates += ((batch["segments"] > 0) & (batch["input_ids"] > 103)).sum()
        chosen += where.sum()
        masked += (out["input_ids"][where] == bert.mask_id).sum()
        same += (out["input_ids"][where] == out["labels"][where]).sum()
    assert chosen / candidates == pytest.approx(0.15, abs=0.005)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert same / chosen == pytest.approx(0.1, abs=0.01)


def test_whole_words_are_chosen_whole(bert, batch):
    pieces = np.asarray(bert.pieces)[batch["input_ids"]]
    inside = np.char.startswith(pieces, "##")
    assert inside.sum() > 50
    chosen = mask(bert, batch, unit="word", probability=0.3)["labels"] >= 0
    same_word = inside[:, 1:] & (batch["input_ids"][:, :-1] > 103)
    assert (chosen[:, 1:] == chosen[:, :-1])[same_word].all()
    apart = mask(bert, batch, unit="token", probability=0.3)["labels"] >= 0
    assert not (apart[:, 1:] == apart[:, :-1])[same_word].all()


@pytest.mark.parametrize("unit", ["token", "word"])
def test_any_slice_of_the_batch_is_masked_as_the_whole(bert, batch, unit):
    whole = mask(bert, batch, unit=unit, step=7, seed=3)
    for rows in (slice(0, 4), slice(5, 6), slice(8, 16)):
        part = mask(bert, {k: v[rows] for k, v in batch.items()}, unit=unit, step=7, seed=3)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][rows])


def test_seed_step_and_row_each_change_the_choice(bert, batch):
    base = mask(bert, batch)["labels"]
    for other in (
        mask(bert, batch, step=1),
        mask(bert, batch, seed=1),
        mask(bert, {**batch, "rows": batch["rows"] + 16}),
    ):
        assert ((base >= 0) != (other["labels"] >= 0)).mean() > 0.1
    rows = {k: np.repeat(v[:1], 16, axis=0) for k, v in batch.items()}
    same_text = mask(bert, {**rows, "rows": batch["rows"]})["labels"]
    assert len({row.tobytes() for row in same_text}) == 16


@pytest.mark.parametrize(
    "settings", [{"probability": 0.0}, {"masked": 0.9, "random": 0.2}, {"random": -0.1}]
)
def test_shares_that_cannot_be_are_refused(settings):
    with pytest.raises(ConfigError):
        MaskingConfig(**settings)
