"""One optimizer step as one per-device function; devices.py lifts it over the devices."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt32

from minilm_jax.reductions import Loss, Mean
from minilm_jax.settings import check
from minilm_jax.train.optimizer import Schedule
from minilm_jax.train.state import Params, TrainState

Batch = Mapping[str, Array]


LossFunction = Callable[[Params, Any, Batch, Array | None], Loss]
"""(params, frozen, batch, key) -> Loss of a part of a batch.

`frozen` is what is not trained: the teacher. `key` is None in evaluation: no dropout."""

Nonfinite = Literal["stop", "skip"]

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


class Given(NamedTuple):
    """What all steps of a run are given.

    It is data and no part of the compiled step: runs that differ in nothing else share a program.
    """

    frozen: Any
    """What is not trained: the teacher; None where there is none."""
    seed: UInt32[Array, "..."]
    """As `key_data`; the key of a step is a function of it and the step alone."""
    schedule: Schedule | None
    """None where the optimizer has its own."""


def make_given(frozen: Any, *, seed: int, schedule: Schedule | None = None) -> Given:
    """Returns what the steps of a run of this seed are given, still to be placed on its devices."""
    return Given(frozen, jax.device_get(jax.random.key_data(jax.random.key(seed))), schedule)


def make_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    nonfinite: Nonfinite = "stop",
) -> Step:
    """Returns step(state, given, batch, axis=None) -> (state, metrics).

    The gradient is that of `sum over terms of (global total / global count)`. Counts do not depend
    on the parameters, so they are computed for the whole batch first and each device
    differentiates its own totals divided by them; the sum of the gradients is then exact for any
    split of the batch.

    Args:
      loss_function: the loss of a part of the batch.
      optimizer: applied once a step to the summed gradient. Its update is given the
        `learning_rate` of the run's schedule, and may leave it aside.
      accumulate: micro-batches a step; memory falls, numbers stay.
      nonfinite: "stop" applies the update whatever it is (the loop stops the run); "skip" leaves
        parameters and optimizer as they were when loss or gradient is not finite, and counts the
        step.
    """
    check("nonfinite", nonfinite, Nonfinite)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        state: TrainState, given: Given, batch: Batch, axis: str | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        def over_devices(tree: Any) -> Any:
            return jax.lax.psum(tree, axis) if axis else tree

        frozen = given.frozen
        rate = {} if given.schedule is None else {"learning_rate": given.schedule(state.step)}
        key = jax.random.fold_in(jax.random.wrap_key_data(given.seed), state.step)

        def scaled(params: Params, part: Batch, counts: dict[str, Array]) -> tuple[Array, Loss]:
            loss = loss_function(params, frozen, part, key)
            return sum_of_ratios(loss.terms, counts), loss

        if accumulate == 1:

            def whole(params: Params) -> tuple[Array, Loss]:
                loss = loss_function(params, frozen, batch, key)
                return sum_of_ratios(loss.terms, over_devices(counts_of(loss))), loss

            grads, loss = jax.grad(whole, has_aux=True)(state.params)
        else:
            # Only the counts are used, so the forward pass is dead code to XLA. In a loop of their
            # own, CPUs of one process could wait there for each other while others wait elsewhere.
            counts = over_devices(counts_of(loss_function(state.params, frozen, batch, key)))
            parts = jax.tree.map(lambda x: split(x, accumulate), batch)

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                found = jax.grad(scaled, has_aux=True)(state.params, part, counts)
                return jax.tree.map(jnp.add, carry, found), None

            shapes = jax.eval_shape(
                jax.grad(scaled, has_aux=True),
                state.params,
                jax.tree.map(lambda x: x[0], parts),
                counts,
            )
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, loss), _ = jax.lax.scan(add, zeros, parts)

        grads, loss = over_devices((grads, loss))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **rate)
        params = optax.apply_updates(state.params, updates)
        total = loss.value()
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        if nonfinite == "skip":
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        metrics = {
            "loss": total,
            **{name: mean.value() for name, mean in (loss.terms | loss.metrics).items()},
            "grad_norm": grad_norm,
            **rate,
            "finite": finite,
            "counts": loss.counts,
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def make_evaluation(loss_function: LossFunction, *, accumulate: int = 1) -> Callable[..., Loss]:
    """Returns evaluate(params, frozen, batch, axis=None) -> the batch's Loss, nothing divided.

    Add the results over batches and divide once: then an uneven last batch weighs what it should.
    It takes as many micro-batches as the step, or it could need more memory.
    """

    def evaluate(params: Params, frozen: Any, batch: Batch, axis: str | None = None) -> Loss:
        if accumulate == 1:
            loss = loss_function(params, frozen, batch, None)
        else:
            parts = jax.tree.map(lambda x: split(x, accumulate), batch)
            losses = jax.lax.map(lambda part: loss_function(params, frozen, part, None), parts)
            loss = jax.tree.map(lambda x: x.sum(axis=0), losses)
        return jax.lax.psum(loss, axis) if axis else loss

    return evaluate


def counts_of(loss: Loss) -> dict[str, Array]:
    """Returns the count of each term."""
    return {name: jax.lax.stop_gradient(mean.count) for name, mean in loss.terms.items()}


def sum_of_ratios(terms: dict[str, Mean], counts: dict[str, Array]) -> Float[Array, ""]:
    """Returns the sum over terms of this part's total divided by the global count."""
    return jnp.sum(
        jnp.stack([mean._replace(count=counts[name]).value() for name, mean in terms.items()])
    )


def split(x: Array, parts: int) -> Array:
    """Returns `[parts, B / parts, …]`, taking every parts-th row so that sharded rows stay put."""
    if x.shape[0] % parts:
        raise ValueError(f"{parts} micro-batches do not divide {x.shape[0]} rows a device")
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
