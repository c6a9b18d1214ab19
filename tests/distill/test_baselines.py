"""The objectives MiniLM is compared with, against plain numpy, and what they must not depend on."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from minilm_jax import cpu
from minilm_jax.distill import selected_tokens, tinybert, vocabulary
from minilm_jax.distill.objectives import RelationObjective, uniform_layers
from minilm_jax.distill.selected_tokens import Inputs, over_selected
from minilm_jax.distill.tinybert import TinyBertObjective
from minilm_jax.distill.vocabulary import VocabularyObjective, distilbert, mlm, soft_labels
from minilm_jax.encoder.attention import Projections
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import EncoderOutput, encode, init_params
from minilm_jax.errors import ConfigError
from minilm_jax.train.devices import Devices
from minilm_jax.train.reach import unreached
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_evaluation, make_given, make_step

TEACHER = EncoderConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=32,
)
STUDENT = dataclasses.replace(TEACHER, num_hidden_layers=2)
NARROW = dataclasses.replace(STUDENT, hidden_size=8, intermediate_size=16)


def batch_of(rows=4, length=12, *, seed=0):
    """Ragged rows, every third token to be predicted."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, length + 1, rows)
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(5, 40, (rows, length)) * segments
    chosen = (np.arange(length) % 3 == 1) & (segments > 0)
    labels = np.where(chosen, rng.integers(5, 40, ids.shape), -1)
    batch = {"input_ids": ids, "segments": segments, "labels": labels, "rows": np.arange(rows)}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def params_of(config, seed, extra=None):
    params = {"encoder": init_params(jax.random.key(seed), config), **(extra or {})}
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)


def models(objective, student=STUDENT):
    key = jax.random.key(5)
    head = {"mlm": vocabulary.init_mlm(jax.random.key(9), TEACHER)}
    teacher = params_of(TEACHER, 0, head)
    return teacher, params_of(student, 1, dict(objective.new_params(key, TEACHER, student)))


def value(objective, student_params, teacher_params, batch, student=STUDENT):
    loss = objective.make_loss(TEACHER, student, Compute())
    return jax.jit(lambda s, t, b: loss(s, t, b, None))(student_params, teacher_params, batch)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scores(config, params, batch):
    hidden = encode(config, params["encoder"], batch).last_hidden_state
    flat = hidden.reshape(-1, config.hidden_size)
    return log_softmax(vocabulary.mlm_logits(config, params, flat, Compute()))


def test_mlm_is_the_cross_entropy_of_the_labels():
    objective, batch = mlm(), batch_of()
    teacher, student = models(objective)
    labels = np.asarray(batch["labels"]).reshape(-1)
    chosen = labels >= 0
    expected = -scores(STUDENT, student, batch)[chosen, labels[chosen]].mean()
    found = value(objective, student, teacher, batch)
    np.testing.assert_allclose(found.value(), expected, rtol=1e-5)
    assert found.terms["mlm"].count == chosen.sum()
    teacher = {"encoder": teacher["encoder"]}
    loss = objective.make_loss(TEACHER, STUDENT, Compute())
    assert unreached(loss, student, teacher, batch).frozen == set(flatten_dict(teacher))


def test_soft_labels_are_teacher_to_student_at_the_masked_tokens():
    objective, batch = soft_labels(temperature=1.0), batch_of()
    teacher, student = models(objective)
    chosen = np.asarray(batch["labels"]).reshape(-1) >= 0
    wanted, found = scores(TEACHER, teacher, batch), scores(STUDENT, student, batch)
    expected = (np.exp(wanted) * (wanted - found)).sum(-1)[chosen].mean()
    result = value(objective, student, teacher, batch).value()
    np.testing.assert_allclose(result, expected, rtol=1e-4)


def test_distilbert_sums_its_three_losses():
    objective, batch = distilbert(), batch_of()
    teacher, student = models(objective)
    found = value(objective, student, teacher, batch)
    assert set(found.terms) == {"soft_labels", "mlm", "cosine"}
    valid = np.asarray(batch["segments"]) > 0
    t, s = (
        np.asarray(encode(c, p["encoder"], batch).last_hidden_state)[valid]
        for c, p in ((TEACHER, teacher), (STUDENT, student))
    )
    norms = np.linalg.norm(t, axis=-1) * np.linalg.norm(s, axis=-1)
    expected = (1 - (t * s).sum(-1) / norms).mean()
    np.testing.assert_allclose(found.terms["cosine"].value(), expected, rtol=1e-4)
    plain = value(mlm(), student, teacher, batch).value()
    np.testing.assert_allclose(found.terms["mlm"].value(), 2 * plain, rtol=1e-5)
    assert found.terms["soft_labels"].count == valid.sum()


