"""The MiniLM objectives on small encoders: what they reach, and what they must not depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from minilm_jax import cpu
from minilm_jax.distill.objectives import RelationObjective, minilm, minilmv2
from minilm_jax.distill.student import (
    StudentConfig,
    check_start,
    init_student,
    student_encoder_config,
)
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.encoder import init_params
from minilm_jax.errors import ConfigError
from minilm_jax.train.devices import Devices
from minilm_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from minilm_jax.train.reach import leave_out, unreached
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_given, make_step
from tests.described_gpu import gpus_in_context

TEACHER = EncoderConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
STUDENT = dataclasses.replace(
    TEACHER, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
)
V2 = minilmv2(heads=8, teacher_layer=3, student_layer=2)


def documents(count, *, seed=0, longest=10):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 50, size=rng.integers(2, longest + 1)) for _ in range(count)]


def rows_of(groups, *, length, pad=0):
    """Packs each group of documents into one row."""
    ids = np.full((len(groups), length), pad, np.int32)
    segments = np.zeros((len(groups), length), np.int32)
    for row, group in enumerate(groups):
        at = 0
        for number, document in enumerate(group, start=1):
            ids[row, at : at + len(document)] = document
            segments[row, at : at + len(document)] = number
            at += len(document)
    rows = np.arange(len(groups), dtype=np.int32)
    batch = {"input_ids": ids, "segments": segments, "rows": rows}
    return {name: jnp.asarray(array) for name, array in batch.items()}


@pytest.fixture(scope="module")
def params():
    """Random weights, larger than initialisation makes them so that the relations are not flat."""
    teacher = {"encoder": init_params(jax.random.key(0), TEACHER)}
    student = {"encoder": init_params(jax.random.key(1), STUDENT)}
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, (teacher, student))


def value(objective, params, batch, *, key=None, compute=None):
    loss = objective.make_loss(TEACHER, STUDENT, compute or Compute())
    teacher, student = params
    return jax.jit(loss)(student, teacher, batch, key)


@pytest.mark.parametrize(
    "objective",
    [
        minilm(),
        V2,
        RelationObjective(relations=(("qk", 1.0),)),
        RelationObjective(heads=2, relations=(("qv", 0.5),), layers=((2, 1),)),
        RelationObjective(layers=((2, 1), (4, 2))),
        RelationObjective(relations=(("vv", 1.0),)),
    ],
    ids=["v1", "v2", "attention only", "qv of layer 1", "layer to layer", "values only"],
)
def test_exactly_what_is_called_unreached_gets_no_gradient(objective, params):
    teacher, student = params
    batch = rows_of([[d] for d in documents(4)], length=12)
    loss = objective.make_loss(TEACHER, STUDENT, Compute())
    grads = jax.jit(jax.grad(lambda p: loss(p, teacher, batch, None).value()))(student)
    untouched = set()
    for path, leaf in jax.tree.leaves_with_path(grads):
        if not np.any(np.asarray(leaf)):
            untouched.add(tuple(entry.key for entry in path))
    found = unreached(loss, student, teacher, batch)
    assert found.params == untouched
    assert untouched
    with gpus_in_context():
        assert unreached(loss, student, teacher, batch) == found


@pytest.mark.parametrize(
    "objective,needed",
    [
        (minilm(), 4),
        (V2, 3),
        (RelationObjective(relations=(("vv", 1.0),), layers=((2, 1),)), 2),
        (RelationObjective(relations=(("qk", 1.0),), value_mse=1.0), 4),
    ],
    ids=["v1", "v2", "values of layer 2", "value MSE"],
)
def test_exactly_what_is_called_unreached_of_the_teacher_may_be_anything(objective, needed, params):
    teacher, student = params
    student = student | dict(objective.new_params(jax.random.key(0), TEACHER, STUDENT))
    batch = rows_of([[d] for d in documents(4)], length=12)
    loss = objective.make_loss(TEACHER, STUDENT, Compute())
    found = unreached(loss, student, teacher, batch).frozen
    assert {path[1] for path in flatten_dict(teacher) if path not in found} == {
        "embeddings",
        *(f"layer_{index}" for index in range(needed)),
    }
    evaluate = jax.jit(lambda teacher: loss(student, teacher, batch, None).value())
    expected = evaluate(teacher)
    for path, leaf in flatten_dict(teacher).items():
        spoilt = {**flatten_dict(teacher), path: np.full_like(leaf, np.nan)}
        value = evaluate(unflatten_dict(spoilt))
        assert value == expected if path in found else np.isnan(value), path
    less, given = leave_out(loss, teacher, found)
    assert set(flatten_dict(given)) == set(flatten_dict(teacher)) - found
    assert jax.jit(lambda given: less(student, given, batch, None).value())(given) == expected


def test_minilm_reaches_nothing_behind_the_last_projections(params):
    teacher, student = params
    batch = jax.eval_shape(lambda: rows_of([[d] for d in documents(4)], length=12))
    loss = minilm().make_loss(TEACHER, STUDENT, Compute(remat=True))
    found = unreached(loss, student, teacher, batch)
    assert {path[:-1] for path in found.params} == {
        ("encoder", "layer_1", "attention", "output"),
        ("encoder", "layer_1", "attention_norm"),
        ("encoder", "layer_1", "ffn", "up"),
        ("encoder", "layer_1", "ffn", "down"),
        ("encoder", "layer_1", "ffn_norm"),
    }


def test_what_the_loss_does_not_reach_is_left_where_it_was(params):
    """400,000 steps of decoupled decay would shrink it to a third."""
    teacher, student = params
    config = OptimizerConfig(learning_rate=0.01, warmup_steps=0, weight_decay=0.5)
    loss = V2.make_loss(TEACHER, STUDENT, Compute())
    batch = rows_of([[d] for d in documents(4)], length=12)
    aside = unreached(loss, student, teacher, batch).params
    optimizer = make_optimizer(config, unreached=aside)
    devices = Devices("pmap", devices=jax.devices()[:1])
    step = devices.lift_step(make_step(loss, optimizer))
    state = devices.place(create_state(student, optimizer))
    schedule = make_schedule(config, steps=10)
    given = devices.place(make_given(teacher, seed=0, schedule=schedule))
    batch = devices.place_batch(batch)
    for _ in range(3):
        state, _ = step(state, given, batch)
    last, before = state.params["encoder"]["layer_1"], student["encoder"]["layer_1"]
    jax.tree.map(np.testing.assert_array_equal, last["ffn"], before["ffn"])
    moved = np.abs(last["attention"]["query"]["kernel"] - before["attention"]["query"]["kernel"])
    assert moved.max() > 1e-3


@pytest.mark.parametrize("objective", [minilm(), V2], ids=["v1", "v2"])
def test_packing_and_padding_do_not_change_the_loss(objective, params):
    texts = documents(6)
    padded = value(objective, params, rows_of([[d] for d in texts], length=10))
    longer = value(objective, params, rows_of([[d] for d in texts], length=25, pad=7))
    packed = value(objective, params, rows_of([texts[:3], texts[3:]], length=30))
    for other in (longer, packed):
        for name, mean in padded.terms.items():
            np.testing.assert_allclose(other.terms[name].total, mean.total, rtol=2e-5)
            assert other.terms[name].count == mean.count == len(texts)
    assert float(padded.value()) > 0.01


def test_the_loss_is_zero_where_student_and_teacher_are_one(params):
    teacher, _ = params
    loss = minilm().make_loss(TEACHER, TEACHER, Compute())
    batch = rows_of([[d] for d in documents(3)], length=12)
    assert abs(float(loss(teacher, teacher, batch, None).value())) < 1e-6


def test_heads_are_reported_and_average_to_their_term(params):
    objective = dataclasses.replace(V2, relations=(("qq", 1.0), ("kk", 0.5), ("vv", 3.0)))
    found = value(objective, params, rows_of([[d] for d in documents(3)], length=12))
    assert set(found.terms) == {"qq", "kk", "vv"}
    for name, mean in found.terms.items():
        heads = found.metrics[f"{name}_heads"].total
        assert heads.shape == (8,)
        np.testing.assert_allclose(heads.mean(), mean.total, rtol=1e-6)


def test_weights_scale_their_relation(params):
    batch = rows_of([[d] for d in documents(3)], length=12)
    plain = value(RelationObjective(relations=(("qk", 1.0), ("vv", 1.0))), params, batch)
    scaled = value(RelationObjective(relations=(("qk", 0.5), ("vv", 3.0))), params, batch)
    expected = 0.5 * plain.terms["qk"].value() + 3 * plain.terms["vv"].value()
    np.testing.assert_allclose(scaled.value(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [pytest.param(minilm(), id="v1", marks=pytest.mark.slow), pytest.param(V2, id="v2")],
)
@pytest.mark.parametrize("fsdps", [(2,), pytest.param((1, 8), marks=pytest.mark.slow)])
def test_dropout_and_gradients_do_not_depend_on_the_device_count(objective, fsdps, params):
    """Ragged padding, dropout on, plain SGD: 20 steps on 1 and 8 devices, pmap and mesh."""
    teacher, student = params
    optimizer = optax.sgd(0.05)
    loss = objective.make_loss(TEACHER, STUDENT, Compute())
    batches = [rows_of([[d] for d in documents(16, seed=s)], length=12) for s in range(4)]

    def train(devices):
        step = devices.lift_step(make_step(loss, optimizer))
        state = devices.place(create_state(student, optimizer))
        given = devices.place(make_given(teacher, seed=5))
        for index in range(20):
            state, _ = step(state, given, devices.place_batch(batches[index % 4]))
        return jax.device_get(state.params)

    one = train(Devices("pmap", devices=jax.devices()[:1]))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one, student)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for devices in (Devices("pmap"), *(Devices("mesh", fsdp=fsdp) for fsdp in fsdps)):
        many = train(devices)
        for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True):
            tolerance = 1e-6 * max(np.abs(a).max(), 1.0)
            np.testing.assert_allclose(b, a, rtol=0, atol=tolerance, err_msg=str(path))


@pytest.mark.slow
def test_where_jax_has_64_bits_a_step_is_the_same(params):
    """Dropout on and a learned projection: what is drawn must not depend on the width of numbers.

    On one device, so that the kernels in C++ are met, too."""
    teacher, student = params
    objective = RelationObjective(relations=(("qk", 1.0),), value_mse=1.0)
    optimizer = optax.sgd(0.05)
    batch = rows_of([[d] for d in documents(4)], length=12)

    def stepped():
        new = objective.new_params(jax.random.key(3), TEACHER, STUDENT)
        devices = Devices(devices=jax.devices()[:1])
        step = make_step(objective.make_loss(TEACHER, STUDENT, Compute()), optimizer)
        state = devices.place(create_state({**student, **new}, optimizer))
        given = devices.place(make_given(teacher, seed=5))
        state, metrics = devices.lift_step(step)(state, given, devices.place_batch(batch))
        return jax.device_get((state, metrics))

    usual = stepped()
    with jax.enable_x64(True):
        wide = stepped()
    for (path, a), b in zip(jax.tree.leaves_with_path(usual), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6, err_msg=str(path))
        assert a.dtype == b.dtype, path


def test_a_mesh_divides_activations_by_rows(monkeypatch):
    """Not by columns as the parameters, with the rows gathered: a device holds what pmap's does."""
    # Of a CPU's memory pmap saves some that a mesh cannot (cpu.py): not what is compared here.
    monkeypatch.setattr(cpu, "of_one_device", lambda: False)
    wide = dataclasses.replace(TEACHER, hidden_size=64, num_hidden_layers=3, intermediate_size=256)
    objective = minilmv2(heads=8, teacher_layer=3, student_layer=3)
    optimizer = optax.sgd(0.1)
    plain = Compute(attention="plain")  # each device meets kernels with its rows in any case
    step = make_step(objective.make_loss(wide, wide, plain), optimizer)
    params = {"encoder": jax.eval_shape(lambda: init_params(jax.random.key(0), wide))}
    state = jax.eval_shape(lambda params: create_state(params, optimizer), params)
    batch = rows_of([[d] for d in documents(64)], length=32)

    def temporary(devices):
        arguments = (devices.abstract(state), devices.abstract(make_given(params, seed=0)))
        lowered = devices.lift_step(step).lower(*arguments, devices.abstract_batch(batch))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    gathered = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    assert temporary(Devices("mesh", fsdp=2)) < temporary(Devices()) + gathered


