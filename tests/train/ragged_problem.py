"""A small problem with everything a split of the batch could get wrong."""

import jax
import jax.numpy as jnp
import numpy as np

from minilm_jax.reductions import Loss, Mean

ROWS, WIDTH = 32, 16


def ragged_loss(params, frozen, batch, key):
    """Two terms with different counts, and dropout by global row: all a split could get wrong."""
    x = batch["x"] @ params["kernel"]
    if key is not None:
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(batch["rows"])
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.8, (WIDTH,)))(keys)
        x = jnp.where(keep, x, 0.0)
    error = (x - batch["x"] @ frozen["kernel"]) ** 2
    few = batch["few"]
    return Loss(
        terms={
            "mean": Mean(total=(error.sum(-1) * batch["many"]).sum(), count=batch["many"].sum()),
            "rare": Mean(total=(jnp.abs(x).sum(-1) * few).sum(), count=few.sum()),
        },
        metrics={"per_column": Mean(total=error.sum(0), count=batch["many"].sum())},
        counts={"rows": jnp.float32(x.shape[0])},
    )


def make_problem(*, steps):
    """Returns parameters, the target's parameters and the batches."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)}
    frozen = {"kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)}
    batches = [
        {
            "x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32),
            # Ragged: devices see very different counts, and one sees none of the rare term.
            "many": (rng.random(ROWS) < np.linspace(0.1, 1, ROWS)).astype(np.float32),
            "few": (np.arange(ROWS) % 11 == 5).astype(np.float32),
            "rows": np.arange(ROWS, dtype=np.int32),
        }
        for _ in range(steps)
    ]
    return params, frozen, batches
