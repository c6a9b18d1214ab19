"""Several processes as one run: how they find each other, and who writes."""

import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from minilm_jax.errors import ConfigError, UserError, first_line
from minilm_jax.settings import Count, Positive, Settings

EXIT_INCOMPLETE = 2
"""As for anything a user can mend."""
_SENTENCE_BYTES = 4096
_LOOKS = 10
"""At a folder that another process has written to, a second apart."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig(Settings, name="hosts"):
    """The processes of a run; the same settings on every host but `process`."""

    start: Literal["one", "auto", "explicit"] = "one"
    """one: this process alone. auto: JAX finds the others (TPU slice, SLURM,
    GKE, Open MPI). explicit: from the three settings below."""
    coordinator: str | None = None
    """host:port of process 0, for explicit."""
    processes: Positive | None = None
    """Number of processes; with auto, the number expected."""
    process: Count | None = None
    """Index of this process, from 0, for explicit."""
    patience_s: Positive = 300
    """Seconds to wait for all processes at start."""
    heartbeat_s: Positive = 100
    """Seconds without a sign of life after which a process counts as dead and all others end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {
            "coordinator": self.coordinator,
            "processes": self.processes,
            "process": self.process,
        }
        missing = [f"hosts.{name}" for name, value in given.items() if value is None]
        if self.start == "explicit" and missing:
            raise ConfigError(f"hosts.start=explicit needs {' and '.join(missing)}")
        if self.process is not None and self.processes and self.process >= self.processes:
            raise ConfigError(
                f"hosts.process must be from 0 to {self.processes - 1}, got {self.process}"
            )


def join(config: HostsConfig, *, say: Callable[[str], None] = print) -> None:
    """Makes this process one of the run's, and says which; before anything else asks for a device.

    Raises:
      UserError: not all of them came in time, or they are not as many as was expected.
    """
    if config.start != "one" and not jax.distributed.is_initialized():
        if config.start == "explicit":
            say(f"process {config.process} of {config.processes}: waiting for the others")
            _check_coordinator(config)
        # JAX ends a process that waits too long from C++, with a stack trace and no exception to
        # catch; so a sentence and an exit of our own come first.
        watchdog = threading.Timer(config.patience_s, _give_up, (config,))
        watchdog.daemon = True
        watchdog.start()
        try:
            jax.distributed.initialize(
                config.coordinator,
                config.processes if config.start == "explicit" else None,
                config.process,
                initialization_timeout=config.patience_s + 60,
                heartbeat_timeout_seconds=config.heartbeat_s,
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{_incomplete(config)} ({first_line(error)})") from None
        finally:
            watchdog.cancel()
    count = jax.process_count()
    if config.start != "one":
        say(_introduction())
    if config.processes is not None and count != config.processes:
        raise UserError(
            f"{config.processes} processes were expected and {count} came: is the command started "
            "on every host of the slice?"
        )


def _introduction() -> str:
    return (
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def writes() -> bool:
    """Returns whether this process writes what the run leaves behind; exactly one does."""
    return jax.process_index() == 0


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set in any process; all of them must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


@contextmanager
def fail_together() -> Iterator[None]:
    """Raises a UserError or OSError of any process in all of them, which must all come here.

    One process checks some things for all, such as the run's folder, and a file may be missing on
    one host alone. The other processes would wait for the one that failed, in the next collective
    operation, until they are ended without a word.
    """
    error: UserError | OSError | None = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    if jax.process_count() > 1:
        mine = np.zeros(_SENTENCE_BYTES, np.uint8)
        sentence = str(error or "").encode()[:_SENTENCE_BYTES]
        mine[: len(sentence)] = np.frombuffer(sentence, np.uint8)
        for other in np.asarray(multihost_utils.process_allgather(mine)):
            said = other.tobytes().rstrip(b"\0").decode(errors="ignore")
            if said and error is None:
                error = UserError(said)
    if error is not None:
        raise error


def check_shared(folder: Path) -> None:
    """Raises UserError in every process unless all of them see the folder that one writes to."""
    if jax.process_count() == 1:
        return
    mark = folder / ".seen-by-all"
    token = multihost_utils.process_allgather(np.frombuffer(os.urandom(4), np.uint32))
    expected = str(np.asarray(token).ravel()[0])
    try:
        if writes():
            mark.write_text(expected)
        with fail_together():
            wait_for_all("a mark in the folder")
            if not _appears(mark, expected):
                raise UserError(
                    f"process {jax.process_index()} on {socket.gethostname()} does not see the "
                    f"run's folder {folder} that process 0 writes to: --output must lie on storage "
                    "that all hosts share"
                )
    finally:
        if writes():
            mark.unlink(missing_ok=True)


def _appears(mark: Path, expected: str) -> bool:
    # Network file systems show a new file late.
    for _ in range(_LOOKS):
        if mark.exists() and mark.read_text() == expected:
            return True
        time.sleep(1)
    return False


def wait_for_all(where: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _incomplete(config: HostsConfig) -> str:
    return (
        f"the run's processes did not find each other within {config.patience_s} s: start the same "
        "command on every host, and check hosts.coordinator and the firewall"
    )


def _give_up(config: HostsConfig) -> None:
    sys.stdout.flush()  # which the exit below would not do
    print(f"minilm-jax: {_incomplete(config)}", file=sys.stderr, flush=True)
    os._exit(EXIT_INCOMPLETE)


def _check_coordinator(config: HostsConfig) -> None:
    host, _, port = str(config.coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"hosts.coordinator is host:port, got {config.coordinator!r}")
