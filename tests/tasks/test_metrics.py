"""The metrics against values worked out by hand and cases published with the official scripts."""

import math
import warnings

import numpy as np
import pytest

from minilm_jax.errors import DataError
from minilm_jax.tasks.catalog import TASKS
from minilm_jax.tasks.examples import Answer, QuestionExample, TextExample
from minilm_jax.tasks.metrics import accuracy, f1, matthews, pearson, spearman
from minilm_jax.tasks.mlqa_metric import mlqa_scores
from minilm_jax.tasks.mlqa_metric import normalize as normalize_mlqa
from minilm_jax.tasks.scoring import score_texts
from minilm_jax.tasks.squad_metric import normalize, squad1_scores, squad2_scores, token_f1

PREDICTED = [1, 1, 0, 1, 0, 0, 1, 0]
GOLD = [1, 0, 0, 1, 1, 0, 1, 0]  # TP 3, FP 1, FN 1, TN 3


def question(i, *golds):
    answers = tuple(Answer(text=gold, start=0) for gold in golds)
    return QuestionExample(id=i, question="?", context="", answers=answers)


def test_accuracy_f1_and_matthews_by_hand():
    assert accuracy(PREDICTED, GOLD) == 6 / 8
    assert f1(PREDICTED, GOLD, positive=1) == 2 * 3 / (2 * 3 + 1 + 1)
    assert matthews(PREDICTED, GOLD) == pytest.approx((3 * 3 - 1 * 1) / math.sqrt(4 * 4 * 4 * 4))
    assert matthews(GOLD, GOLD) == pytest.approx(1.0)
    assert matthews([1 - g for g in GOLD], GOLD) == pytest.approx(-1.0)


def test_metrics_of_constant_predictions_are_zero_and_not_nan():
    assert matthews([1] * 8, GOLD) == 0.0
    assert f1([0] * 8, GOLD, positive=1) == 0.0
    assert pearson(np.ones(4), np.arange(4.0)) == 0.0
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_matthews_of_three_classes_by_the_covariance_definition():
    rng = np.random.default_rng(0)
    p, g = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    x, y = (np.eye(3)[v] - np.eye(3)[v].mean(0) for v in (p, g))
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(p.tolist(), g.tolist()) == pytest.approx(expected)


def test_correlations_equal_scipys_with_ties():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=40), rng.integers(0, 6, 40).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = scipy_stats.pearsonr(x, y).statistic, scipy_stats.spearmanr(x, y).statistic
    assert (pearson(x, y), spearman(x, y)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [pearson, spearman])
def test_no_correlation_is_made_of_what_is_no_number(metric):
    """It was 0 by Pearson and 1 by Spearman."""
    with pytest.raises(ValueError, match="1 of the values"):
        metric(np.array([1.0, 2.0, np.nan]), np.arange(3.0))


@pytest.mark.parametrize("predicted", [["1", "0"], ["Equivalent", "not_equivalent"]])
def test_a_prediction_that_is_no_class_is_refused_and_not_counted_wrong(predicted):
    labels = ("equivalent", "not_equivalent")
    examples = [TextExample(id=label, text="a", text_pair="b", label=label) for label in labels]
    with pytest.raises(
        DataError, match=f"{predicted[0]!r} is predicted, which is no class of mrpc"
    ):
        score_texts(TASKS["mrpc"], examples, predicted)
    assert score_texts(TASKS["mrpc"], examples, labels)["accuracy"] == 100.0


def test_pearson_far_from_zero_keeps_its_digits():
    x = 1e8 + np.arange(5.0)
    assert pearson(x.astype(np.float64), np.arange(5.0)) == pytest.approx(1.0, abs=1e-9)


def test_predictions_and_gold_of_different_length_are_refused():
    with pytest.raises(ValueError, match="3 predictions for 2 gold"):
        accuracy([1, 1, 1], [1, 1])


def test_macro_f1_counts_a_class_that_is_predicted_and_not_there():
    examples = [TextExample(id=str(i), text="", label=label) for i, label in enumerate("aab")]
    scores = score_texts(TASKS["texts"], examples, ["a", "c", "b"])
    # a: P=1 R=1/2; b: 1; c: 0. scikit-learn's f1_score(average="macro") gives the same.
    assert scores["macro_f1"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)


# SQuAD


def test_squad_normalisation_drops_ascii_punctuation_and_whole_articles_only():
    assert normalize("The  Cat's a—an «Theatre», an A.B.") == "cats — «theatre» ab"


def test_token_f1_counts_repeated_tokens():
    # 2 shared of 3 and 2: P = 2/3, R = 1.
    assert token_f1(["a", "a", "b"], ["a", "b"]) == pytest.approx(0.8)
    assert token_f1(["a"], ["b"]) == token_f1([], []) == 0.0


