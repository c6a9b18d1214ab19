"""Whether Pallas kernels can be part of the program that is being traced."""

import jax

AMPERE = 8.0
"""Compute capability; Pallas's kernels for NVIDIA need it, V100 has 7."""


def kernels_can_run() -> bool:
    """Returns whether the arrays being traced are one device's, and it is not too old a GPU.

    They are one device's under pmap and shard_map (`rows.py` included). In a jit over several
    devices XLA would have to divide a kernel among them, which it refuses. A device that is only
    described, as when compiling for one that is not there, is taken to be new enough.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        whole = jax.device_count() == 1
    else:
        whole = mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)
    device = jax.devices()[0]
    return whole and float(getattr(device, "compute_capability", None) or AMPERE) >= AMPERE


def mesh_platform() -> str | None:
    """Returns the platform of the mesh in context; None without one, and under pmap."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else str(device.platform)
