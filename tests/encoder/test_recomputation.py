"""What the gradient computes again instead of keeping: its values, and that nothing is kept."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minilm_jax import cpu
from minilm_jax.encoder import dot_product, encoder, feed_forward
from minilm_jax.encoder.activations import ACTIVATIONS
from minilm_jax.encoder.config import Compute, EncoderConfig
from minilm_jax.encoder.embedding import Embed
from minilm_jax.encoder.encoder import encode, init_params
from minilm_jax.encoder.feed_forward import FeedForward
from minilm_jax.encoder.norm import LayerNorm
from minilm_jax.reductions import Loss, Mean
from minilm_jax.train.devices import Devices
from minilm_jax.train.state import create_state
from minilm_jax.train.step import make_given, make_step

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)


@pytest.fixture
def one_device(monkeypatch):
    """As in a process with one CPU; here are eight, over which a jit's arrays might be divided."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(module, params, x, weight):
    def total(params, x):
        out = module.apply({"params": params}, x)
        return (out.astype(jnp.float32) * weight).sum(), out

    return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)


def near(found, expected, atol):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0, atol=atol
        ),
        found,
        expected,
    )


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-5), ("bfloat16", 0.03)])
def test_layer_norm_and_its_gradient_are_flax_s(dtype, atol):
    x, weight = (100 + 3 * random(4, 7, 32)).astype(dtype), random(4, 7, 32, seed=1)
    params = {"scale": random(32, seed=2), "bias": random(32, seed=3)}
    flax = nn.LayerNorm(epsilon=CONFIG.layer_norm_eps, dtype=dtype, use_fast_variance=False)
    found = value_and_gradients(LayerNorm(CONFIG, dtype), params, x, weight)
    assert found[1].dtype == x.dtype and found[0][1].dtype == x.dtype
    near(found, value_and_gradients(flax, params, x, weight), atol)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_and_its_gradient_are_autodiff_s(activation, monkeypatch):
    module = FeedForward(dataclasses.replace(CONFIG, hidden_act=activation), jnp.float32)
    x, weight = random(2, 5, 32), random(2, 5, 32, seed=1)
    params = module.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * random(*p.shape, seed=4), params)
    found = value_and_gradients(module, params, x, weight)
    kept_whole = feed_forward._activated_affine.fun
    monkeypatch.setattr(feed_forward, "_activated_affine", kept_whole)
    near(found, value_and_gradients(module, params, x, weight), 2e-5)


@pytest.mark.parametrize("layer", ["up", "down"])
def test_a_bias_s_gradient_is_summed_in_fp32(layer):
    """In bfloat16 a sum of thousands of tokens stops growing, or is mostly rounding."""
    module = FeedForward(CONFIG, jnp.bfloat16)
    x, weight = 1 + random(64, 128, 32).astype(jnp.bfloat16), 1 + random(64, 128, 32, seed=1)
    params = module.init(jax.random.key(0), x)["params"]
    (found, _), _ = value_and_gradients(module, params, x, weight)
    expected, _ = value_and_gradients(FeedForward(CONFIG, jnp.float32), params, x, weight)[0]
    found, expected = found[layer]["bias"], expected[layer]["bias"]
    assert jnp.linalg.norm(found - expected) < 0.01 * jnp.linalg.norm(expected)


def test_the_table_s_gradient_adds_up_what_is_looked_up_twice():
    ids = jnp.asarray([[1, 1, 7], [0, 1, 49]])
    table, weight = random(50, 32), random(2, 3, 32, seed=1)

    def looked_up(table):
        return Embed(50, CONFIG).apply({"params": {"embedding": table}}, ids)

    gradient = jax.jit(jax.grad(lambda table: (looked_up(table) * weight).sum()))(table)
    expected = np.zeros((50, 32))
    np.add.at(expected, np.asarray(ids), np.asarray(weight, np.float64))
    np.testing.assert_array_equal(looked_up(table), table[ids])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [0.0, -2.0, np.inf, -np.inf, np.nan])
def test_waiting_for_a_cotangent_changes_no_number(first, one_device):
    cotangent, arrays = jnp.asarray([[first, 1.0]]), {"x": random(3), "n": jnp.arange(3)}
    found = jax.jit(cpu.not_before)(cotangent, arrays)
    jax.tree.map(np.testing.assert_array_equal, found, arrays)
    zeros = jax.jit(partial(cpu.zeros_not_before, shape=(2, 3)))(cotangent)
    np.testing.assert_array_equal(zeros, np.zeros((2, 3)))


def temporary_bytes(layers, rows, length, vocabulary=50):
    """Returns what the gradient of an encoder with dropout takes beside arguments and results."""
    config = dataclasses.replace(
        CONFIG,
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=64,
        intermediate_size=256,
    )
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    tokens, row = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, length), (rows,)))
    batch = {"input_ids": tokens, "segments": tokens, "rows": row}

    def norm(params, batch):
        def total(params):
            hidden = encode(config, params, batch, key=jax.random.key(1)).last_hidden_state
            return jnp.square(hidden).sum()

        return optax.tree.norm(jax.grad(total)(params))

    compiled = jax.jit(norm).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_layer_keeps_what_its_products_need_and_no_more(one_device):
    rows, length, width, inner = 64, 32, 64, 256
    few, many = (temporary_bytes(n, rows, length) for n in (2, 6))
    # Queries, keys, values and mixed values, the inputs and results of two norms, and the inputs of
    # the activation: fp32.
    least = rows * length * (8 * width + inner) * 4
    assert least < (many - few) / 4 < 1.15 * least