def test_remat_changes_memory_not_numbers(params):
    teacher, student = params
    batch = rows_of([[d] for d in documents(4)], length=12)

    def grads(compute):
        loss = V2.make_loss(TEACHER, STUDENT, compute)
        return jax.jit(jax.grad(lambda p: loss(p, teacher, batch, jax.random.key(2)).value()))(
            student
        )

    plain, remat = grads(Compute()), grads(Compute(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, remat)


def test_a_student_layer_learns_from_every_teacher_layer_it_is_paired_with(params):
    """Terms of one student layer are kept apart: each pair counts, as it would alone."""
    batch, pairs = rows_of([[d] for d in documents(4)], length=12), ((1, 2), (3, 2))
    objective = RelationObjective(relations=(("qk", 1.0),))
    both, *alone = (
        value(dataclasses.replace(objective, layers=layers), params, batch)
        for layers in (pairs, pairs[:1], pairs[1:])
    )
    assert set(both.terms) == {"qk_1_2", "qk_3_2"}
    np.testing.assert_allclose(both.value(), sum(loss.value() for loss in alone), rtol=1e-6)
    learned = RelationObjective(layers=pairs, value_mse=1.0)
    new = learned.new_params(jax.random.key(0), TEACHER, STUDENT)["value_projection"]
    assert not np.array_equal(*new.values())


def test_bfloat16_stays_near_fp32(params):
    batch = rows_of([[d] for d in documents(8)], length=12)
    exact = value(V2, params, batch).value()
    rough = value(V2, params, batch, compute=Compute(dtype="bfloat16")).value()
    assert exact.dtype == rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, rtol=0.1)