def test_a_perfect_student_has_no_soft_label_or_tinybert_loss():
    batch = batch_of()
    teacher, _ = models(soft_labels())
    same = soft_labels().make_loss(TEACHER, TEACHER, Compute())(teacher, teacher, batch, None)
    assert abs(float(same.value())) < 1e-5
    objective = TinyBertObjective()
    identity = {**teacher, "width_projection": jnp.eye(TEACHER.hidden_size)}
    same = objective.make_loss(TEACHER, TEACHER, Compute())(identity, teacher, batch, None)
    assert abs(float(same.value())) < 1e-5


def test_tinybert_compares_mapped_layers_through_one_projection():
    objective, batch = TinyBertObjective(), batch_of()
    teacher, student = models(objective, NARROW)
    found = value(objective, student, teacher, batch, NARROW)
    names = {"embeddings", "hidden_2_1", "hidden_4_2", "attention_2_1", "attention_4_2"}
    assert set(found.terms) == names
    t, s = (encode(c, p["encoder"], batch) for c, p in ((TEACHER, teacher), (NARROW, student)))
    valid = np.asarray(batch["segments"]) > 0
    projected = np.asarray(s.hidden_states[1]) @ np.asarray(student["width_projection"])
    expected = ((projected - np.asarray(t.hidden_states[2])) ** 2).mean(-1)[valid].mean()
    np.testing.assert_allclose(found.terms["hidden_2_1"].value(), expected, rtol=1e-4)
    q, k = (np.asarray(x) for x in (t.projections[3].query, t.projections[3].key))
    a, b = (np.asarray(x) for x in (s.projections[1].query, s.projections[1].key))
    errors = []
    for row, length in enumerate(valid.sum(1)):
        for head in range(4):
            wide, thin = slice(head * 4, head * 4 + 4), slice(head * 2, head * 2 + 2)
            wanted = q[row, :length, wide] @ k[row, :length, wide].T / 2
            ours = a[row, :length, thin] @ b[row, :length, thin].T / np.sqrt(2)
            errors.append(((wanted - ours) ** 2).ravel() / 4)
    expected = np.concatenate(errors).sum() / (valid.sum(1) ** 2).sum()
    np.testing.assert_allclose(found.terms["attention_4_2"].value(), expected, rtol=1e-4)


