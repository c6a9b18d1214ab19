"""Tabulates the memory of every published recipe on TPU slices, compiled ahead of time.

    python benchmarks/tpu_memory.py benchmarks/results/tpu_memory.json [--hardware tpu-v5e-256 …]
    python benchmarks/tpu_memory.py benchmarks/results/tpu_memory.json --table

No TPU is needed, only libtpu. A compilation takes one to two minutes on two cores. `--effort -1`,
XLA's lowest, takes half of that; its program needs more memory, so what fits with it fits in any
case. What the file holds already is not compiled again, so the run can be stopped at any time. Runs
with the same compiled step (they differ in learning rate, steps or text) are compiled once.
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

from minilm_jax.cli import load_experiment
from minilm_jax.jobs.distill_config import ChainConfig, DistillConfig
from minilm_jax.jobs.plan import make_plan
from minilm_jax.jobs.teacher import describe_teacher
from minilm_jax.train.described import tpu_devices
from minilm_jax.train.devices import Devices, Lift
from minilm_jax.train.hardware import GIB
from minilm_jax.train.run_folder import write_json

ROOT = Path(__file__).parents[1] / "experiments"
ROOMS = ("minilm_v2", "minilm_v1", "baselines", "ablations")
HARDWARE = ("tpu-v5e-256", "tpu-v4-256")
FSDP = 8
"""Devices a parameter is divided over in the mesh column."""


def main() -> None:
    """Compiles what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--hardware", nargs="+", default=HARDWARE)
    parser.add_argument("--lifts", nargs="+", default=("pmap", "mesh"))
    parser.add_argument("--only", default="", help="part of an experiment's name")
    parser.add_argument("--effort", type=float, default=0.0, help="XLA's, -1 to 0")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    found = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.table:
        print(table(found))
        return
    jax.config.update("jax_platforms", "cpu")
    if options.effort:  # a setting that jax 0.12 has no more
        jax.config.update("jax_exec_time_optimization_effort", options.effort)
    for lift in options.lifts:
        for hardware in options.hardware:
            for name, config in runs():
                key = program(config, hardware, lift)
                held = found.get(key)
                if options.only in name and (held is None or held["effort"] < options.effort):
                    found[key] = measure(config, hardware, lift) | {"effort": options.effort}
                    print(f"{name} {hardware} {lift}: {found[key]}", flush=True)
                    write_json(options.results, found)


def runs() -> list[tuple[str, DistillConfig]]:
    """Returns (name, run) of every recipe; a chain has two."""
    listed = []
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            config = load_experiment(str(path))
            if isinstance(config, ChainConfig):
                for stage, run in zip(("assistant", "student"), config.stages(), strict=True):
                    listed.append((f"{room}/{path.stem}, {stage}", run))
            else:
                listed.append((f"{room}/{path.stem}", config))
    return listed


def program(config: DistillConfig, hardware: str, lift: str) -> str:
    """Returns what the compiled step depends on."""
    parts: list[Any] = [hardware, lift, config.teacher.shape, config.student, config.objective]
    parts += [config.batch.batch_size, config.batch.sequence_length, config.compute]
    parts += [config.optimizer.name, config.train.accumulate]
    return " | ".join(map(str, parts))


def measure(config: DistillConfig, hardware: str, lift: Lift) -> dict[str, Any]:
    """Returns the figures of one compilation."""
    began = time.monotonic()
    fsdp = FSDP if lift == "mesh" else 1
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, lift=lift, fsdp=fsdp)
    )
    devices = Devices(lift, fsdp=fsdp, devices=tpu_devices(hardware))
    plan = make_plan(config, describe_teacher(config), devices, hardware=hardware, efficiency=0.4)
    memory = plan.memory
    jax.clear_caches()  # compiled steps of 256 devices add up to gigabytes
    return {
        "memory": None if memory is None else dataclasses.asdict(memory),
        "total": None if memory is None else memory.total,
        "fits": plan.fits,
        "refusal": plan.refusal,
        "seconds": round(time.monotonic() - began, 1),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """Returns the commit of this code, short."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip()


def table(found: dict[str, Any]) -> str:
    """Returns the table as Markdown, in GiB; what was not compiled is marked as not measured.

    † marks what was compiled with other code than the newest entry.
    """
    columns = [(hardware, lift) for hardware in HARDWARE for lift in ("pmap", "mesh")]
    heads = [f"{hardware}, {lift}" for hardware, lift in columns]
    newest = max(found.values(), key=lambda row: row["date"])
    lines = ["| run | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    missing = []
    for name, config in runs():
        cells = []
        for hardware, lift in columns:
            row = found.get(program(config, hardware, lift))
            if row is None:
                cells.append("not measured")
            elif row["total"] is None:
                cells.append("does not fit")
            else:
                temporary = row["memory"]["temporary"] / GIB
                bound = "≤ " if row["effort"] < 0 else ""
                older = "†" if row["commit"] != newest["commit"] else ""
                cells.append(f"{bound}{row['total'] / GIB:.2f} ({temporary:.2f}){older}")
        if any(cell != "not measured" for cell in cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        else:
            missing.append(name)
    if missing:
        lines += ["", f"Not measured at all: {'; '.join(missing)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