@pytest.mark.parametrize(
    "objective,teacher,student,message",
    [
        (minilm(), {"num_attention_heads": 6}, {}, r"teacher has 6 attention heads.*student 4"),
        (RelationObjective(heads=5), {}, {}, r"heads=5 .* teacher's hidden_size=24"),
        (RelationObjective(heads=12), {}, {}, r"heads=12 .* student's hidden_size=16"),
        (RelationObjective(layers=((5, 1),)), {}, {}, r"teacher layer 5; it has layers 1 to 4"),
        (RelationObjective(layers=((4, 3),)), {}, {}, r"student layer 3; it has layers 1 to 2"),
        (RelationObjective(layers=((4, 2), (4, 2))), {}, {}, r"layers names \(4, 2\) twice"),
        (RelationObjective(relations=(("qk", 1.0), ("qk", 0.5))), {}, {}, r"names qk twice"),
        (RelationObjective(relations=()), {}, {}, r"relations is empty"),
    ],
)
def test_what_does_not_fit_is_refused(objective, teacher, student, message):
    with pytest.raises(ConfigError, match=message):
        objective.check(
            dataclasses.replace(TEACHER, **teacher), dataclasses.replace(STUDENT, **student)
        )


def test_a_weight_that_would_drive_the_student_away_or_nowhere_is_refused():
    for weight in (-1.0, 0.0):
        with pytest.raises(ConfigError, match=r"relations must be above 0 and finite, got"):
            RelationObjective(relations=(("qk", weight),))
    with pytest.raises(ConfigError, match=r"value_mse must be at least 0 and finite, got nan"):
        RelationObjective(value_mse=float("nan"))


