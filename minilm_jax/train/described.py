"""Devices that are not there: a program is compiled for them, and says what memory it takes.

The compilers come with JAX's extras: libtpu holds that of TPUs, the CUDA plugin that of GPUs.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

from minilm_jax.errors import ConfigError, first_line
from minilm_jax.train.hardware import CHIPS, NVIDIA

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
}
"""Cloud TPU counts cores here, two a chip."""


def described_devices(name: str) -> list[Any]:
    """Returns the devices of a TPU slice or of GPU hosts: "tpu-v5e-256", "gpu-h100-8".

    Raises:
      ConfigError: the name is not known, or the compiler is not installed or refuses.
    """
    return gpu_devices(name) if name.startswith("gpu-") else tpu_devices(name)


def parse_slice(name: str) -> tuple[str, str]:
    """Returns (generation, topology) of a slice: "tpu-v5e-256" is ("v5e", "16x16").

    Numbers are those of Cloud TPU: chips of v5e and v6e, cores (two a chip) of v4 and v5p. A
    topology may be written out instead, as in "tpu-v4:4x4x8".
    """
    match = re.fullmatch(r"tpu-(v\w+?)(?:-(\d+)|:(\d+x\d+(?:x\d+)?))", name)
    if match is None or match[1] not in CHIPS:
        known = ", ".join(f"tpu-{generation}-256" for generation in CHIPS)
        raise ConfigError(
            f"hardware {name!r} is not known; give local, a slice such as {known} or "
            f"tpu-v4:4x4x8, or GPUs: {', '.join(f'gpu-{gpu}-8' for gpu in _GPUS)}"
        )
    generation, count, topology = match[1], match[2], match[3]
    if topology:
        return generation, topology
    sizes = _FLAT if generation in ("v5e", "v6e") else _CUBIC
    if int(count) not in sizes:
        raise ConfigError(
            f"hardware {name!r}: {generation} has slices of {', '.join(map(str, sizes))}; write "
            f"any other topology out, as in tpu-{generation}:{next(iter(sizes.values()))}"
        )
    return generation, sizes[int(count)]


def tpu_devices(name: str) -> list[Any]:
    """Returns the devices of a slice that is not there: programs can be compiled for them.

    Raises:
      ConfigError: libtpu, which holds the compiler, is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    generation, topology = parse_slice(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"compiling for {name} needs libtpu: pip install 'jax[tpu]'")
    # Without a chip libtpu would ask the cloud's metadata server for one, for minutes; and the
    # compiler, unlike a chip, may be used by several processes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # By default a v4's cores are two devices; a real one shows one.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{topology}", **options
        )
    except Exception as error:
        raise ConfigError(f"libtpu cannot compile for {name}: {first_line(error)}") from None
    return list(described.devices)


class _Gpu(NamedTuple):
    """What XLA's compiler wants to know of a GPU beside its memory."""

    kind: str
    """JAX's name of it, which follows the maker's."""
    capability: int
    """Compute capability, its first number."""
    processors: int
    clock: float
    """GHz."""
    cache: int
    """Second level, bytes."""
    shared: int
    """Memory of a multiprocessor, bytes."""


_GPUS = {
    "a100": _Gpu("A100-SXM4-80GB", 8, 108, 1.41, 40 << 20, 164 << 10),
    "h100": _Gpu("H100 80GB HBM3", 9, 132, 1.98, 50 << 20, 228 << 10),
    "h200": _Gpu("H200", 9, 132, 1.98, 50 << 20, 228 << 10),
    "b200": _Gpu("B200", 10, 148, 1.965, 126 << 20, 228 << 10),
}
"""From NVIDIA's data sheets and programming guide."""


def gpu_devices(name: str) -> list[Any]:
    """Returns GPUs that are not there, eight a host where there are more.

    Raises:
      ConfigError: JAX's CUDA plugin, which holds the compiler, is not installed, or refuses.
    """
    from jax.experimental import topologies

    match = re.fullmatch(r"gpu-(\w+)-(\d+)", name)
    count = int(match[2]) if match else 0
    hosts = max(1, -(-count // 8))
    if match is None or match[1] not in _GPUS or count not in (*range(1, 8), 8 * hosts):
        known = ", ".join(f"gpu-{gpu}-8" for gpu in _GPUS)
        raise ConfigError(
            f"hardware {name!r} is not known; give GPUs as in {known}: up to 8, or hosts of 8"
        )
    if not _has_cuda_plugin():
        raise ConfigError(
            f"compiling for {name} needs JAX's CUDA plugin: pip install 'jax[cuda13]'"
        )
    # The plugin looks for a driver before it is loaded; its compiler needs none.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            target_config=_target(_GPUS[match[1]]),
            topology=f"1x{hosts}x{count // hosts}",
        )
    except Exception as error:
        raise ConfigError(
            f"JAX's CUDA plugin cannot compile for {name}: {first_line(error)}"
        ) from None
    return list(described.devices)


def _has_cuda_plugin() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    plugins = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return any(importlib.util.find_spec(plugin) for plugin in plugins)


def _target(gpu: _Gpu) -> str:
    """Returns a GPU as XLA describes one (GpuTargetConfigProto, as text)."""
    chip = NVIDIA[gpu.kind]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 << 10}
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  threads_per_core_limit: 2048
  core_count: {gpu.processors}
  fpus_per_core: {64 if gpu.capability == 8 else 128}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {gpu.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {gpu.kind}"
"""
