"""The rows of a batch on a mesh of devices: what a jit over all of them has to be told.

train/devices.py puts the mesh in context. Where there is none, on one device, under pmap and under
shard_map, the rows are one device's already and these functions do nothing of their own.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float

Params = TypeVar("Params")
Rows = TypeVar("Rows")
Sums = TypeVar("Sums")
Mapped = TypeVar("Mapped")


def divide_rows(x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Returns the array, its rows divided over all devices, and those of its gradient.

    Parameters are divided too, and XLA may carry their division on to the activations: by columns,
    with rows whole on several devices.

    Raises:
      ValueError: by JAX, where the devices of the mesh do not divide B.
    """
    axes = _mesh_axes()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def sum_over_rows(function: Callable[[Params, Rows], Sums], params: Params, rows: Rows) -> Sums:
    """Returns function(params, rows), a tree of sums over rows; each device does its own rows.

    XLA divides neither a sort of rows, nor a loop over blocks of them, nor a kernel. So the
    function is called on every device, and the results are summed.

    Args:
      function: of these arguments alone; no array may reach it by closure.
      params: arrays that every device gets whole. Their gradient is summed over devices once.
      rows: arrays `[B, ...]`.

    Raises:
      ValueError: by JAX, where the devices of the mesh do not divide B.
    """
    axes = _mesh_axes()
    if not axes:
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


def map_over_rows(function: Callable[[Rows], Mapped], rows: Rows) -> Mapped:
    """Returns function(rows), a tree of arrays `[B, ...]`; each device does its own rows.

    Args:
      function: of this argument alone; no array may reach it by closure.
      rows: arrays `[B, ...]`.

    Raises:
      ValueError: by JAX, where the devices of the mesh do not divide B.
    """
    axes = _mesh_axes()
    if not axes:
        return function(rows)
    divided = PartitionSpec(axes)
    mapped: Mapped = jax.shard_map(
        function, in_specs=divided, out_specs=divided, axis_names=set(axes), check_vma=False
    )(rows)
    return mapped


def _mesh_axes() -> tuple[str, ...]:
    """Returns the axes over which XLA divides a program; none where there is one device."""
    mesh = get_abstract_mesh()
    return mesh.auto_axes if mesh.size > 1 else ()
