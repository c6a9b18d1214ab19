"""Where kernels can run; what Pallas kernels share: what a program on a GPU sees of an array."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minilm_jax.rows import of_one_device, zeros_like_any

AMPERE = 8
"""Compute capability from which Pallas's kernels for NVIDIA run; V100 has 7."""
TILE = 64
"""Tokens that a program on a GPU meets at a time."""
MASKED = -1e30
"""A logit that is not allowed; finite, because -inf - (-inf) is not a number."""
LN_2 = math.log(2)


def kernels_can_run(platform: Literal["cpu", "gpu", "tpu"]) -> bool:
    """Returns whether the arrays being traced are those of one device, and of one that takes them.

    They are one device's under pmap and shard_map (`rows.py` included). In a jit over several
    devices XLA would have to divide a kernel among them, which it refuses. A GPU that is only
    described, as when compiling for one that is not there, is taken to be new enough.
    """
    whole, local = of_one_device(), jax.devices()[0]
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None and described.device_kind != local.device_kind:
        return whole and described.platform == platform
    # "7.5" of NVIDIA's; AMD's "gfx90a" has none.
    capability = re.match(r"\d+", str(getattr(local, "compute_capability", "")))
    new = platform != "gpu" or (capability is not None and int(capability[0]) >= AMPERE)
    return whole and local.platform == platform and new


def fits_gpu(*, length: int, head: int, dtype: DTypeLike) -> bool:
    """Returns whether a GPU's kernels suit rows of this length and heads of this width.

    Several tiles of a head have to fit the shared memory of a block, 99 KiB where it is smallest.
    """
    return length >= TILE and fill_up_head(head) * jnp.dtype(dtype).itemsize <= 256


def fill_up_head(head: int) -> int:
    """Returns the width that a GPU's kernels give a head: a power of two, 16 at least."""
    return max(16, 1 << (head - 1).bit_length())


def pad_tokens(x: Array, *, axis: int = 1, with_value: int = 0) -> Array:
    """Returns the array with its tokens padded to whole tiles."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % TILE)
    return jnp.pad(x, widths, constant_values=with_value)


def row_deltas(
    cotangent: Float[Array, "B L D"], mixed: Float[Array, "B L D"], *, heads: int
) -> Float[Array, "B L H"]:
    """Returns Σ_l p_l · slope_l of each row, which the gradient of its softmax subtracts, in fp32.

    It is a product of attention's output and that one's gradient (D of FlashAttention-2's
    algorithm 2, arXiv 2307.08691), where the slopes themselves would be an L x L array.
    """
    products = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
    return products.reshape(*mixed.shape[:2], heads, -1).sum(axis=-1)


class Side(NamedTuple):
    """The part that a program sees of arrays over rows, or of arrays over keys.

    A program is one block of tokens of one head of one row of the batch: (block, head, row).
    """

    length: int
    own: int | None = None
    """Tokens of the program's own block; None: it sees all."""

    def heads(self, head: int) -> pl.BlockSpec:
        """Of an array [B, L, H · head], the heads side by side."""
        return pl.BlockSpec((None, self.size, head), lambda i, h, b: (b, self._block(i), h))

    def line(self) -> pl.BlockSpec:
        """Of an array [B, H, L]."""
        return pl.BlockSpec((None, None, self.size), lambda i, h, b: (b, h, self._block(i)))

    def tokens(self) -> pl.BlockSpec:
        """Of an array [B, L]."""
        return pl.BlockSpec((None, self.size), lambda i, h, b: (b, self._block(i)))

    @property
    def size(self) -> int:
        """Tokens the program sees."""
        return self.own or self.length

    def _block(self, i: Any) -> Any:
        return i if self.own else 0


class Output(NamedTuple):
    """What a kernel writes."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    spec: pl.BlockSpec


def run_on_gpu(
    kernel: Callable[..., None],
    inputs: Sequence[tuple[Array, pl.BlockSpec]],
    outputs: Sequence[Output],
    *,
    grid: tuple[int, int, int],
    interpret: bool,
    name: str,
) -> list[Array]:
    """Runs the kernel once for every (block, head, row), on references to inputs and outputs."""
    arrays, specs = zip(*inputs, strict=True)

    def shapes(*arrays: Array) -> list[Array]:
        return [zeros_like_any(x.shape, like=arrays).astype(x.dtype) for x in outputs]

    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=specs,
        out_specs=[x.spec for x in outputs],
        out_shape=jax.eval_shape(shapes, *arrays),
        interpret=interpret,
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=2),
        name=name,
    )
    return list(run(*arrays))
