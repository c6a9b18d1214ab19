"""GELU, of polynomials on CPUs and of XLA's erf elsewhere, against double precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minilm_jax.encoder import activations
from minilm_jax.encoder.activations import ACTIVATIONS, gelu


def phi(x):
    return np.vectorize(math.erfc)(-x / math.sqrt(2)) / 2


@pytest.mark.parametrize("cpu, atol", [(True, 6e-7), (False, 1e-6)])
def test_gelu_and_its_derivative_are_the_exact_ones(cpu, atol, monkeypatch):
    """A CPU's to a unit or two in fp32's last place of Φ, where XLA's erf leaves more."""
    monkeypatch.setattr(activations, "on_cpu", lambda x: cpu)
    x = jnp.concatenate([jnp.linspace(-9, 9, 20_001), jnp.geomspace(1e-30, 1e4, 1001)])
    exact = np.asarray(x, np.float64)
    derivative = phi(exact) + exact * np.exp(-(exact**2) / 2) / math.sqrt(2 * math.pi)
    found = jax.vmap(jax.value_and_grad(gelu))(x)
    np.testing.assert_allclose(found[0], exact * phi(exact), rtol=2e-7, atol=atol)
    np.testing.assert_allclose(found[1], derivative, rtol=0, atol=3e-7)


@pytest.mark.parametrize("x, value, slope", [(-1e20, 0, 0), (1e20, 1e20, 1), (np.inf, np.inf, 1)])
def test_far_out_it_is_zero_or_the_identity(x, value, slope):
    assert jax.value_and_grad(gelu)(jnp.float32(x)) == (np.float32(value), slope)


def test_what_is_no_number_stays_none():
    assert np.isnan(jax.value_and_grad(gelu)(jnp.float32(jnp.nan))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_bf16_is_rounded_once(name):
    function, x = ACTIVATIONS[name], jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    value, pull = jax.vjp(function, x)
    np.testing.assert_array_equal(value, function(x.astype(jnp.float32)).astype(jnp.bfloat16))
    (slope,) = pull(jnp.ones_like(x))
    assert slope.dtype == jnp.bfloat16
    expected = jax.vmap(jax.grad(function))(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(slope, expected)
