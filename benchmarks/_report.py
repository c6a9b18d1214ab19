"""What every table of results says about the machine, and where the tables are kept."""

import datetime
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import _jax_work
import jax
import numpy as np
from _peers import Figures, Work, measure

# Where libtpu is installed without a chip it would ask the cloud's metadata server for one, for
# minutes. The peers' processes inherit it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

OURS = "minilm_jax"
RESULTS = Path(__file__).parent / "results"


def on_cpus_alone() -> None:
    """Keeps the peers' processes from loading libtpu, whose 250 MiB would count as ours."""
    os.environ["JAX_PLATFORMS"] = "cpu"


def machine(*packages: str) -> str:
    """Returns the device, its host, the versions (of `packages` too) and the date."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"{_processor()}, {os.cpu_count()} cores"
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    return (
        f"{name}; load average before the run {os.getloadavg()[0]:.1f}; "
        f"jax {jax.__version__}, {versions + ', ' if versions else ''}"
        f"Python {platform.python_version()}; {datetime.date.today()}"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    return models[0].split(":")[1].strip() if models else platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def spread(seconds: np.ndarray) -> str:
    """Returns "median (minimum–maximum, n runs)" in milliseconds."""
    low, middle, high = 1e3 * np.quantile(seconds, [0, 0.5, 1])
    return f"{middle:,.0f} ({low:,.0f}–{high:,.0f}, {len(seconds)} runs)"


def measured_table(
    peers: Mapping[str, Callable[[], Work]],
    *,
    flops: int,
    budget: float,
    product: tuple[int, str] = (2048, "float32"),
    peak: float | None = None,
    tolerance: float = 1e-4,
) -> list[str]:
    """Returns the figures of the peers and of the machine, measured in turn, as Markdown.

    Args:
      peers: makers of their work by name, this library's under OURS.
      flops: model FLOPs of one run.
      budget: seconds of timing.
      product: size and dtype of the matrices whose product measures the machine.
      peak: the machine's published FLOPs a second; None uses the measured ones.
      tolerance: see `measure`.
    """
    size, dtype = product
    about = machine("torch", "transformers")
    multiply = partial(_jax_work.matrix_product, size, dtype)
    figures = measure({**peers, "product": multiply}, budget=budget, tolerance=tolerance)
    rate = 2 * size**3 / float(np.median(figures.pop("product").seconds))
    return [
        f"{about}. The machine's matrix product: {rate / 1e9:,.0f} GFLOP/s.",
        "",
        *peers_table(figures, flops=flops, rate=peak or rate),
    ]


def peers_table(figures: dict[str, Figures], *, flops: int, rate: float) -> list[str]:
    """Returns a table of the peers' figures.

    Args:
      figures: by name, ours first.
      flops: model FLOPs of a step.
      rate: the machine's FLOPs a second.
    """
    ours = figures[OURS]
    lines = [
        "| | ms | ours is faster | first, s | memory, MiB | ours of it | GFLOP/s "
        "| of the machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, peer in figures.items():
        if peer.why_not:
            lines.append(f"| {name} | {peer.why_not} | – | – | – | – | – | – |")
            continue
        median = float(np.median(peer.seconds))
        faster = f"{median / np.median(ours.seconds):.2f}×" if peer is not ours else "–"
        part = f"{ours.peak / peer.peak:.0%}" if peer is not ours else "–"
        lines.append(
            f"| {name} | {spread(peer.seconds)} | {faster} | {peer.first:.1f} "
            f"| {peer.peak / 2**20:,.0f} | {part} | {flops / median / 1e9:,.0f} "
            f"| {flops / median / rate:.0%} |"
        )
    return lines


def write_section(name: str, section: str, lines: list[str], *, title: str) -> None:
    """Prints a section of a results file and replaces its previous version there.

    Args:
      name: of the file in benchmarks/results, without its ending.
      section: heading of the section.
      lines: its Markdown.
      title: heading and introduction of the file.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    found = re.split(r"^## ", path.read_text(), flags=re.M)[1:] if path.exists() else []
    sections = dict(part.split("\n", 1) for part in found)
    sections[section] = "\n" + "\n".join(lines) + "\n"
    parts = [f"## {heading}\n\n{text.strip()}" for heading, text in sections.items()]
    path.write_text("\n\n".join([title.strip(), *parts]) + "\n")
    print(f"## {section}\n\n" + "\n".join(lines) + f"\n\nwrote {path}", flush=True)
