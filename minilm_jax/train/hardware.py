"""What is known of an accelerator: its peak, its memory, its name in JAX."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from minilm_jax.errors import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The published figures of one device, as JAX counts devices."""

    flops: float
    """Peak of bfloat16 matrix products, a second."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Of the memory, bytes a second."""
    interconnect: float
    """Bytes a second to the other chips, all links together, as its maker counts them."""


CHIPS = {
    "v4": Chip(flops=275e12, memory=32 * GIB, bandwidth=1.228e12, interconnect=300e9),
    "v5e": Chip(flops=197e12, memory=16 * GIB, bandwidth=0.819e12, interconnect=200e9),
    "v5p": Chip(flops=459e12, memory=95 * GIB, bandwidth=2.765e12, interconnect=600e9),
    "v6e": Chip(flops=918e12, memory=32 * GIB, bandwidth=1.640e12, interconnect=448e9),
}
"""Google's published figures a chip; v4 and v5p join their two cores to one device."""
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
"""JAX's name of a device -> ours."""
NVIDIA = {
    "V100-SXM2-16GB": Chip(flops=125e12, memory=16 * GIB, bandwidth=0.9e12, interconnect=300e9),
    "V100-SXM2-32GB": Chip(flops=125e12, memory=32 * GIB, bandwidth=0.9e12, interconnect=300e9),
    "A100-SXM4-40GB": Chip(flops=312e12, memory=40 * GIB, bandwidth=1.555e12, interconnect=600e9),
    "A100-PCIE-40GB": Chip(flops=312e12, memory=40 * GIB, bandwidth=1.555e12, interconnect=64e9),
    "A100-SXM4-80GB": Chip(flops=312e12, memory=80 * GIB, bandwidth=2.039e12, interconnect=600e9),
    "A100 80GB PCIe": Chip(flops=312e12, memory=80 * GIB, bandwidth=1.935e12, interconnect=64e9),
    "H100 PCIe": Chip(flops=756e12, memory=80 * GIB, bandwidth=2e12, interconnect=128e9),
    "H100 80GB HBM3": Chip(flops=989e12, memory=80 * GIB, bandwidth=3.35e12, interconnect=900e9),
    "H200": Chip(flops=989e12, memory=141 * GIB, bandwidth=4.8e12, interconnect=900e9),
    "B200": Chip(flops=2250e12, memory=180 * GIB, bandwidth=8e12, interconnect=1800e9),
    "L4": Chip(flops=121e12, memory=24 * GIB, bandwidth=0.3e12, interconnect=64e9),
}
"""NVIDIA's data sheets, without sparsity, by what follows the maker in JAX's name of a device. V100
has no bfloat16: its peak is that of float16."""


@contextlib.contextmanager
def memory_explained(advice: str) -> Iterator[None]:
    """Turns the devices' running out of memory into a UserError that says what saves some."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        line = str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" not in line:
            raise
        raise UserError(f"the devices ran out of memory ({line[:200]}): {advice}") from error


def known_chip(device: Any) -> Chip | None:
    """Returns the figures of a device, None where they are not known."""
    kind = device.device_kind
    if kind in KINDS:
        return CHIPS[KINDS[kind]]
    return NVIDIA.get(kind.removeprefix("NVIDIA ").removeprefix("Tesla "))


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Returns the bfloat16 peak of all devices together, a second; None where one is not known."""
    chips = [known_chip(device) for device in devices]
    return sum(chip.flops for chip in chips if chip) if all(chips) else None


def peak_memory(devices: Sequence[Any]) -> int | None:
    """Returns the most bytes that one of this process's devices has held, None if none says."""
    peaks = []
    for device in devices:
        if device.process_index == jax.process_index():
            statistics = device.memory_stats() or {}
            peaks.append(statistics.get("peak_bytes_in_use", 0))
    return max(peaks, default=0) or None


def memory_limit(device: Any) -> int | None:
    """Returns the bytes a device can hold, None where it does not say."""
    with contextlib.suppress(Exception):  # a device that is only described has no statistics
        return int(device.memory_stats()["bytes_limit"])
    chip = known_chip(device)
    if chip is not None:
        return chip.memory
    if device.platform == "cpu":
        emulated = max(len(jax.local_devices()), 1)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // emulated
    return None