@pytest.mark.parametrize("dtype, precision", [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_tinyberts_attention_scores_are_fp32_on_accelerators_too(dtype, precision):
    """Which a CPU cannot show: it multiplies fp32 arrays in fp32 whatever it is told."""
    x = jnp.ones((1, 4, 24), dtype)
    projections = Projections(x, x, x)
    (product,) = (
        equation
        for equation in jax.make_jaxpr(tinybert.attention_scores, static_argnums=1)(
            projections, 4
        ).eqns
        if equation.primitive.name == "dot_general"
    )
    assert {x.name for x in product.params["precision"]} == {precision}
    scores = tinybert.attention_scores(projections, 4)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, 6**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [mlm(), soft_labels(), distilbert(), TinyBertObjective()],
    ids=["mlm", "soft labels", "distilbert", "tinybert"],
)
def test_padding_changes_nothing(objective):
    batch = batch_of()
    teacher, student = models(objective)
    plain = value(objective, student, teacher, batch).value()
    longer = {
        name: x if x.ndim == 1 else jnp.pad(x, ((0, 0), (0, 7)), constant_values=fill)
        for name, x, fill in ((n, x, -1 if n == "labels" else 0) for n, x in batch.items())
    }
    longer["input_ids"] = jnp.where(longer["segments"] > 0, longer["input_ids"], 3)
    np.testing.assert_allclose(value(objective, student, teacher, longer).value(), plain, rtol=1e-5)


@pytest.mark.parametrize(
    "objective, behind",
    [
        (mlm(), set()),
        (soft_labels(), set()),
        (distilbert(), set()),
        (VocabularyObjective(soft_weight=0.0, cosine_weight=1.0), set()),
        # Values reach the loss through the hidden states.
        (TinyBertObjective(), set()),
        (TinyBertObjective(layers=((4, 1),)), {("encoder", "layer_1")}),
    ],
    ids=["mlm", "soft labels", "distilbert", "cosine", "tinybert", "tinybert of layer 1"],
)
def test_exactly_what_is_called_unreached_gets_no_gradient(objective, behind):
    batch = batch_of()
    teacher, student = models(objective)
    loss = objective.make_loss(TEACHER, STUDENT, Compute())
    grads = jax.jit(jax.grad(lambda p: loss(p, teacher, batch, None).value()))(student)
    found = unreached(loss, student, teacher, batch).params
    assert {path[:2] for path in found} == behind
    for path, leaf in jax.tree.leaves_with_path(grads):
        names = tuple(entry.key for entry in path)
        assert np.any(np.asarray(leaf)) != (names in found), names


def test_the_blocks_of_tokens_do_not_show(monkeypatch):
    """Selected tokens may fill no block, one, or all of them."""
    batch = batch_of(rows=5)
    teacher, student = models(distilbert())
    expected = value(distilbert(), student, teacher, batch)
    for size in (1, 7, 64):
        monkeypatch.setattr(selected_tokens, "TOKENS_A_BLOCK", size)
        found = value(distilbert(), student, teacher, batch)
        for name, mean in expected.terms.items():
            np.testing.assert_allclose(found.terms[name].total, mean.total, rtol=1e-5)
            assert found.terms[name].count == mean.count
    nothing = {**batch, "labels": jnp.full_like(batch["labels"], -1)}
    assert float(value(mlm(), student, teacher, nothing).value()) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_blocks_are_those_of_all_tokens_at_once(dtype, monkeypatch):
    """None selected, some, all; what is given gets no gradient."""
    monkeypatch.setattr(selected_tokens, "TOKENS_A_BLOCK", 7)
    random = np.random.default_rng(0)
    w = jnp.asarray(random.normal(size=(6, 3)), jnp.float32)
    x, y = (jnp.asarray(random.normal(size=(4, 5, width)), dtype) for width in (6, 3))

    def function(learned, given):
        found = learned.tokens @ learned.params["w"].astype(dtype)
        return (jnp.tanh(found) * given.tokens * given.params["scale"]).sum(-1)

    def inputs(w, x, y):
        return Inputs({"w": w}, x), Inputs({"scale": jnp.float32(2)}, y)

    def blocked(w, x, y, selected):
        return 3 * over_selected(function, *inputs(w, x, y), selected=selected).total

    def plain(w, x, y, selected):
        return 3 * jnp.where(selected, function(*inputs(w, x, y)), 0).sum()

    for share in (0, 0.4, 1):
        selected = jnp.asarray(random.random((4, 5)) < share)
        found, expected = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(w, x, y, selected)
            for f in (blocked, plain)
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            tolerance = 1e-5 if dtype == "float32" else 0.02
            np.testing.assert_allclose(
                *(np.asarray(v, np.float32) for v in (a, b)),
                atol=tolerance * max(1, np.abs(b).max()),
            )
        assert not np.any(jax.jit(jax.grad(blocked, argnums=2))(w, x, y, selected))


def test_tokens_that_are_not_selected_take_no_memory(monkeypatch):
    """Blocks without one took a table's gradient each."""
    monkeypatch.setattr(selected_tokens, "TOKENS_A_BLOCK", 8)
    config = dataclasses.replace(TEACHER, vocab_size=5000)
    head = jax.eval_shape(lambda: vocabulary.init_mlm(jax.random.key(0), config))
    table = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.float32)
    params = {"encoder": {"embeddings": {"word": {"embedding": table}}}, "mlm": head}

    def temporary(rows):
        def loss(params, hidden, labels):
            output = EncoderOutput((hidden,), ())
            return vocabulary.masked_cross_entropy(
                config, params, output, {"labels": labels}, Compute()
            ).total

        hidden = jax.ShapeDtypeStruct((rows, 8, config.hidden_size), jnp.float32)
        labels = jax.ShapeDtypeStruct((rows, 8), jnp.int32)
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, labels)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(64) < 1.2 * temporary(2)


VOCABULARY = pytest.mark.parametrize(
    "objective",
    [
        pytest.param(mlm(), id="mlm", marks=pytest.mark.slow),
        pytest.param(soft_labels(), id="soft labels"),
        pytest.param(distilbert(), id="distilbert", marks=pytest.mark.slow),
    ],
)


