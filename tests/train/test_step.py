"""The step: its gradient is that of the global batch, however the batch is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ragged_problem import ROWS, make_problem, ragged_loss

from minilm_jax.errors import ConfigError
from minilm_jax.reductions import Mean
from minilm_jax.train.devices import Devices
from minilm_jax.train.optimizer import (
    OptimizerConfig,
    evaluated_params,
    make_optimizer,
    make_schedule,
)
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_evaluation, make_given, make_step


@pytest.fixture
def problem():
    return make_problem(steps=5)


SGD = optax.sgd(0.01)  # Adam would hide a constant factor in the gradient


def train(problem, devices, optimizer=SGD, *, schedule=None, **kwargs):
    params, frozen, batches = problem
    step = devices.lift_step(make_step(ragged_loss, optimizer, **kwargs))
    state = devices.place(create_state(params, optimizer))
    given = devices.place(make_given(frozen, seed=3, schedule=schedule))
    for batch in batches:
        state, metrics = step(state, given, devices.place_batch(batch))
    return jax.device_get(state), jax.device_get(metrics)


def scale(state):
    return np.abs(state.params["kernel"]).max()


SPLITS = [
    ("pmap", 8, 1, 1),
    ("pmap", 2, 1, 4),
    ("mesh", 8, 1, 1),
    ("mesh", 8, 2, 1),
    ("mesh", 8, 8, 2),
]


@pytest.mark.parametrize("lift,count,fsdp,accumulate", SPLITS)
def test_any_split_equals_one_device(problem, lift, count, fsdp, accumulate):
    expected, expected_metrics = train(problem, Devices("pmap", devices=jax.devices()[:1]))
    devices = Devices(lift, fsdp=fsdp, devices=jax.devices()[:count])
    found, metrics = train(problem, devices, accumulate=accumulate)
    # Relative to the tensor: an element may come out near zero by cancellation.
    np.testing.assert_allclose(
        found.params["kernel"], expected.params["kernel"], rtol=0, atol=1e-6 * scale(expected)
    )
    for name in ("loss", "mean", "rare", "grad_norm", "per_column"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    assert metrics["counts"]["rows"] == ROWS


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_mean_by_weights_does_not_depend_on_their_scale(problem, accumulate):
    """Where the weights sum to less than 1, too: a count is not always one of things."""
    params, frozen, batches = problem
    devices = Devices(devices=jax.devices()[:1])

    def stepped(scale):
        def weighted(*given):
            loss = ragged_loss(*given)
            terms = {name: Mean(scale * x, scale * n) for name, (x, n) in loss.terms.items()}
            return loss._replace(terms=terms)

        step = devices.lift_step(make_step(weighted, SGD, accumulate=accumulate))
        state = devices.place(create_state(params, SGD))
        given = devices.place(make_given(frozen, seed=3))
        return jax.device_get(step(state, given, devices.place_batch(batches[0])))

    (expected, metrics), (found, found_metrics) = stepped(1.0), stepped(2.0**-10)
    np.testing.assert_allclose(found.params["kernel"], expected.params["kernel"], rtol=1e-6)
    np.testing.assert_allclose(found_metrics["loss"], metrics["loss"], rtol=1e-6)


@pytest.mark.parametrize("lift", ["pmap", "mesh"])
def test_micro_batches_take_one_loop(problem, lift):
    """With another one for the counts, CPUs of one process could wait for each other in both."""
    params, frozen, batches = problem
    devices = Devices(lift, devices=jax.devices()[:2])
    state = devices.place(create_state(params, SGD))
    given = (state, devices.place(make_given(frozen, seed=3)), devices.place_batch(batches[0]))

    def loops(accumulate):
        step = devices.lift_step(make_step(ragged_loss, SGD, accumulate=accumulate))
        return step.lower(*given).compile().as_text().count(" while(")

    assert loops(2) == loops(1) + 1


def test_one_step_is_the_hand_computed_one(problem):
    """The update itself, by numpy: dropout off, plain SGD."""
    params, frozen, batches = problem
    optimizer = optax.sgd(0.1)

    def loss(params, frozen, batch, key):
        return ragged_loss(params, frozen, batch, None)

    devices = Devices("pmap")
    step = devices.lift_step(make_step(loss, optimizer))
    state = devices.place(create_state(params, optimizer))
    state, _ = step(
        state, devices.place(make_given(frozen, seed=0)), devices.place_batch(batches[0])
    )
    b = {name: value.astype(np.float64) for name, value in batches[0].items()}
    w, t = params["kernel"].astype(np.float64), frozen["kernel"].astype(np.float64)
    x = b["x"] @ w
    gradient = b["x"].T @ (2 * (x - b["x"] @ t) * b["many"][:, None]) / b["many"].sum()
    gradient += b["x"].T @ (np.sign(x) * b["few"][:, None]) / b["few"].sum()
    np.testing.assert_allclose(state.params["kernel"], w - 0.1 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lift,count,fsdp,accumulate", SPLITS)
def test_evaluation_adds_up_over_uneven_batches(problem, lift, count, fsdp, accumulate):
    params, frozen, batches = problem
    devices = Devices(lift, fsdp=fsdp, devices=jax.devices()[:count])
    evaluate = devices.lift_evaluation(make_evaluation(ragged_loss, accumulate=accumulate))
    placed, teacher = devices.place(params), devices.place(frozen)
    parts = [jax.device_get(evaluate(placed, teacher, devices.place_batch(b))) for b in batches]
    whole = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    expected = ragged_loss(params, frozen, whole, None).value()
    total = parts[0]
    for part in parts[1:]:
        total = jax.tree.map(np.add, total, part)
    np.testing.assert_allclose(total.value(), expected, rtol=1e-5)


def test_skip_leaves_parameters_and_optimizer_as_they_were(problem):
    params, frozen, batches = problem
    broken = {**batches[0], "x": np.full_like(batches[0]["x"], np.nan)}
    state, metrics = train((params, frozen, [broken]), Devices("pmap"), nonfinite="skip")
    np.testing.assert_array_equal(state.params["kernel"], params["kernel"])
    assert not metrics["finite"]
    assert state.step == 1


def test_the_learning_rate_goes_on_over_a_skipped_step(problem):
    """It is logged as a function of the step, and has to reach its end."""
    params, frozen, batches = problem
    broken = {**batches[0], "x": np.full_like(batches[0]["x"], np.nan)}
    decaying = OptimizerConfig(name="sgd", learning_rate=0.02, warmup_steps=0, weight_decay=0.0)

    def trained(batches, steps):
        schedule, optimizer = make_schedule(decaying, steps=steps), make_optimizer(decaying)
        state, metrics = train(
            (params, frozen, batches), Devices(), optimizer, schedule=schedule, nonfinite="skip"
        )
        return state.params["kernel"], metrics

    once, _ = trained([batches[0]], 3)
    skipped, metrics = trained([batches[0], broken], 3)
    np.testing.assert_array_equal(skipped, once)
    np.testing.assert_allclose(metrics["learning_rate"], 0.02 * 2 / 3, rtol=1e-6)
    _, metrics = trained([batches[0], broken, batches[1]], 3)
    np.testing.assert_allclose(metrics["learning_rate"], 0.02 / 3, rtol=1e-6)


@pytest.mark.parametrize("lift,fsdp", [("pmap", 1), ("mesh", 2)])
def test_runs_of_other_seeds_rates_and_lengths_share_a_program(problem, lift, fsdp):
    params, frozen, batches = problem
    devices, traced = Devices(lift, fsdp=fsdp), []

    def loss(*arguments):
        traced.append(arguments)
        return ragged_loss(*arguments)

    optimizer = make_optimizer(AVERAGED)
    step = devices.lift_step(make_step(loss, optimizer))

    def trained(step, *, seed, steps, **changes):
        schedule = make_schedule(dataclasses.replace(AVERAGED, **changes), steps=steps)
        given = devices.place(make_given(frozen, seed=seed, schedule=schedule))
        state = devices.place(create_state(params, optimizer))
        for batch in batches:
            state, metrics = step(state, given, devices.place_batch(batch))
        return jax.device_get((state.params["kernel"], metrics))

    runs = (
        {"seed": 0, "steps": 5},
        {"seed": 1, "steps": 5},
        {"seed": 0, "steps": 5, "learning_rate": 0.02},
        {"seed": 0, "steps": 7, "warmup_steps": 2},
        {"seed": 2**40 + 1, "steps": 5},
    )
    found = [trained(step, **changes) for changes in runs]
    assert len(traced) == 1
    for index, changes in enumerate(runs):
        alone = trained(devices.lift_step(make_step(loss, optimizer)), **changes)
        jax.tree.map(np.testing.assert_array_equal, found[index], alone)
    kernels = [kernel.tobytes() for kernel, _ in found[:4]]
    assert len(set(kernels)) == len(kernels)


AVERAGED = OptimizerConfig(
    name="sgd",
    learning_rate=0.01,
    warmup_steps=0,
    schedule="constant",
    weight_decay=0.0,
    clip_norm=0.0,
    ema_decay=0.7,
)


@pytest.mark.parametrize("lift,fsdp,accumulate", [("pmap", 1, 1), ("mesh", 4, 1), ("pmap", 1, 2)])
def test_the_average_is_that_of_the_parameters_after_each_step(problem, lift, fsdp, accumulate):
    params, frozen, batches = problem
    devices = Devices(lift, fsdp=fsdp)
    optimizer = make_optimizer(AVERAGED)
    seen = []
    for steps in range(1, 6):
        state, _ = train(
            (params, frozen, batches[:steps]),
            devices,
            optimizer,
            schedule=make_schedule(AVERAGED, steps=5),
            accumulate=accumulate,
        )
        seen.append(state.params["kernel"])
    weights = 0.7 ** np.arange(4, -1, -1)
    expected = np.average(seen, axis=0, weights=weights)
    found = evaluated_params(state, AVERAGED)["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    # It does not change the training itself.
    plain, _ = train(problem, devices, accumulate=accumulate)
    np.testing.assert_array_equal(state.params["kernel"], plain.params["kernel"])


def test_a_skipped_step_leaves_the_average_as_it_was(problem):
    params, frozen, batches = problem
    broken = {**batches[0], "x": np.full_like(batches[0]["x"], np.nan)}
    optimizer = make_optimizer(AVERAGED)

    def averaged(batches):
        state, _ = train(
            (params, frozen, batches),
            Devices(),
            optimizer,
            schedule=make_schedule(AVERAGED, steps=5),
            nonfinite="skip",
        )
        return state.opt_state.average, evaluated_params(state, AVERAGED)["kernel"]

    never, start = averaged([broken])
    assert never.count == 0
    np.testing.assert_array_equal(start, params["kernel"])
    once, found = averaged([batches[0], broken])
    assert once.count == 1
    np.testing.assert_array_equal(found, averaged(batches[:1])[1])


def test_an_optimizer_without_its_rate_says_where_it_comes_from(problem):
    with pytest.raises(ConfigError, match=r"learning rate step by step: make_given\("):
        train(problem, Devices(), make_optimizer(AVERAGED))


def test_the_donated_state_does_not_take_the_callers_arrays_along(problem):
    params, frozen, batches = problem
    on_device = jax.tree.map(jnp.asarray, params)
    train((on_device, frozen, batches), Devices("pmap"))
    np.testing.assert_array_equal(on_device["kernel"], params["kernel"])


def test_a_batch_that_does_not_divide_is_refused_with_the_next_that_does():
    with pytest.raises(ConfigError, match=r"batch_size=30 .* 8 devices .* 32"):
        Devices("pmap").check_batch(30)
    with pytest.raises(ConfigError, match="lift=mesh"):
        Devices("pmap", fsdp=2)
