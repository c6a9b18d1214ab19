"""What a loss depends on, found where JAX knows it: in its traced form."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from minilm_jax.train.optimizer import ParamPath
from minilm_jax.train.step import LossFunction


class Unreached(NamedTuple):
    """What nothing depends on, whatever its values are."""

    params: frozenset[ParamPath]
    """Of what is trained: the loss does not depend on it. Of a student that is compared at one
    layer, these are all that lie behind it."""
    frozen: frozenset[ParamPath]
    """Of what is not: nothing that the loss function returns depends on it."""


def unreached(loss: LossFunction, params: Any, frozen: Any, batch: Any) -> Unreached:
    """Returns the parameters that a step has no use for.

    Args:
      loss: traced, not run.
      params: what is trained, in dicts; here and below arrays, or their shapes.
      frozen: what is not, in dicts.
      batch: of any size.
    """

    def outputs(params: Any, frozen: Any, batch: Any) -> Any:
        in_training = loss(params, frozen, batch, jax.random.key(0))
        return in_training.value(), in_training, loss(params, frozen, batch, None)

    # A kernel hides what becomes of its operands, and a product of three kernels side by side which
    # of them matter. For no platform that has any, the answer is the same on all machines.
    device = AbstractDevice(device_kind="any", platform="any", num_cores=None)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(outputs)(params, frozen, batch).jaxpr
    value, *others = (True for _ in jaxpr.outvars)
    _, used_by_loss = dce_jaxpr(jaxpr, [value, *(False for _ in others)])
    _, used = dce_jaxpr(jaxpr, [value, *others])
    trained, kept = _paths(params), _paths(frozen)
    return Unreached(
        params=_unused(trained, used_by_loss),
        frozen=_unused(kept, used[len(trained) :]),
    )


def leave_out(
    loss: LossFunction, frozen: Any, paths: Collection[ParamPath]
) -> tuple[LossFunction, Any]:
    """Returns (the same loss, given less; what it has to be given as `frozen`).

    Args:
      loss: of `frozen` as it is.
      frozen: in dicts.
      paths: `Unreached.frozen`. Devices need not hold it: the loss has zeros in its place, which
        the compiler drops.
    """
    leaves = flatten_dict(frozen)
    absent = {path: jax.ShapeDtypeStruct(leaves[path].shape, leaves[path].dtype) for path in paths}

    def completed(params: Any, frozen: Any, batch: Any, key: Any) -> Any:
        zeros = {path: jnp.zeros(x.shape, x.dtype) for path, x in absent.items()}
        return loss(params, unflatten_dict({**flatten_dict(frozen), **zeros}), batch, key)

    return completed, unflatten_dict({path: x for path, x in leaves.items() if path not in absent})


def _paths(tree: Any) -> list[ParamPath]:
    return [tuple(entry.key for entry in path) for path, _ in jax.tree.leaves_with_path(tree)]


def _unused(paths: Iterable[ParamPath], used: Iterable[bool]) -> frozenset[ParamPath]:
    """Returns those of the paths, which stand first, that are not used."""
    return frozenset(path for path, needed in zip(paths, used, strict=False) if not needed)
