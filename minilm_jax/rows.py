"""Whether the rows of a batch are one device's or many devices', and what JAX has to be told of it.

train/devices.py puts the mesh in context. Where there is none, on one device, under pmap and under
shard_map, the rows are one device's already and what divides them does nothing of its own.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Float

Params = TypeVar("Params")
Rows = TypeVar("Rows")
Sums = TypeVar("Sums")
Mapped = TypeVar("Mapped")
Arrays = TypeVar("Arrays")


def of_one_device() -> bool:
    """Returns whether the arrays being traced are those of one device; so they are under pmap."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def mesh_platform() -> str | None:
    """Returns the platform of the mesh in context, None where there is none."""
    device = get_abstract_mesh().abstract_device
    return None if device is None else str(device.platform)


def traced_platform() -> str:
    """Returns the platform of the arrays being traced: cpu, gpu or tpu."""
    return mesh_platform() or jax.default_backend()


def fixed_shape(x: Array) -> bool:
    """Returns whether the shape is of numbers; that of an exported program may have symbols."""
    return all(isinstance(size, int) for size in x.shape)


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


def zeros_like_any(shape: tuple[int, ...], *, like: object) -> Array:
    """Returns fp32 zeros that vary over every mapped axis that any of `like` varies over.

    `jax.shard_map` wants what a loop carries to vary as what the loop makes of it, and to know it
    of what a kernel writes. Its own name for this differs between versions of JAX; a selection that
    never takes the array does not.
    """
    if not get_abstract_mesh().manual_axes:  # on a mesh the element would be sent round
        return jnp.zeros(shape, jnp.float32)
    never = [
        jnp.where(False, first_element(x).astype(jnp.float32), 0.0) for x in jax.tree.leaves(like)
    ]
    return jnp.broadcast_to(sum(never, start=jnp.float32(0)), shape)


def vary_like(arrays: Arrays, *, like: object) -> Arrays:
    """Returns a tree of arrays that vary over every mapped axis that any of `like` varies over.

    What a gradient of our own returns has to vary as its argument does. A parameter varies less
    than the rows it meets; this is where JAX then sums its gradient over the axis.
    """
    zero = zeros_like_any((), like=like)
    varying: Arrays = jax.tree.map(lambda x: x + zero.astype(x.dtype), arrays)
    return varying


def first_element(x: Array) -> Array:
    """Returns the array's first element, 0 where it has none."""
    ends = [min(size, 1) if isinstance(size, int) else 1 for size in x.shape]
    return jax.lax.slice(x, [0] * x.ndim, ends).sum()


def _mesh_axes() -> tuple[str, ...]:
    """Returns the axes over which XLA divides a program; none where there is one device."""
    mesh = get_abstract_mesh()
    return mesh.auto_axes if mesh.size > 1 else ()
