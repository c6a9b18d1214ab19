"""What a loss does not depend on, found in its trace."""

import jax
import jax.numpy as jnp
import pytest

from minilm_jax.reductions import Loss, Mean
from minilm_jax.train.reach import Unreached, leave_out, unreached

PARAMS = {"used": jnp.ones(3), "reported": jnp.ones(3), "beside": jnp.ones(3)}
FROZEN = {
    "trained_on": jnp.full(3, 2.0),
    "reported": {"a": jnp.full(3, 3.0), "b": jnp.full(3, 5.0)},
    "evaluated_on": jnp.full(3, 7.0),
    "shape_alone": jnp.full(3, 11.0),
}
BATCH = {"x": jnp.ones((2, 3))}


def loss(params, frozen, batch, key):
    def mean(x):
        return Mean(jnp.sum(batch["x"] @ x), jnp.float32(batch["x"].shape[0]))

    other = frozen["evaluated_on"] if key is None else frozen["trained_on"]
    zero = jnp.zeros_like(frozen["shape_alone"])
    metric = params["reported"] * frozen["reported"]["a"]
    return Loss({"term": mean(params["used"] * other + zero)}, {"metric": mean(metric)}, {})


def test_what_is_only_reported_or_only_evaluated_on_is_reached_too():
    found = unreached(loss, PARAMS, FROZEN, BATCH)
    assert found == Unreached(
        params=frozenset({("reported",), ("beside",)}),
        frozen=frozenset({("reported", "b"), ("shape_alone",)}),
    )


def test_shapes_will_do():
    shapes = jax.eval_shape(lambda: (PARAMS, FROZEN, BATCH))
    assert unreached(loss, *shapes) == unreached(loss, PARAMS, FROZEN, BATCH)


@pytest.mark.parametrize("key", [None, 0])
def test_a_loss_given_less_is_the_same(key):
    found = unreached(loss, PARAMS, FROZEN, BATCH)
    less, given = leave_out(loss, FROZEN, found.frozen)
    assert jax.tree.map(jnp.shape, given) == {
        "trained_on": (3,),
        "reported": {"a": (3,)},
        "evaluated_on": (3,),
    }
    key = key if key is None else jax.random.key(key)
    assert less(PARAMS, given, BATCH, key) == loss(PARAMS, FROZEN, BATCH, key)
    # Nothing is held in the place of what is left out.
    program = jax.jit(lambda given: less(PARAMS, given, BATCH, key).value()).lower(given)
    assert "11." not in program.as_text()
