"""The folder of a run: who owns it, what it was started with, what came out."""

import fcntl
import json
import logging
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

from minilm_jax.atomic import write_atomically
from minilm_jax.differences import differences, dotted_names
from minilm_jax.errors import ConfigError, RestoreError

CONFIG, RESULT, LOCK, METRICS = "config.json", "result.json", ".lock", "metrics.jsonl"
VERSIONS, DATA = "versions.json", "data.json"
SWEEP = "sweep.json"
"""Of the folder of several runs."""
BEST, STUDENT, CHECKPOINTS = "best", "student", "checkpoints"
"""The model: of fine-tuning, and of distillation."""
LIBRARIES = ("minilm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
FREE = (
    *("train.accumulate", "train.lift", "train.fsdp", "train.save_every", "train.keep"),
    *("train.keep_models", "compute.remat"),
)
"""Settings that a resumed run may change unasked: they decide memory, speed and what is kept, and,
like the number of devices, no result beyond rounding."""
NOT_COMPARED = (
    *("output", "override", "train.hosts", "train.devices", "train.trackers", "train.profile"),
)
"""Settings that are no part of what a run is."""
MOVABLE = ("teacher.source", "model", "data")
"""Settings that say where something lies; what it is the fingerprints say."""
log = logging.getLogger(__name__)


@contextmanager
def open_run(
    folder: Path,
    config: Mapping[str, Any],
    *,
    override: tuple[str, ...] = (),
    code: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """Holds the folder for this process, with its config compared or written.

    A new or empty folder gets `config.json`, and so does one of ours in which no step was taken:
    what was wrong can be mended. A folder of this very run is continued. Anything else is refused,
    so that no run ever overwrites another's results. Libraries or code that changed since are told
    in a warning, unless the run is finished: nothing is computed with them any more.

    Args:
      folder: where the run writes.
      config: the resolved config, JSON-able.
      override: dotted names whose change is accepted on resume; the changes are told.
      code: the user's own code that the run is computed with, by name; beside the versions.

    Raises:
      ConfigError: the folder is another run's (the differences are listed), belongs to something
        else, is in use, or cannot be written to; or `override` names nothing that could change.
    """
    check_run(folder, config, override=override)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / LOCK).open("w")
    except OSError as error:
        raise ConfigError(
            f"output {folder} cannot be written to ({error.strerror}); choose another --output"
        ) from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"output {folder} is in use by another process") from None
        if (folder / RESULT).exists():
            _compare(folder / CONFIG, config, override=())  # no override makes it another
            yield
            return
        before = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
        settle(folder / CONFIG, config, override=override)
        _note_versions(folder / VERSIONS, {**versions(), **(code or {})})
        try:
            yield
        except RestoreError as error:
            # The folder stays the run it was, which its own command continues.
            if before is not None and override:
                write_json(folder / CONFIG, before)
                raise RestoreError(
                    f"{error}; {folder / CONFIG} is as it was before --override"
                    f" {' '.join(override)}"
                ) from error
            raise


def check_run(
    folder: Path,
    config: Mapping[str, Any],
    *,
    override: tuple[str, ...] = (),
    unknown: tuple[str, ...] = (),
) -> None:
    """Raises ConfigError where `open_run` would refuse what lies there; writes nothing.

    Args:
      folder: where the run writes.
      config: the resolved config, as far as it is known.
      override: dotted names whose change is accepted.
      unknown: dotted names of what is not known yet.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output {folder} is a file, not a folder")
    # A model's folder has a config.json, too. Every run leaves its lock.
    ours = (folder / CONFIG).exists() and any((folder / x).exists() for x in (LOCK, METRICS))
    if folder.exists() and not ours and any(p.name != LOCK for p in folder.iterdir()):
        raise ConfigError(
            f"output {folder} is not empty and is not a run of minilm-jax; choose another --output"
        )
    _check_names(folder, config, override)
    _compare(folder / CONFIG, config, override=override, unknown=unknown)


def _check_names(folder: Path, config: Mapping[str, Any], override: tuple[str, ...]) -> None:
    """Raises ConfigError where a change is to be accepted of what this run does not depend on."""
    if not _took_a_step(folder):
        return  # nothing is compared; of the data it is not known yet what they depend on
    records = [read_json(folder / name) for name in (CONFIG, DATA) if (folder / name).exists()]
    known = set().union(*map(dotted_names, (config, *records)))
    for name in override:
        if name not in known and not _covers(NOT_COMPARED, name):
            close = get_close_matches(name, known, n=1)
            raise ConfigError(
                f"override {name} is no setting of this run"
                + (f"; did you mean {close[0]!r}?" if close else f"; {folder / CONFIG} lists them")
            )


def _note_versions(path: Path, found: Mapping[str, str]) -> None:
    """Writes what the run is computed with; warns of each change since its last start."""
    before = read_json(path) if path.exists() else found
    for _, change in differences(before, found):
        log.warning("%s since the last start of this run: its results may change", change)
    write_json(path, found)


def versions() -> dict[str, str]:
    """Returns the versions of Python, the libraries and this package, and its git revision."""
    found = {name: metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), "revision": _revision(), **found}


def _revision() -> str:
    """Returns the package's git revision, "-dirty" where it was edited, "" outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""


def settle(path: Path, value: Mapping[str, Any], *, override: tuple[str, ...] = ()) -> None:
    """Writes what a run depends on, or compares it with what the run was started with.

    Raises:
      ConfigError: something changed that `override` does not name; every difference is listed.
    """
    _compare(path, value, override=override)
    for name, change in _changes(path, value):
        if _covers(override, name):
            log.warning("%s, as --override accepts", change)
    write_json(path, value)


def _compare(
    path: Path,
    value: Mapping[str, Any],
    *,
    override: tuple[str, ...],
    unknown: tuple[str, ...] = (),
) -> None:
    found = dict(_changes(path, value))
    same = "fingerprints" in value and not any(_covers(("fingerprints",), n) for n in found)
    allowed = (*override, *unknown, *FREE, *(MOVABLE if same else ()))
    changed = [line for name, line in found.items() if not _covers(allowed, name)]
    if not changed:
        return
    accepted = f" ({', '.join(override)} does not cover all of these)" if override else ""
    said = (
        f"{path} was written by a run that differs from this one; choose another --output, or "
        f"accept a change with --override NAME{accepted}"
    )
    if (path.parent / RESULT).exists():
        said = (
            f"{path.parent} is finished, with other settings; choose another --output, or remove "
            f"its {RESULT} to go on from the last checkpoint with these"
        )
    raise ConfigError(f"{said}:\n  " + "\n  ".join(changed))


def _covers(allowed: tuple[str, ...], name: str) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in allowed)


def _changes(path: Path, value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns what the file says otherwise; nothing where no step was taken with what it says."""
    if not path.exists() or not _took_a_step(path.parent):
        return []
    return differences(read_json(path), json.loads(json.dumps(value)))


def _took_a_step(folder: Path) -> bool:
    """Returns whether a step of the run is logged, or saved: that may come first."""
    rows = folder / METRICS
    logged = rows.exists() and rows.stat().st_size > 0
    return logged or any(path.name.isdigit() for path in (folder / CHECKPOINTS).glob("*"))


def read_json(path: Path) -> Any:
    """Returns the file's content; ConfigError where it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is damaged, it is not JSON ({error}): copy it back, or give another --output"
        ) from None


def jsonable(value: Any) -> Any:
    """Returns nested dicts and lists with paths as text."""
    if isinstance(value, dict):
        return {name: jsonable(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; a reader never sees half a file."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
