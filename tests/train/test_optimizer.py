"""Schedules and where weight decay applies."""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minilm_jax.errors import ConfigError
from minilm_jax.train.optimizer import Decay, OptimizerConfig, make_optimizer, make_schedule

PARAMS = {
    "layer_0": {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "layer_1": {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
}


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimizerConfig)["name"]))
def test_decay_spares_biases_norms_and_what_the_loss_does_not_reach(name):
    config = OptimizerConfig(name=name, weight_decay=0.5)
    behind = [("layer_1", "dense", name) for name in ("kernel", "bias")]
    optimizer = make_optimizer(config, unreached=behind)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(zeros, state, PARAMS, learning_rate=0.1)
    assert (np.asarray(updates["layer_0"]["dense"]["kernel"]) < 0).all()
    for path in (("layer_0", "dense", "bias"), ("layer_1", "dense", "kernel"), ("norm", "scale")):
        leaf = updates
        for part in path:
            leaf = leaf[part]
        np.testing.assert_array_equal(leaf, 0.0, err_msg=str(path))
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    reached = sum(x.size for x in jax.tree.leaves([PARAMS["layer_0"], PARAMS["norm"]]))
    assert moments == (0 if name == "sgd" else 2 * reached)


def test_linear_schedule_warms_up_from_zero_and_ends_at_zero():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    schedule = make_schedule(config, steps=12)
    found = [float(schedule(step)) for step in range(14)]
    expected = [0, 0.25, 0.5, 0.75, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 7])
@pytest.mark.parametrize("decay", get_args(Decay))
def test_schedules_are_those_of_optax(decay, warmup_steps):
    steps, peak = 400_000, 3e-4
    config = OptimizerConfig(learning_rate=peak, warmup_steps=warmup_steps, schedule=decay)
    after = {
        "linear": lambda count: optax.linear_schedule(peak, 0.0, count),
        "cosine": lambda count: optax.cosine_decay_schedule(peak, count),
        "constant": lambda count: optax.constant_schedule(peak),
    }[decay](steps - warmup_steps)
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps, 1))
    expected = optax.join_schedules([warmup, after], [warmup_steps])
    at = np.concatenate([np.arange(20), np.linspace(20, steps, 100).astype(int)])
    found = jax.jit(jax.vmap(make_schedule(config, steps=steps)))(at)
    np.testing.assert_allclose(found, jax.vmap(expected)(at), rtol=2e-6, atol=1e-10)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps=10 .* steps=5"):
        make_schedule(OptimizerConfig(warmup_steps=10), steps=5)
    nan = float("nan")
    for wrong in ({"learning_rate": -1.0}, {"learning_rate": nan}, {"b1": 1.5}, {"eps": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            OptimizerConfig(**wrong)


def test_clipping_is_by_the_global_norm():
    config = OptimizerConfig(name="sgd", weight_decay=0.0)
    optimizer = make_optimizer(config)
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"kernel": jnp.array([4.0])}}
    updates, _ = optimizer.update(grads, optimizer.init(params), params, learning_rate=1.0)
    np.testing.assert_allclose(updates["a"]["kernel"], [-0.6, 0], atol=1e-6)
    np.testing.assert_allclose(updates["b"]["kernel"], [-0.8], atol=1e-6)