def test_a_student_of_the_teachers_layers_is_made_of_them(params):
    teacher, _ = params
    config = StudentConfig(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=4, intermediate_size=48,
        init="teacher", teacher_layers=(2, 4),
    )  # fmt: skip
    student = init_student(jax.random.key(0), config, TEACHER, teacher["encoder"])
    jax.tree.map(np.testing.assert_array_equal, student["layer_0"], teacher["encoder"]["layer_1"])
    jax.tree.map(np.testing.assert_array_equal, student["layer_1"], teacher["encoder"]["layer_3"])
    np.testing.assert_array_equal(
        student["embeddings"]["word"]["embedding"],
        teacher["encoder"]["embeddings"]["word"]["embedding"],
    )


def test_a_narrower_student_keeps_whole_heads_first_units(params):
    teacher, _ = params
    config = StudentConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=4, init="teacher"
    )
    config = dataclasses.replace(config, intermediate_size=32)
    student = init_student(jax.random.key(0), config, TEACHER, teacher["encoder"])
    wide = np.asarray(teacher["encoder"]["layer_3"]["attention"]["query"]["kernel"])
    expected = wide[:16].reshape(16, 4, 6)[:, :, :4].reshape(16, 16)
    found = student["layer_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(found, expected)
    shapes = jax.eval_shape(
        lambda k: init_params(k, student_encoder_config(config, TEACHER)), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, student) == jax.tree.map(lambda x: x.shape, shapes)


def test_a_random_student_may_take_the_vocabulary_over(params):
    teacher, _ = params
    config = StudentConfig(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=4, embeddings="teacher"
    )
    config = dataclasses.replace(config, intermediate_size=48)
    student = init_student(jax.random.key(0), config, TEACHER, teacher["encoder"])
    np.testing.assert_array_equal(
        student["embeddings"]["word"]["embedding"],
        teacher["encoder"]["embeddings"]["word"]["embedding"],
    )
    kernel = np.asarray(student["layer_0"]["ffn"]["up"]["kernel"])
    assert not np.array_equal(kernel, teacher["encoder"]["layer_0"]["ffn"]["up"]["kernel"])


def test_a_student_larger_than_its_start_is_refused(params):
    config = StudentConfig(
        num_hidden_layers=2, hidden_size=48, num_attention_heads=4, init="teacher"
    )
    with pytest.raises(ConfigError, match=r"hidden_size=48 is larger than the teacher's 24"):
        init_student(jax.random.key(0), config, TEACHER, params[0]["encoder"])
    with pytest.raises(ConfigError, match=r"head_size=12 is larger than the teacher's 6"):
        wider = dataclasses.replace(
            config, hidden_size=24, num_attention_heads=2, intermediate_size=48
        )
        check_start(wider, TEACHER)
    with pytest.raises(ConfigError, match=r"student: num_attention_heads=5"):
        student_encoder_config(StudentConfig(num_attention_heads=5), TEACHER)


def test_embeddings_alone_ask_for_a_width_alone():
    config = StudentConfig(
        num_hidden_layers=2, hidden_size=24, num_attention_heads=8, intermediate_size=400,
        embeddings="teacher",
    )  # fmt: skip
    check_start(config, TEACHER)
    with pytest.raises(ConfigError, match=r"hidden_size=48 .* student.embeddings=random"):
        check_start(dataclasses.replace(config, hidden_size=48), TEACHER)


def test_a_student_has_its_teachers_dropout_or_its_own():
    teacher = dataclasses.replace(
        TEACHER, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3
    )
    config = StudentConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=4)

    def rates(**own):
        found = student_encoder_config(dataclasses.replace(config, **own), teacher)
        return found.hidden_dropout_prob, found.attention_probs_dropout_prob

    assert rates() == (0.2, 0.3)
    assert rates(hidden_dropout_prob=0.0) == (0.0, 0.3)
    assert rates(attention_probs_dropout_prob=0.05) == (0.2, 0.05)


@pytest.mark.parametrize("init", ["random", "teacher"])
@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"teacher_layers": (1, 9)},
            r"teacher_layers names layer 9; the teacher has layers 1 to 4",
        ),
        ({"teacher_layers": (1, 2, 3)}, r"teacher_layers names 3 layers for a student of 2"),
        ({"intermediate_size": 0}, r"student\.intermediate_size must be .*, got 0"),
        ({"intermediate_size": -8}, r"student\.intermediate_size must be .*, got -8"),
        ({"hidden_size": 0}, r"student\.hidden_size must be .*, got 0"),
        ({"hidden_dropout_prob": 1.0}, r"student\.hidden_dropout_prob must be .*, got 1\.0"),
    ],
)
def test_settings_of_the_student_are_checked_whatever_it_starts_from(init, changes, message):
    config = StudentConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=4, intermediate_size=32, init=init
    )
    check_start(config, TEACHER)
    with pytest.raises(ConfigError, match=message):
        check_start(dataclasses.replace(config, **changes), TEACHER)
