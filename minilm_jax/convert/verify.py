"""Is a written model the model that was read? To the byte, and layer by layer against PyTorch."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from minilm_jax.convert.apply import outputs
from minilm_jax.convert.files import DTYPES
from minilm_jax.convert.folder import narrow
from minilm_jax.convert.model import Model, flatten
from minilm_jax.errors import CheckpointError

TOLERANCE = 1e-5
OF_LARGEST = 3e-6
"""The same of an output's largest value, where that is more: PyTorch's own fp32 is no nearer to its
fp64 (logits of 8.1 are 1.5e-5 away)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output of the two implementations."""

    name: str
    difference: float
    """Largest absolute difference over all tokens that are not padding."""
    magnitude: float
    """Largest absolute value of PyTorch's."""

    @property
    def allowed(self) -> float:
        """The largest difference that rounding explains."""
        return max(TOLERANCE, OF_LARGEST * self.magnitude)

    @property
    def agrees(self) -> bool:
        """Whether the difference is within what is allowed; NaN is not."""
        return self.difference <= self.allowed


def has_torch() -> bool:
    """Returns whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def compare_with_torch(model: Model, folder: Path, *, architecture: str) -> list[Comparison]:
    """Returns how far our outputs of `model` are from PyTorch's of `folder`, in the model's order.

    Both run in fp32 on a random batch with padding, token types and languages.
    """
    import torch

    from minilm_jax.convert.torch_outputs import load_torch, torch_outputs

    batch = random_batch(model)
    with torch.no_grad():
        theirs = torch_outputs(load_torch(folder, architecture=architecture), batch)
    # XLA may otherwise use fewer bits in matrix products on accelerators.
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda params: outputs(model.config, params, **batch))(model.params)
    valid = batch["segments"] == 1
    found = []
    for name, expected in theirs.items():
        if name not in ours:
            continue  # PyTorch builds a pooler even where the checkpoint has none.
        mine, other = np.asarray(ours[name]), expected.numpy()
        if other.shape[:2] == valid.shape and name != "pooler":
            mine, other = mine[valid], other[valid]
        found.append(
            Comparison(
                name=name,
                difference=largest_difference(mine, other),
                magnitude=float(np.abs(other).max()),
            )
        )
    return found


def largest_difference(mine: np.ndarray, other: np.ndarray) -> float:
    """Returns the largest absolute difference; NaN or infinity in both places is none."""
    both = (mine == other) | (np.isnan(mine) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(both, 0.0, mine - other)).max())


def random_batch(model: Model, *, rows: int = 3, length: int = 16) -> dict[str, np.ndarray]:
    """Returns inputs for `model`: rows of different lengths, with what its family reads."""
    config = model.config
    rng = np.random.default_rng(0)
    length = min(length, config.max_length)
    lengths = np.linspace(length, max(1, length // 3), rows).astype(int)
    segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
    ids = rng.integers(0, config.vocab_size, (rows, length))
    # PyTorch's RoBERTa takes its positions from the ids: padding must be the pad id, and only it.
    ids = np.where(ids == config.pad_token_id, (ids + 1) % config.vocab_size, ids)
    batch = {"input_ids": np.where(segments == 1, ids, config.pad_token_id), "segments": segments}
    if config.type_vocab_size > 1:
        batch["token_type_ids"] = rng.integers(0, 2, (rows, length)) * segments
    if config.n_langs:
        batch["languages"] = rng.integers(0, config.n_langs, (rows, length))
    return {name: array.astype(np.int32) for name, array in batch.items()}


def check_round_trip(model: Model, again: Model) -> int:
    """Returns how many tensors of `again` are byte for byte those of `model` in its dtype.

    Args:
      model: what was written.
      again: what was read back; its `stored_dtypes` say how each tensor was stored.

    Raises:
      CheckpointError: a tensor differs.
    """
    before, after = dict(flatten(model.params)), dict(flatten(again.params))
    if before.keys() != after.keys():
        raise CheckpointError(f"parameters differ: {sorted(before.keys() ^ after.keys())[:10]}")
    for path, leaf in before.items():
        stored = DTYPES[again.stored_dtypes.get(path, "F32")]
        expected = narrow(np.asarray(leaf), stored, where=f"parameter {path}")
        found = after[path].astype(stored)
        if not np.array_equal(_bits(expected), _bits(found)):
            raise CheckpointError(f"parameter {path} reads back differently")
    return len(before)


def _bits(array: np.ndarray) -> np.ndarray:
    return np.require(array, requirements="C").reshape(-1).view(np.uint8)


def refuse_disagreement(
    comparisons: Iterable[Comparison], *, report: Callable[[str], None]
) -> None:
    """Returns nothing after printing the table.

    Raises:
      CheckpointError: an output differs by more than is allowed.
    """
    rows = list(comparisons)
    report(f"{'output':<22} {'largest':>10} {'difference':>12}")
    for row in rows:
        mark = "" if row.agrees else f"  > {row.allowed:.2g}"
        report(f"{row.name:<22} {row.magnitude:>10.4g} {row.difference:>12.2e}{mark}")
    bad = [row for row in rows if not row.agrees]
    if bad or not rows:
        raise CheckpointError(
            f"verification failed: {', '.join(row.name for row in bad) or 'nothing was compared'} "
            f"differs from PyTorch by more than rounding explains: {TOLERANCE:g}, or "
            f"{OF_LARGEST:g} of its largest value"
        )
