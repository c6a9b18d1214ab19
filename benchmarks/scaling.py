"""The same global batch on more emulated devices and on two processes: what dividing it costs.

    python benchmarks/scaling.py

Emulated devices share the machine's cores, so this measures overhead, not speed-up; the ideal is
the time of one device. It runs the full distillation step, 6 × 384 to 6 × 384, 16 rows × 128 × 12
relation heads over all devices, lifted by pmap and over a mesh. Processes talk over loopback.
Writes benchmarks/results/scaling_cpu.md.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _jax_work
import numpy as np
from _report import machine, spread, write_section
from _setting import Setting
from cost_model import STUDENT_6X384

from minilm_jax.train.devices import Devices, Lift
from minilm_jax.train.hosts import HostsConfig, join

LAYOUTS = [(lift, 1, devices) for lift in ("pmap", "mesh") for devices in (1, 2, 4, 8)] + [
    ("pmap", 2, 2),
    ("mesh", 2, 2),
]
"""(lift, processes, devices of all of them)."""

TITLE = """# The same batch on more devices

`python benchmarks/scaling.py` wrote this: the full distillation step, 6 × 384 to 6 × 384, 16 × 128
× 12 relation heads over all devices, fp32. The devices are emulated and share the machine's cores:
this is what dividing a batch costs, not what more hardware gives. Times are medians
(minimum–maximum) of steps, one layout after another.
"""


def main() -> None:
    """Measures every layout and writes the table, or runs one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        print(json.dumps(step_seconds(**json.loads(options.process))))
        return
    lines = [
        f"{machine()}.",
        "",
        "| lift | processes | devices | ms a step | of one device |",
        "|---|---|---|---|---|",
    ]
    one: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        _jax_work.write_encoder(Path(folder) / "model", STUDENT_6X384, seed=0)
        for lift, processes, devices in LAYOUTS:
            seconds = measure(folder, lift, processes, devices, steps=options.steps)
            median = float(np.median(seconds))
            ratio = median / one.setdefault(lift, median)
            lines.append(f"| {lift} | {processes} | {devices} | {spread(seconds)} | {ratio:.2f} |")
    write_section("scaling_cpu", "16x128x12", lines, title=TITLE)


def measure(folder: str, lift: str, processes: int, devices: int, *, steps: int) -> np.ndarray:
    """Returns the seconds of each step, as the first process saw them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={devices // processes}"
    started = []
    for number in range(processes):
        task = {
            "folder": folder,
            "lift": lift,
            "steps": steps,
            "hosts": {
                "start": "explicit" if processes > 1 else "one",
                "coordinator": f"127.0.0.1:{port}",
                "processes": processes,
                "process": number,
            },
        }
        started.append(
            subprocess.Popen(
                [sys.executable, __file__, "--process", json.dumps(task)],
                env={**os.environ, "XLA_FLAGS": flag},
                stdout=subprocess.PIPE,
            )
        )
    printed = [process.communicate()[0].decode() for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{lift} on {processes} processes, {devices} devices failed")
    return np.asarray(json.loads(printed[0].splitlines()[-1]))


def step_seconds(folder: str, lift: Lift, steps: int, hosts: dict) -> list[float]:
    """Returns the seconds of each step of this process, which is one of `hosts`."""
    join(HostsConfig(**hosts))
    model = Path(folder) / "model"
    setting = Setting(teacher=model, student=model, teacher_layer=6, batch=16, length=128, heads=12)
    work = _jax_work.distillation_step(setting, devices=Devices(lift))
    work.run()
    work.run()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
