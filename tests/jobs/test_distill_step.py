"""What an objective may return: sums and counts, under names of its own."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from minilm_jax.cli import load_experiment
from minilm_jax.data.batches import BatchConfig
from minilm_jax.data.masking import MaskingConfig
from minilm_jax.distill.objective import Objective
from minilm_jax.distill.objectives import RelationObjective
from minilm_jax.distill.vocabulary import VocabularyObjective, mlm, soft_labels
from minilm_jax.errors import ConfigError
from minilm_jax.jobs.distill_step import make_loss, step_flops, step_parts
from minilm_jax.jobs.plan import describe_teacher
from minilm_jax.reductions import Loss, Mean

SMOKE = Path(__file__).parents[2] / "experiments" / "minilm_v2" / "bert_base_6x384.py"
GOOD = Mean(jnp.float32(3), jnp.float32(2))
VECTOR = jnp.ones(5, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Returns(Objective):
    """An objective that returns the same whatever it is given."""

    value: object

    def make_loss(self, teacher, student, compute):
        return lambda ours, theirs, batch, key: self.value


def returned(value):
    config = load_experiment(f"{SMOKE}:smoke")
    config = dataclasses.replace(config, objective=Returns(value=value))
    return make_loss(config, config.teacher.shape)({}, {}, {}, None)


def loss(**parts):
    return Loss(**{"terms": {"good": GOOD}, "metrics": {}, "counts": {}} | parts)


def test_sums_and_counts_pass():
    heads = Mean(VECTOR, jnp.int32(2))
    value = loss(metrics={"heads": heads}, counts={"tokens": jnp.int32(7)})
    assert returned(value) is value


@pytest.mark.parametrize(
    "value,sentence",
    [
        (None, "returns None"),
        (jnp.float32(0.5), r"returns float32\[\]"),
        (loss(metrics=None), "metrics: NoneType"),
        (loss(terms={}), "no term"),
        (loss(terms={"mse": jnp.float32(0.5)}), r"'mse' is float32\[\]: give Mean"),
        (loss(metrics={"mse": 0.5}), "'mse' is a float: give Mean"),
        (loss(terms={"mse": Mean(VECTOR, 2.0)}), r"term 'mse' is float32\[5\]: give the sum"),
        (loss(terms={"mse": Mean(jnp.int32(3), 2.0)}), "a floating-point number"),
        (loss(metrics={"mse": Mean(3.0, VECTOR)}), r"count of the objective's 'mse' is float32"),
        (loss(counts={"tokens": VECTOR}), r"count 'tokens' is float32\[5\]"),
        (loss(metrics={"good": GOOD}), "'good' stands for a term and a metric"),
        (loss(metrics={"step": GOOD}), "'step' is one of the engine's own"),
        (loss(terms={"loss": GOOD}), "'loss' is one of the engine's own"),
    ],
)
def test_anything_else_is_refused_with_what_belongs_there(value, sentence):
    with pytest.raises(ConfigError, match=sentence):
        returned(value)


def test_an_objective_without_a_loss_is_refused():
    config = load_experiment(f"{SMOKE}:smoke")
    config = dataclasses.replace(config, objective=Objective())
    with pytest.raises(ConfigError, match="objective Objective has no make_loss"):
        make_loss(config, config.teacher.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapped(Objective):
    """The paper's objective inside one's own, which says itself how its FLOPs are counted."""

    inner: RelationObjective

    def make_loss(self, teacher, student, compute):
        return self.inner.make_loss(teacher, student, compute)

    def for_flop_count(self):
        return dataclasses.replace(self, inner=self.inner.for_flop_count())


def test_flops_of_relations_are_counted_in_an_objective_of_ones_own():
    config = load_experiment(f"{SMOKE}:smoke")
    teacher = describe_teacher(config)

    def counted(objective):
        return step_flops(dataclasses.replace(config, objective=objective), teacher, 32)

    # Left in blocks, whose number a trace cannot know, relations count as one block.
    assert counted(Wrapped(inner=config.objective)) > counted(InBlocks(inner=config.objective))
    assert counted(Wrapped(inner=config.objective)) == counted(config.objective)


class InBlocks(Wrapped):
    """As `Wrapped`, and never written out."""

    def for_flop_count(self):
        return self


def test_no_batch_names_a_language_so_xlms_table_stays_as_it_is():
    config = load_experiment(f"{SMOKE}:smoke")
    shape = dataclasses.replace(
        config.teacher.shape, model_type="xlm", type_vocab_size=0, n_langs=3
    )
    teacher = dataclasses.replace(config.teacher, shape=shape)
    config = dataclasses.replace(config, teacher=teacher, objective=mlm())
    parts = step_parts(config, describe_teacher(config))
    assert parts.unreached == {("encoder", "embeddings", "language", "embedding")}


@pytest.mark.parametrize("objective", [mlm, soft_labels], ids=["mlm", "soft labels"])
def test_flops_of_vocabulary_scores_are_those_of_the_tokens_expected_to_count(objective):
    config = load_experiment(f"{SMOKE}:smoke")
    config = dataclasses.replace(config, batch=BatchConfig(batch_size=40, sequence_length=64))
    shape = config.teacher.shape
    teacher = describe_teacher(dataclasses.replace(config, objective=soft_labels()))

    def counted(probability):
        mask = MaskingConfig(probability=probability)
        chosen = dataclasses.replace(objective(), mask=mask)
        return step_flops(dataclasses.replace(config, objective=chosen), teacher, 64)

    def scores(width):
        return 2 * (shape.vocab_size * width + width**2)

    a_token = 3 * scores(config.student.hidden_size)
    if objective is soft_labels:
        a_token += scores(shape.hidden_size)
    # 128, 384 and 2,560 tokens: less than a block of those a step takes, and more.
    assert counted(0.15) - counted(0.05) == 256 * a_token
    assert counted(1.0) - counted(0.15) == (2560 - 384) * a_token


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithAField(VocabularyObjective):
    """One's own, with a setting of its own."""

    l2: float = 0.1


def test_flops_of_an_objective_derived_from_these_are_counted_too():
    config = load_experiment(f"{SMOKE}:smoke")
    teacher = describe_teacher(dataclasses.replace(config, objective=soft_labels()))

    def counted(objective):
        return step_flops(dataclasses.replace(config, objective=objective), teacher, 32)

    own = WithAField(l2=0.5)
    assert type(own.for_flop_count()) is WithAField
    assert own.for_flop_count().l2 == 0.5
    assert counted(own) == counted(soft_labels())
