"""A GPU that is not there: programs can be lowered for it, kernels included."""

from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

KIND = "NVIDIA H100 80GB HBM3"
KERNEL_CALL = "xla.gpu.triton"
"""Of a kernel in a program, by any name."""


def gpus_in_context(count: int = 1) -> AbstractContextManager[Any]:
    """Puts a mesh of described GPUs in context, as train/devices.py does with real ones."""
    device = AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")
    mesh = AbstractMesh((count,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    return use_abstract_mesh(mesh)


def lowered_for_cuda(function: Any, *arguments: Any, count: int = 1) -> str:
    """Returns the program as JAX hands it to the compiler for that many GPUs."""
    with gpus_in_context(count):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
