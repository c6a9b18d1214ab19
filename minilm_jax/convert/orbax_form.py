"""Our own form: an Orbax checkpoint of the parameters beside config.json, tokenizer and pooling."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.convert.card import CARD, carried_card
from minilm_jax.convert.hf_config import from_hf_config, to_hf_config
from minilm_jax.convert.matching import write_names
from minilm_jax.convert.model import Model, flatten, nest
from minilm_jax.convert.output import replace_folder, write_json, write_manifest
from minilm_jax.convert.sentence import read_sentence, write_sentence
from minilm_jax.convert.strict_json import read_json
from minilm_jax.errors import CheckpointError, first_line

PARAMETERS = "params"


def write_orbax(
    model: Model,
    folder: str | Path,
    *,
    tokenizer_files: tuple[Path, ...] = (),
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Returns `folder`, now holding an Orbax checkpoint (fp32) that `read_model` reads.

    Args:
      model: what to write.
      folder: where to; see `output.replace_folder`.
      tokenizer_files: copied along.
      check: called on the finished folder before it takes its name; what it raises undoes all.
    """

    def fill(partial: Path) -> None:
        _save(model.params, partial / PARAMETERS)
        write_json(partial / "config.json", to_hf_config(model.config, model.hf_config))
        for file in tokenizer_files:
            shutil.copyfile(file, partial / file.name)
        if card := carried_card(model):
            (partial / CARD).write_text(card, encoding="utf-8")
        if model.sentence is not None:
            write_sentence(partial, model.sentence, width=model.config.hidden_size)
        write_manifest(partial, source=model.source, sha256=model.fingerprint)
        if check is not None:
            check(partial)

    return replace_folder(Path(folder), fill, source=model.folder)


def _save(params: dict[str, Any], folder: Path) -> None:
    """Writes `params`, with an OSError where the disk refuses."""
    import orbax.checkpoint as ocp

    # Looked up first: Orbax prints a traceback for each write it had begun when a disk fills up.
    if (
        sum(leaf.nbytes for leaf in flatten(params).values())
        > shutil.disk_usage(folder.parent).free
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.resolve(), params)
    except ValueError as error:
        # What its storage makes of the system's errors.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def is_orbax(folder: Path) -> bool:
    """Returns whether `folder` was written by `write_orbax`."""
    return (folder / PARAMETERS / "_METADATA").is_file()


def read_orbax(folder: Path, *, sha256: str | None) -> Model:
    """Returns the model in `folder`; its parameters must be exactly a model's.

    The fingerprint is the SHA-256 over each path and its bytes, in the order of the paths.

    Raises:
      CheckpointError: the checkpoint is damaged, incomplete, or not the one asked for.
    """
    import orbax.checkpoint as ocp

    hf_config = read_json(folder / "config.json")
    config = from_hf_config(hf_config, name=str(folder / "config.json"))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree: Any = checkpointer.metadata((folder / PARAMETERS).resolve())
            tree = tree.item_metadata.tree if hasattr(tree, "item_metadata") else tree
            shapes = {path: tuple(leaf.shape) for path, leaf in flatten(tree).items()}
            write_names(shapes, config=config)
            # Into NumPy: placing them on devices is the caller's choice.
            handler = ocp.PyTreeCheckpointHandler()
            arguments = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in shapes}
        with ocp.Checkpointer(handler) as reader:
            restored = reader.restore(
                (folder / PARAMETERS).resolve(),
                args=ocp.args.PyTreeRestore(restore_args=nest(arguments)),
            )
    except CheckpointError:
        raise
    except Exception as error:  # orbax and its storage raise bare ones
        raise CheckpointError(
            f"{folder / PARAMETERS} cannot be read: {first_line(error)}"
        ) from error
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(restored).items()}
    digest = hashlib.sha256()
    for path in sorted(leaves):
        digest.update(path.encode() + b"\n" + leaves[path].tobytes())
    if sha256 is not None and sha256.lower() != digest.hexdigest():
        raise CheckpointError(f"{folder} has SHA-256 {digest.hexdigest()}, expected {sha256}")
    return Model(
        config=config,
        params=nest(leaves),
        hf_config=hf_config,
        source=str(folder),
        fingerprint=digest.hexdigest(),
        folder=folder,
        sentence=read_sentence(folder, max_length=config.max_length),
    )
