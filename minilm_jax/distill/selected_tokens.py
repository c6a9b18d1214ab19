"""Means over the masked tokens of what exists for a few tokens at a time: vocabulary scores."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minilm_jax.distill.objective import Params
from minilm_jax.distill.relations_blocked import Wanted
from minilm_jax.reductions import Mean
from minilm_jax.rows import sum_over_rows

TOKENS_A_BLOCK = 512
"""Tokens whose vocabulary scores exist at a time: 60 MB in fp32 at BERT's vocabulary."""


class Inputs(NamedTuple):
    """What a function of single tokens is computed from."""

    params: Params
    tokens: Array
    """`[B, L, …]`; the function sees those of some tokens, `[N, …]`."""


OfTokens = Callable[[Inputs, Inputs], Float[Array, "N"]]
"""From what is learned and what is given to a value a token."""


def over_selected(
    function: OfTokens,
    learned: Inputs,
    given: Inputs,
    *,
    selected: Bool[Array, "B L"],
    block: int | None = None,
) -> Mean:
    """Returns the mean of a function of single tokens over the selected ones.

    Vocabulary scores of a whole batch are too large to exist at once, and most tokens are not
    masked. So each device brings the selected ones of its tokens to the front and takes them in
    blocks; a block without any costs nothing. A gradient that is asked for is computed along with
    the value, block by block. Exact for any number of selected tokens.

    Args:
      function: of these arguments alone; no array may reach it by closure.
      learned: what a gradient is returned for.
      given: the teacher's, labels: no gradient reaches it.
      selected: which tokens count.
      block: tokens at a time; None is TOKENS_A_BLOCK.
    """
    block = block or TOKENS_A_BLOCK

    def of_rows(
        params: tuple[Params, Params], rows: tuple[Array, Array, Bool[Array, "B L"]]
    ) -> Mean:
        learned, given = (Inputs(*x) for x in zip(params, rows[:2], strict=True))
        total = _total(function, block, learned, given, rows[2])
        return Mean(total=total, count=jnp.sum(rows[2], dtype=jnp.float32))

    params = (learned.params, given.params)
    return sum_over_rows(of_rows, params, (learned.tokens, given.tokens, selected))


class _Sums(NamedTuple):
    """A function's sum over the selected tokens, and its gradient where wanted."""

    total: Float[Array, ""]
    gradient: Inputs | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    function: OfTokens,
    block: int,
    learned: Inputs,
    given: Inputs,
    selected: Bool[Array, "B L"],
) -> Float[Array, ""]:
    """Returns the function's sum over the selected tokens."""
    return _sums(function, block, learned, given, selected, wanted="loss").total


def _forward(
    function: OfTokens, block: int, learned: Inputs, given: Inputs, selected: Bool[Array, "B L"]
) -> tuple[Float[Array, ""], Inputs | None]:
    sums = _sums(function, block, learned, given, selected, wanted="loss and gradients")
    return sums.total, sums.gradient


def _backward(
    function: OfTokens,
    block: int,
    gradient: Inputs,
    cotangent: Float[Array, ""],
) -> tuple[Inputs, None, None]:
    return jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradient), None, None


_total.defvjp(_forward, _backward)


def _sums(
    function: OfTokens,
    block: int,
    learned: Inputs,
    given: Inputs,
    selected: Bool[Array, "B L"],
    *,
    wanted: Wanted,
) -> _Sums:
    shape = selected.shape
    selected = selected.reshape(-1)
    learned, given = (
        x._replace(tokens=x.tokens.reshape(-1, *x.tokens.shape[2:])) for x in (learned, given)
    )
    # Places of the selected tokens first; what fills the last block has places behind the end.
    filled = jnp.pad(selected, (0, -selected.size % block))
    order = jnp.argsort(~filled, stable=True)
    blocks = -(-jnp.sum(selected) // block)

    def add(index: Array, sums: _Sums) -> _Sums:
        first = index * block
        places = jax.lax.dynamic_slice_in_dim(order, first, block)

        def take(inputs: Inputs) -> Inputs:
            return inputs._replace(tokens=inputs.tokens.at[places].get(mode="clip"))

        def of_block(taken: Inputs) -> Float[Array, ""]:
            return jnp.sum(jnp.where(filled[places], function(taken, take(given)), 0.0))

        if sums.gradient is None:
            return _Sums(sums.total + of_block(take(learned)))
        value, found = jax.value_and_grad(of_block)(take(learned))
        put = sums.gradient.tokens.at[places].set
        gradient = Inputs(
            params=jax.tree.map(jnp.add, sums.gradient.params, found.params),
            tokens=put(found.tokens, mode="drop", unique_indices=True),
        )
        return _Sums(sums.total + value, gradient)

    nothing = jax.tree.map(jnp.zeros_like, learned) if wanted == "loss and gradients" else None
    sums = jax.lax.fori_loop(0, blocks, add, _Sums(jnp.zeros((), jnp.float32), nothing))
    if sums.gradient is None:
        return sums
    tokens = sums.gradient.tokens
    tokens = tokens.reshape(*shape, *tokens.shape[1:])
    return sums._replace(gradient=sums.gradient._replace(tokens=tokens))
