"""Dot-product attention by the kernels for CPUs (native/attention.cc), in fp32."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from minilm_jax import native


def cpu_forward(
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    segments: Int[Array, "B L"],
    words: UInt32[Array, "B 2"],
    *,
    heads: int,
    rate: float,
) -> tuple[Float[Array, "B L D"], Float[Array, "B H L"]]:
    """Returns the mixed values and the logarithm of each row's total of exponentials."""
    batch, length, _ = query.shape
    mixed, logsumexp = native.call(
        "AttentionForward",
        *(query, key, value, segments.astype(jnp.int32), words),
        outputs=[query.shape, (batch, heads, length)],
        heads=np.int64(heads),
        rate=np.float64(rate),
    )
    return mixed, logsumexp


def cpu_backward(
    cotangent: Float[Array, "B L D"],
    query: Float[Array, "B L D"],
    key: Float[Array, "B L D"],
    value: Float[Array, "B L D"],
    mixed: Float[Array, "B L D"],
    logsumexp: Float[Array, "B H L"],
    segments: Int[Array, "B L"],
    words: UInt32[Array, "B 2"],
    *,
    heads: int,
    rate: float,
) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"], Float[Array, "B L D"]]:
    """Returns the gradients of queries, keys and values."""
    of_query, of_key, of_value = native.call(
        "AttentionBackward",
        *(cotangent, query, key, value, mixed, logsumexp, segments.astype(jnp.int32), words),
        outputs=[query.shape] * 3,
        heads=np.int64(heads),
        rate=np.float64(rate),
    )
    return of_query, of_key, of_value