def test_a_table_s_gradient_is_there_when_the_activations_are_not(one_device):
    rows, length, width, vocabulary = 64, 32, 64, 60_000
    small, large = (temporary_bytes(6, rows, length, n) for n in (50, vocabulary))
    assert large - small < 0.3 * vocabulary * width * 4


@pytest.mark.slow
@pytest.mark.parametrize("elements", [2**20, 1])
def test_gradients_under_a_checked_shard_map(elements, monkeypatch):
    """Parameters are the same everywhere, rows are not: JAX checks what varies with which axis."""
    monkeypatch.setattr(dot_product, "FORWARD_ELEMENTS", elements)
    monkeypatch.setattr(dot_product, "BACKWARD_ELEMENTS", elements)
    params = init_params(jax.random.key(0), CONFIG)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 6)), jnp.int32)
    batch = {"input_ids": tokens, "segments": jnp.ones_like(tokens), "rows": jnp.arange(4)}

    def gradient(params, batch):
        def total(params):
            hidden = encode(CONFIG, params, batch, key=jax.random.key(1)).last_hidden_state
            return jnp.sum(hidden**4) / 1000

        return jax.grad(total)(params)

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("data",))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    near(jax.jit(mapped)(params, batch), jax.jit(gradient)(params, batch), 1e-5)


def test_what_waits_for_a_cotangent_has_nothing_sent_round_a_mesh():
    """Parts of parameters and of gradients are sent; an array's element, from device to device."""
    devices = Devices("mesh", fsdp=2, devices=jax.devices()[:4])
    batch = {name: np.ones((8, 6), np.int32) for name in ("input_ids", "segments")}

    def loss(params, frozen, batch, key):
        hidden = encode(CONFIG, params, batch).last_hidden_state
        total = Mean(total=jnp.sum(hidden**4), count=jnp.float32(1))
        return Loss(terms={"total": total}, metrics={}, counts={})

    optimizer = optax.sgd(0.1)
    state = devices.place(create_state(init_params(jax.random.key(0), CONFIG), optimizer))
    step = devices.lift_step(make_step(loss, optimizer))
    given = devices.place(make_given(None, seed=0))
    text = step.lower(state, given, devices.place_batch(batch)).compile().as_text()
    assert "all-gather(" in text
    assert "collective-permute(" not in text


@pytest.mark.parametrize("stop_after", [None, 2])
@pytest.mark.parametrize("tokens", [10, 30, 60])
def test_rows_taken_a_few_at_a_time_are_the_rows(tokens, stop_after, monkeypatch, one_device):
    params = init_params(jax.random.key(0), CONFIG)
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": jnp.asarray(rng.integers(0, 50, (6, 10)), jnp.int32),
        "segments": jnp.asarray(np.sort(rng.integers(0, 3, (6, 10)))[:, ::-1]),
        "positions": jnp.asarray(rng.integers(0, 60, (6, 10))),
    }
    monkeypatch.setattr(encoder, "CPU_TOKENS", 1000)
    run = partial(encode, CONFIG, stop_after=stop_after)
    whole = jax.jit(run)(params, batch)
    assert not loops(run, params, batch)
    monkeypatch.setattr(encoder, "CPU_TOKENS", tokens)
    run = partial(encode, CONFIG, stop_after=stop_after)  # or JAX would know it by its identity
    assert loops(run, params, batch) == (tokens < 60)
    near(jax.jit(run)(params, batch), whole, 1e-6)
    # With dropout all rows are taken at once, and where blocks are computed again.
    batch["rows"] = jnp.arange(6)
    assert not loops(partial(encode, CONFIG, key=jax.random.key(0)), params, batch)
    assert not loops(partial(encode, CONFIG, compute=Compute(remat=True)), params, batch)


def test_rows_that_hardly_divide_are_taken_together(monkeypatch, one_device):
    monkeypatch.setattr(encoder, "CPU_TOKENS", 64)
    params = init_params(jax.random.key(0), CONFIG)
    for rows, divided in ((31, False), (32, True), (0, False)):
        tokens = jnp.ones((rows, 8), jnp.int32)
        batch = {"input_ids": tokens, "segments": tokens}
        assert loops(partial(encode, CONFIG), params, batch) == divided
        hidden = encode(CONFIG, params, batch).last_hidden_state
        assert hidden.shape == (rows, 8, CONFIG.hidden_size)
    jax.grad(lambda params: encode(CONFIG, params, batch).last_hidden_state.sum())(params)


def loops(function, *arguments):
    return "scan[" in str(jax.make_jaxpr(function)(*arguments))
