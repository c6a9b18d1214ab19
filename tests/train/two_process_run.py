"""One of the two processes of a run of test_hosts_faults; it ends as the command line would."""

import contextlib
import io
import sys
import time
from pathlib import Path

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

import numpy as np  # noqa: E402
import optax  # noqa: E402
from ragged_problem import make_problem, ragged_loss  # noqa: E402

from minilm_jax.signals import Stopped  # noqa: E402
from minilm_jax.train.checkpoint import Checkpoints  # noqa: E402
from minilm_jax.train.config import TrainConfig  # noqa: E402
from minilm_jax.train.devices import Devices  # noqa: E402
from minilm_jax.train.hosts import HostsConfig, join, writes  # noqa: E402
from minilm_jax.train.loop import fit  # noqa: E402
from minilm_jax.train.monitor import Monitor  # noqa: E402
from minilm_jax.train.state import create_state  # noqa: E402
from minilm_jax.train.step import make_given, make_step  # noqa: E402

process, port, folder, heartbeat_s = sys.argv[1:]
folder = Path(folder)
hosts = HostsConfig(
    start="explicit",
    coordinator=f"127.0.0.1:{port}",
    processes=2,
    process=int(process),
    heartbeat_s=int(heartbeat_s),
)
config = TrainConfig(steps=40, log_every=2, save_every=6, hosts=hosts)
join(hosts)
params, frozen, batches = make_problem(steps=config.steps)
devices, optimizer = Devices("pmap"), optax.adamw(0.01)
rows = devices.rows(len(batches[0]["rows"]))


@contextlib.contextmanager
def stream(first):
    def generate():
        for batch in batches[first:]:
            time.sleep(0.05)
            yield devices.place_batch({name: x[rows] for name, x in batch.items()})

    yield generate()


def monitor(first):
    print(f"resumed at {first}", flush=True)
    return Monitor(
        folder / "metrics.jsonl", steps=config.steps, first_step=first, stream=io.StringIO()
    )


try:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = fit(
            devices.lift_step(make_step(ragged_loss, optimizer)),
            lambda: create_state(params, optimizer),
            devices.place(make_given(frozen, seed=3)),
            stream,
            config=config,
            devices=devices,
            checkpoints=checkpoints,
            make_monitor=monitor,
        )
except Stopped as stopped:
    print(stopped)
    sys.exit(75)
leaves = devices.fetch(jax.tree.leaves(state))
if writes():
    np.savez(folder / "state.npz", *leaves)
