"""The two lifts of a per-device step over devices: `jax.pmap`, and `jax.jit` over a mesh.

Nothing else in the project knows what a run is divided over; rows.py asks, while something is
traced, whether it is one device's.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from minilm_jax.errors import ConfigError
from minilm_jax.settings import check

Lift = Literal["pmap", "mesh"]


class Devices:
    """A set of devices and the way a per-device function runs on all of them.

    `pmap` is data parallel: parameters are replicated, each device gets its rows, and the function
    sums over the axis "data" itself. `mesh` is one jit over a data × fsdp mesh: the function sees
    the global batch, parameters are sharded over "fsdp", and XLA inserts the sums; what XLA would
    not divide is done for each device's own rows (`rows.sum_over_rows`).

    Both keep parameters without a leading device axis.
    """

    def __init__(
        self,
        lift: Lift = "pmap",
        *,
        fsdp: int = 1,
        count: int | None = None,
        devices: list[Any] | None = None,
    ) -> None:
        """Takes `count` of the devices of the run's processes unless given some; None is all."""
        check("lift", lift, Lift)
        if devices is None:
            # By process, so that a process's rows of the batch are neighbours.
            devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        if count is not None and count > len(devices):
            raise ConfigError(
                f"train.devices={count}: there are {len(devices)}; leave it out to take all"
            )
        if count is not None and count < len(devices) and jax.process_count() > 1:
            raise ConfigError(
                f"train.devices={count}: several processes use all of their {len(devices)} "
                "devices; leave it out"
            )
        self.devices = devices[:count]
        if lift == "pmap" and fsdp != 1:
            raise ConfigError(
                f"train.fsdp={fsdp} needs train.lift=mesh: pmap replicates the parameters"
            )
        if len(self.devices) % fsdp:
            raise ConfigError(f"train.fsdp={fsdp} does not divide {len(self.devices)} devices")
        if len(self.devices) == 1:
            lift = "mesh"  # One jit. A pmap would sum over its one device: copy every gradient.
        self.lift = lift
        names = ("data",) if lift == "pmap" else ("data", "fsdp")
        grid = np.array(self.devices).reshape((-1,) if lift == "pmap" else (-1, fsdp))
        # make_mesh's default axes are Explicit and break a table's look-up under jit.
        self.mesh = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
        self._whole = jax.jit(
            lambda tree: tree, out_shardings=NamedSharding(self.mesh, PartitionSpec())
        )

    @property
    def count(self) -> int:
        """Number of devices."""
        return len(self.devices)

    def check_batch(self, batch_size: int, *, accumulate: int = 1) -> None:
        """Raises ConfigError unless the global batch divides over devices and micro-batches."""
        if batch_size % (self.count * accumulate):
            raise ConfigError(
                f"batch.batch_size={batch_size} does not divide over {self.count} devices × "
                f"{accumulate} micro-batches; the next that does is "
                f"{-(-batch_size // (self.count * accumulate)) * self.count * accumulate}"
            )

    def rows(self, batch_size: int) -> slice:
        """Returns the rows of the global batch that this process reads and places."""
        if not self._several_processes:
            return slice(0, batch_size)
        each = batch_size // self.count
        mine = [i for i, device in enumerate(self.devices) if self._is_mine(device)]
        return slice(mine[0] * each, (mine[-1] + 1) * each)

    @property
    def _several_processes(self) -> bool:
        # Devices that are only described are of no process, and nothing is placed on them.
        return jax.process_count() > 1 and any(map(self._is_mine, self.devices))

    @staticmethod
    def _is_mine(device: Any) -> bool:
        return device in jax.local_devices()

    def place(self, tree: Any) -> Any:
        """Returns the tree on the devices, replicated (pmap) or sharded (mesh)."""
        return jax.tree.map(jax.device_put, tree, self.shardings(tree))

    def shardings(self, tree: Any) -> Any:
        """Returns where each leaf lives; for placing it and for restoring a checkpoint to it."""
        return jax.tree.map(lambda x: NamedSharding(self.mesh, self._spec(np.shape(x))), tree)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Shards a matrix's largest axis that fsdp divides; everything else is replicated."""
        fsdp = self.mesh.shape.get("fsdp", 1)
        divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
        if fsdp == 1 or len(shape) < 2 or not divisible:
            return PartitionSpec()
        largest = max(divisible, key=lambda axis: shape[axis])
        return PartitionSpec(*["fsdp" if axis == largest else None for axis in range(len(shape))])

    def place_batch(self, batch: Mapping[str, np.ndarray | jax.Array]) -> dict[str, Any]:
        """Returns the rows on their devices: `[devices, b, …]` for pmap, `[B, …]` for a mesh.

        Where there are several processes each gives its own `rows`.
        """
        sharding = self._batch_sharding()
        if not self._several_processes:
            return {
                name: jax.device_put(x.reshape(self._batch_shape(x.shape)), sharding)
                for name, x in batch.items()
            }
        mine = sum(map(self._is_mine, self.devices))
        return {
            name: jax.make_array_from_process_local_data(
                sharding,
                np.asarray(x).reshape(self._batch_shape(x.shape, over=mine)),
                self._batch_shape((x.shape[0] * self.count // mine, *x.shape[1:])),
            )
            for name, x in batch.items()
        }

    def fetch(self, tree: Any) -> Any:
        """Returns the tree as numpy in every process, whole where it was divided."""
        if self._several_processes:
            tree = self._whole(tree)
        return jax.device_get(tree)

    def fetch_batch(self, batch: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Returns the rows of a placed batch as numpy `[B, …]`, all of them in every process."""
        fetched = self.fetch(dict(batch))
        if self.lift == "mesh":
            return fetched
        return {name: x.reshape(-1, *x.shape[2:]) for name, x in fetched.items()}

    def abstract(self, tree: Any) -> Any:
        """Returns the shapes that `place` would put on the devices, and where; for compiling."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where),
            tree,
            self.shardings(tree),
        )

    def abstract_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the shapes that `place_batch` would put on the devices, and where."""
        return {
            name: jax.ShapeDtypeStruct(
                self._batch_shape(x.shape), x.dtype, sharding=self._batch_sharding()
            )
            for name, x in batch.items()
        }

    def _batch_shape(self, shape: tuple[int, ...], *, over: int | None = None) -> tuple[int, ...]:
        if self.lift == "mesh":
            return shape
        count = over or self.count
        return (count, shape[0] // count, *shape[1:])

    def _batch_sharding(self) -> NamedSharding:
        names = "data" if self.lift == "pmap" else ("data", "fsdp")
        return NamedSharding(self.mesh, PartitionSpec(names))

    def lift_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns step(state, given, batch) on all devices; it consumes (donates) the state."""
        return self._lift(step, donate=True)

    def lift_evaluation(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """Returns evaluate(params, frozen, batch) on all devices."""
        return self._lift(evaluate, donate=False)

    def _lift(self, function: Callable[..., Any], *, donate: bool) -> Callable[..., Any]:
        donated = (0,) if donate else ()
        if self.lift == "pmap" and self._several_processes:
            # What pmap itself is made of. It returns arrays of one process's devices only, which
            # could be neither saved as one checkpoint nor fed back.
            every, divided = PartitionSpec(), PartitionSpec("data")

            def of_device(first: Any, frozen: Any, batch: Any) -> Any:
                return function(first, frozen, jax.tree.map(lambda x: x[0], batch), axis="data")

            mapped = jax.shard_map(
                of_device,
                mesh=self.mesh,
                in_specs=(every, every, divided),
                out_specs=every,
                # The step sums over devices itself; checked, its gradients would be summed twice.
                check_vma=False,
            )
            return jax.jit(mapped, donate_argnums=donated)
        if self.lift == "pmap":
            # in_axes/out_axes None: replicated arrays go in and come out without a device axis.
            return jax.pmap(
                lambda first, frozen, batch: function(first, frozen, batch, axis="data"),
                axis_name="data",
                in_axes=(None, None, 0),
                out_axes=None,
                donate_argnums=donated,
                devices=self.devices,
            )

        def constrained(first: Any, frozen: Any, batch: Any) -> Any:
            # rows.py asks for it.
            with use_abstract_mesh(self.mesh.abstract_mesh):
                out = function(first, frozen, batch)
            # Keep what is carried to the next step where it was, or it would move every step.
            return jax.lax.with_sharding_constraint(out, self.shardings(out))

        return jax.jit(constrained, donate_argnums=donated)
