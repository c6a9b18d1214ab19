"""What the engine adds to a step, and how long a save holds training up.

    python benchmarks/engine_overhead.py [--steps 300] [--saves 15]

The step is a stand-in that sleeps for 100 ms and returns metrics. Everything around it is real:
the loop, batches through `Prefetch` onto the device, stopwatch, metrics.jsonl, console line. The
cost of the engine is the time from the end of a step to the start of the next. The stand-in blocks
the host, which a real step leaves free while the devices work, so the figure is an upper bound.

A save writes a state of 33 million parameters with Adam. Training waits for the call; a synchronous
save is the call and the wait until the state is on disk. Orbax alone leaves out our checksums. Both
shares are of Orbax's synchronous save: what ours adds in the background must not make its share
look small. The two take turns. Writes benchmarks/results/engine_overhead.md.
"""

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _report import machine, spread, write_section

from minilm_jax.data.prefetch import Prefetch
from minilm_jax.train.checkpoint import Checkpoints
from minilm_jax.train.config import TrainConfig
from minilm_jax.train.devices import Devices
from minilm_jax.train.goodput import GOODPUT, Goodput
from minilm_jax.train.loop import fit
from minilm_jax.train.monitor import Monitor
from minilm_jax.train.state import TrainState, create_state
from minilm_jax.train.step import Given, make_given

STEP_S = 0.1
PARAMETERS = 33_000_000
TITLE = """# The engine around the step

`python benchmarks/engine_overhead.py` wrote this; its docstring says what is measured. The goals
are at most 2% of a step of 100 ms, and a wait of less than 5% of a synchronous save.
"""


class SleepingStep:
    """Takes 100 ms of the host, and notes when it began and ended."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.ended: list[float] = []
        self._metrics = {
            "loss": jnp.float32(0.2),
            **{name: jnp.float32(0.1) for name in ("qk", "vv")},
            **{f"{name}_heads": jnp.full(12, 0.1) for name in ("qk", "vv")},
            "grad_norm": jnp.float32(0.4),
            "finite": jnp.bool_(True),
            "counts": {"tokens": jnp.float32(32768), "documents": jnp.float32(256)},
        }

    def __call__(self, state: TrainState, given: Given, batch: Any) -> tuple[TrainState, Any]:
        """Returns the state a step further, and metrics."""
        self.began.append(time.perf_counter())
        time.sleep(STEP_S)
        state = state._replace(step=jax.block_until_ready(state.step + 1))
        self.ended.append(time.perf_counter())
        return state, self._metrics

    def between(self) -> np.ndarray:
        """Returns the seconds from the end of each step to the start of the next."""
        return np.array(self.began[1:]) - np.array(self.ended[:-1])


def loop_cost(*, steps: int, log_every: int) -> np.ndarray:
    """Returns the seconds between steps of a run that logs but does not save before its end."""
    devices, step = Devices(), SleepingStep()
    rows = np.ones((256, 128), np.int32)
    batch = {"input_ids": rows, "segments": rows, "rows": np.arange(256, dtype=np.int32)}
    config = TrainConfig(steps=steps, log_every=log_every, save_every=steps)
    state = create_state({"kernel": jnp.ones((8, 8))}, optax.adam(1e-3))

    @contextlib.contextmanager
    def batches(first: int) -> Iterator[Any]:
        with Prefetch(lambda _: devices.place_batch(batch), start=first, stop=steps) as stream:
            yield stream

    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder) / "checkpoints") as checkpoints,
    ):
        fit(
            step,
            lambda: state,
            make_given(None, seed=0),
            batches,
            config=config,
            devices=devices,
            checkpoints=checkpoints,
            make_monitor=lambda first: Monitor(
                Path(folder) / "metrics.jsonl",
                steps=steps,
                first_step=first,
                devices=devices.devices,
            ),
            goodput=Goodput(Path(folder) / GOODPUT),
            flops=lambda batch: 10**12,
        )
    return step.between()


def large_state() -> TrainState:
    """Returns random parameters and moments: zeros would be compressed to nothing."""
    layers = 60
    width = round((PARAMETERS / layers) ** 0.5)
    keys = jax.random.split(jax.random.key(0), layers)
    params = {f"layer_{i}": jax.random.normal(key, (width, width)) for i, key in enumerate(keys)}
    state = create_state(params, optax.adam(1e-3))
    moments = jax.tree.map(lambda x: x + 1e-3 * params["layer_0"] if x.ndim else x, state.opt_state)
    return jax.block_until_ready(state._replace(opt_state=moments))


def timed_save(save: Callable[[], Any], wait: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds a caller of `save` waits, and those until it is on disk."""
    began = time.perf_counter()
    save()
    stall = time.perf_counter() - began
    wait()
    return stall, time.perf_counter() - began


def save_table(*, saves: int) -> list[str]:
    """Returns what a save costs with our checksums, and Orbax alone, as Markdown."""
    state = large_state()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(Path(folder) / "ours") as ours,
        ocp.CheckpointManager(Path(folder) / "orbax", options=options) as orbax,
    ):
        ways: dict[str, tuple[Callable[[int], Any], Callable[[], Any]]] = {
            "with the checksums of each file": (lambda step: ours.save(step, state), ours.wait),
            "Orbax alone": (
                lambda step: orbax.save(step, args=ocp.args.StandardSave(state)),
                orbax.wait_until_finished,
            ),
        }
        costs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for step in range(1, saves + 2):
            for name, (save, wait) in ways.items():
                costs[name].append(timed_save(functools.partial(save, step), wait))
    # The first ones compile and make the folders.
    stalls, whole = ({name: np.array(costs[name][1:])[:, part] for name in ways} for part in (0, 1))
    synchronous = np.median(whole["Orbax alone"])
    lines = [
        f"| a save of {PARAMETERS / 1e6:.0f} M parameters and Adam, fp32 | training waits, ms "
        "| until it is on disk, ms | training waits, of a synchronous save of Orbax alone |",
        "|---|---|---|---|",
    ]
    for name in ways:
        share = np.median(stalls[name]) / synchronous
        lines.append(f"| {name} | {spread(stalls[name])} | {spread(whole[name])} | {share:.1%} |")
    return lines


def main() -> None:
    """Measures both and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--saves", type=int, default=15)
    options = parser.parse_args()
    lines = [f"{machine('orbax-checkpoint')}.", ""]
    lines += [
        f"| metrics every | mean, ms | median | largest | of a step of {STEP_S * 1e3:.0f} ms |",
        "|---|---|---|---|---|",
    ]
    for log_every in (100, 10):
        between = loop_cost(steps=options.steps, log_every=log_every)
        lines.append(
            f"| {log_every} steps | {between.mean() * 1e3:.2f} | {np.median(between) * 1e3:.2f} "
            f"| {between.max() * 1e3:.1f} | {between.mean() / STEP_S:.2%} |"
        )
    lines += ["", *save_table(saves=options.saves)]
    write_section("engine_overhead", jax.devices()[0].platform, lines, title=TITLE)


if __name__ == "__main__":
    main()