@VOCABULARY
@pytest.mark.parametrize("fsdps", [(2,), pytest.param((1, 8), marks=pytest.mark.slow)])
def test_the_step_does_not_depend_on_the_device_count(objective, fsdps, monkeypatch):
    """An evaluation, and a step of plain SGD with dropout; half of the devices have no label."""
    monkeypatch.setattr(selected_tokens, "TOKENS_A_BLOCK", 5)
    batch = batch_of(rows=16)
    batch["labels"] = jnp.where(batch["rows"][:, None] % 4 < 2, batch["labels"], -1)
    teacher, student, loss = shallow(objective)
    optimizer = optax.sgd(0.1)

    def train(devices, accumulate=1):
        step = devices.lift_step(make_step(loss, optimizer, accumulate=accumulate))
        state = devices.place(create_state(student, optimizer))
        given = devices.place(make_given(teacher, seed=5))
        placed = devices.place_batch(batch)
        evaluate = devices.lift_evaluation(make_evaluation(loss))
        evaluated = jax.device_get(evaluate(state.params, given.frozen, placed))
        state, metrics = step(state, given, placed)
        return jax.device_get((state.params, metrics["loss"], evaluated))

    one = train(Devices(devices=jax.devices()[:1]))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one[0], student)
    assert np.mean([move > 0 for move in jax.tree.leaves(moved)]) > 0.9
    meshes = [(Devices("mesh", fsdp=fsdp), 2 if fsdp == 2 else 1) for fsdp in fsdps]
    for devices, accumulate in ((Devices(), 1), *meshes):
        many = train(devices, accumulate)
        for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True):
            tolerance = 1e-6 * max(np.abs(a).max(), 1.0)
            np.testing.assert_allclose(b, a, rtol=0, atol=tolerance, err_msg=str(path))


@VOCABULARY
def test_a_mesh_holds_no_more_than_pmap(objective, monkeypatch):
    """Memory of a device for what the step holds while it runs."""
    # Of a CPU's memory pmap saves some that a mesh cannot (cpu.py): not what is compared here.
    monkeypatch.setattr(cpu, "of_one_device", lambda: False)
    teacher, student, loss = shallow(objective)
    optimizer = optax.sgd(0.1)
    batch = batch_of(rows=1024, length=32)

    def temporary(devices):
        arguments = (
            devices.abstract(create_state(student, optimizer)),
            devices.abstract(make_given(teacher, seed=5)),
            devices.abstract_batch(batch),
        )
        step = devices.lift_step(make_step(loss, optimizer))
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(Devices("mesh", fsdp=2)) < 1.2 * temporary(Devices())


def shallow(objective):
    """Teacher and student of one layer, and the loss: quick to compile."""
    config = dataclasses.replace(TEACHER, num_hidden_layers=1)
    teacher = params_of(config, 0, {"mlm": vocabulary.init_mlm(jax.random.key(9), config)})
    student = params_of(config, 1, dict(objective.new_params(jax.random.key(5), config, config)))
    return teacher, student, objective.make_loss(config, config, Compute())


def test_the_value_mse_ablation_learns_a_projection():
    objective = RelationObjective(relations=(("qk", 1.0),), value_mse=0.5)
    batch = batch_of()
    teacher, student = models(objective, NARROW)
    found = value(objective, student, teacher, batch, NARROW)
    assert set(found.terms) == {"qk", "value_mse"}
    t, s = (
        np.asarray(encode(c, p["encoder"], batch).projections[-1].value)
        for c, p in ((TEACHER, teacher), (NARROW, student))
    )
    projected = s @ np.asarray(student["value_projection"]["4_2"])
    valid = np.asarray(batch["segments"]) > 0
    expected = 0.5 * ((projected - t) ** 2).mean(-1)[valid].mean()
    np.testing.assert_allclose(found.terms["value_mse"].value(), expected, rtol=1e-4)


def test_layers_are_mapped_evenly():
    assert uniform_layers(teacher=12, student=6) == (
        (2, 1),
        (4, 2),
        (6, 3),
        (8, 4),
        (10, 5),
        (12, 6),
    )
    assert uniform_layers(teacher=12, student=4)[-1] == (12, 4)
    # A student that is deeper meets every layer, from the first.
    assert [layer for layer, _ in uniform_layers(teacher=2, student=6)] == [1, 1, 1, 2, 2, 2]
    between = [layer for layer, _ in uniform_layers(teacher=12, student=8)]
    assert between == [2, 3, 5, 6, 8, 9, 11, 12]


@pytest.mark.parametrize(
    "objective,student,message",
    [
        (distilbert(), NARROW, r"hidden_size=8 must be the teacher's 16"),
        (VocabularyObjective(soft_weight=0.0), STUDENT, r"weights are all 0"),
        (soft_labels(), dataclasses.replace(STUDENT, vocab_size=41), r"one vocabulary"),
        (TinyBertObjective(), dataclasses.replace(STUDENT, num_attention_heads=2), r"heads=2"),
        (TinyBertObjective(layers=((5, 1),)), STUDENT, r"teacher layer 5"),
    ],
)
def test_what_does_not_fit_is_refused(objective, student, message):
    with pytest.raises(ConfigError, match=message):
        objective.check(TEACHER, student)
    with pytest.raises(ConfigError, match=r"hard_weight must be at least 0 and finite, got nan"):
        VocabularyObjective(hard_weight=math.nan)
    with pytest.raises(ConfigError, match=r"temperature must be above 0 and finite, got 0\.0"):
        soft_labels(temperature=0.0)
