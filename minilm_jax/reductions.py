"""Means that survive being split: every reduction in the project is a (total, count) pair."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float

Params = TypeVar("Params")
Rows = TypeVar("Rows")
Sums = TypeVar("Sums")


class Mean(NamedTuple):
    """A mean not yet divided, so that parts of a batch can be summed before they are.

    The mean of means is wrong as soon as the parts have different counts, and with ragged padding
    they always have.
    """

    total: Float[Array, "*shape"]
    """A vector where several things are counted alike, such as relation heads."""
    count: Float[Array, ""]  # type: ignore[assignment]  # tuples have a method of this name

    def value(self) -> Float[Array, "*shape"]:
        """Returns total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


class Loss(NamedTuple):
    """What a loss function returns for its part of a batch."""

    terms: dict[str, Mean]
    """The loss is the sum of these means, each over the whole global batch."""
    metrics: dict[str, Mean]
    """Reported, not trained on."""
    counts: dict[str, Float[Array, ""]]
    """Summed over the global batch and reported per second, such as tokens."""

    def value(self) -> Float[Array, ""]:
        """Returns the sum of the terms' means."""
        return jnp.sum(jnp.stack([mean.value() for mean in self.terms.values()]))


def sum_over_rows(function: Callable[[Params, Rows], Sums], params: Params, rows: Rows) -> Sums:
    """Returns function(params, rows), a tree of sums over rows; each device does its own rows.

    A jit over a mesh sees the rows of all devices, and XLA divides neither a sort of them, nor a
    loop over blocks of them, nor a kernel. So where a mesh is in context (train/devices.py puts it
    there) the function is called on every device and the results are summed. Under pmap, under
    shard_map, on one device and where there is no mesh it is simply called.

    Args:
      function: of these arguments alone; no array may reach it by closure.
      params: arrays that every device gets whole. Their gradient is summed over devices once.
      rows: arrays `[B, ...]`; the devices of the mesh must divide B.

    Raises:
      ValueError: by JAX, where they do not.
    """
    mesh = get_abstract_mesh()
    axes = mesh.auto_axes
    if mesh.size < 2 or not axes:
        return function(params, rows)

    def of_device(params: Params, rows: Rows) -> Sums:
        sums: Sums = jax.tree.map(lambda x: x[None], function(params, rows))
        return sums

    divided = PartitionSpec(axes)
    sums: Sums = jax.shard_map(
        of_device,
        in_specs=(PartitionSpec(), divided),
        out_specs=divided,
        axis_names=set(axes),
        # Checked, the gradient of `params` would be summed over devices wherever they are used: at
        # every turn of a loop, and in branches that other devices do not take.
        check_vma=False,
    )(params, rows)
    return jax.tree.map(lambda x: x.sum(axis=0), sums)
