"""TPUs that are not there: programs can be compiled for them, kernels included."""

import importlib.util
import os
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

KERNEL_CALL = "tpu_custom_call"
"""Of a kernel in a program, by any name."""


def described_tpus(topology: str) -> Mesh:
    """Returns a mesh of chips described by libtpu: compiling for them needs no device."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for a TPU needs its compiler: pip install 'jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # The compiler alone is used; another process may use it at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return Mesh(np.asarray(described.devices).ravel(), ("data",), axis_types=(AxisType.Auto,))


def compiled_for_tpus(step: Any, arguments: Any, mesh: Mesh) -> str:
    """Returns the program for a mesh, each device of which has rows like the arguments."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            (mesh.size * x.shape[0], *x.shape[1:]), x.dtype, sharding=sharding
        ),
        arguments,
    )
    return jax.jit(step).lower(*arguments).compile().as_text()