def test_squad1_takes_the_best_gold_and_gives_nothing_for_a_missing_answer():
    examples = [
        question("1", "Denver Broncos", "The Denver Broncos!"),
        question("2", "gold", "24-karat gold"),
        question("3", "1999"),
    ]
    scores = squad1_scores(examples, {"1": "the denver broncos", "2": "karat gold color"})
    # 2: against "gold" P=1/3 R=1; against "24karat gold" P=1/3 R=1/2. The best is 1/2.
    assert scores == {"exact": pytest.approx(100 / 3), "f1": pytest.approx(100 * 1.5 / 3)}


def test_squad1_has_no_f1_for_an_empty_answer_where_squad2_has():
    examples = [question("1", "the")]  # empty once normalised
    assert squad1_scores(examples, {"1": ""}) == {"exact": 100.0, "f1": 0.0}
    assert squad2_scores(examples, {"1": ""})["f1"] == 100.0


SQUAD2 = [
    question("a", "France"),
    question("b", "10th century", "10th"),
    question("n"),
    question("m"),
]


def test_squad2_by_hand():
    scores = squad2_scores(SQUAD2, {"a": "in France", "b": "10th", "n": "", "m": "Norway"})
    assert scores["exact"] == 100 * 2 / 4
    assert scores["f1"] == pytest.approx(100 * (2 / 3 + 1 + 1 + 0) / 4)
    assert scores["has_answer_f1"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert scores["no_answer_f1"] == scores["no_answer_exact"] == 50.0
    assert scores["total"] == 4 and "missing" not in scores and "best_f1" not in scores


def test_squad2_leaves_questions_without_prediction_out_and_says_so():
    scores = squad2_scores(SQUAD2, {"a": "France"})
    assert (scores["exact"], scores["total"], scores["missing"]) == (100.0, 1, 3)


def test_squad2_of_no_prediction_at_all_is_zero():
    example = QuestionExample(id="1", question="q", context="x", answers=())
    scores = squad2_scores([example], {}, no_answer_odds={})
    assert (scores["exact"], scores["best_exact"], scores["missing"]) == (0.0, 0.0, 1.0)


def test_squad2_best_threshold_by_hand():
    predictions = {"a": "France", "b": "the 10th", "n": "Rollo", "m": "Norway"}
    odds = {"a": -5.0, "b": 1.0, "n": 0.5, "m": 7.0}
    scores = squad2_scores(SQUAD2, predictions, no_answer_odds=odds)
    # Nothing answered: n and m right, 2. With a: 3. With n: 2. With b: 3, no better. With m: 2.
    assert scores["exact"] == 50.0
    assert (scores["best_exact"], scores["best_exact_threshold"]) == (75.0, -5.0)
    odds["n"] = 2.0  # now b comes before n, and answering a and b is right throughout
    scores = squad2_scores(SQUAD2, predictions, no_answer_odds=odds)
    assert (scores["best_f1"], scores["best_f1_threshold"]) == (100.0, 1.0)


# MLQA. The Arabic and the currency case are what the official script gives; the others by hand.


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "The  Cat, «a» theatre!", "cat theatre"),
        ("es", "Los gatos y el “Alcázar”", "gatos y alcázar"),
        ("de", "Der Fluß des Königs; eine Brücke", "fluß königs brücke"),
        ("vi", "Cái nhà của những người", "nhà người"),
        ("ar", "سؤال الكاتب، القاهرة", "سؤ كاتب قاهرة"),
        ("hi", "एक बिल्ली।", "एक बिल्ली"),
        ("zh", "长江6300公里，Yangtze River。", "长 江 6300 公 里 yangtze river"),
        ("en", "$5.00 (€3)", "500 €3"),
        ("zh", "㐀㐁カナ", "㐀㐁カナ"),
    ],
)
def test_mlqa_normalisation(language, text, expected):
    assert normalize_mlqa(text, language=language) == expected


def test_mlqa_articles_belong_to_their_language():
    assert normalize_mlqa("die the la", language="en") == "die la"
    assert normalize_mlqa("die the la", language="de") == "the la"


def test_mlqa_f1_of_empty_against_empty_is_zero_and_exact_match_is_true():
    scores = mlqa_scores([question("1", "the")], {"1": "a"}, language="en")
    assert scores == {"exact": 100.0, "f1": 0.0}


def test_mlqa_chinese_counts_characters():
    scores = mlqa_scores([question("1", "青海省")], {"1": "青海"}, language="zh")
    assert scores == {"exact": 0.0, "f1": pytest.approx(100 * 2 * 2 / 5)}
    missing = mlqa_scores([question("1", "青海省")], {}, language="zh")
    assert missing == {"exact": 0.0, "f1": 0.0}
