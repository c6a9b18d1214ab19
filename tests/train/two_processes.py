"""One of the processes of test_hosts: trains as test_step does, on its own rows only."""

import sys

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import numpy as np  # noqa: E402
import optax  # noqa: E402
from ragged_problem import make_problem, ragged_loss  # noqa: E402

from minilm_jax.train.devices import Devices  # noqa: E402
from minilm_jax.train.hosts import HostsConfig, join, writes  # noqa: E402
from minilm_jax.train.state import create_state  # noqa: E402
from minilm_jax.train.step import make_given, make_step  # noqa: E402

process, port, lift, fsdp, target = sys.argv[1:]
join(
    HostsConfig(
        start="explicit", coordinator=f"127.0.0.1:{port}", processes=2, process=int(process)
    )
)
params, frozen, batches = make_problem(steps=20)
devices = Devices(lift, fsdp=int(fsdp))
optimizer = optax.sgd(0.01)
step = devices.lift_step(make_step(ragged_loss, optimizer))
state = devices.place(create_state(params, optimizer))
given = devices.place(make_given(frozen, seed=3))
for batch in batches:
    rows = devices.rows(len(batch["rows"]))
    state, metrics = step(
        state, given, devices.place_batch({name: x[rows] for name, x in batch.items()})
    )
fetched = devices.fetch((state.params["kernel"], metrics["loss"]))
if writes():
    np.savez(target, kernel=fetched[0], loss=fetched[1])
