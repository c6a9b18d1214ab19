"""Times several ways of doing the same work in turn, each in its own long-lived process.

Runs alternate, so that other load on the machine affects all of them. A peer's memory is that of
its process alone.
"""

import ctypes
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Work(NamedTuple):
    """One peer, ready to run."""

    run: Callable[[], Any]
    """Does the work once and returns when it is finished."""
    check: Callable[[], float] | None = None
    """Returns a number on which the peers that have one must agree before any is timed."""
    peak_bytes: Callable[[], int] | None = None
    """Of the accelerator's memory; None where the work is done in the process's own."""


class Figures(NamedTuple):
    """What was measured of one peer."""

    seconds: np.ndarray
    """Of each timed run; empty where there were none, and `why_not` says why."""
    first: float
    """Seconds of the first run, compilation included."""
    peak: int
    """Bytes held at most while running, set-up and compilation not counted."""
    check: float | None
    why_not: str = ""


def measure(
    builders: Mapping[str, Callable[[], Work]],
    *,
    budget: float,
    tolerance: float = 1e-4,
    least: int = 3,
    most: int = 51,
) -> dict[str, Figures]:
    """Returns the figures of all peers, timed in turn.

    Args:
      builders: make the work, in the peer's own process; must be picklable.
      budget: seconds of timing, set-up not counted; at least `least` rounds are run.
      tolerance: largest relative difference between the peers' checks.
      least: rounds.
      most: rounds.

    Raises:
      ValueError: the peers do not compute the same.
    """
    peers = {name: _Peer(build) for name, build in builders.items()}
    try:
        # One after the other: compilations in parallel would disturb each other's times.
        ready = {name: peer.start() for name, peer in peers.items()}
        running = {name: peer for name, peer in peers.items() if not ready[name].why_not}
        checks = {name: check for name in running if (check := ready[name].check) is not None}
        if checks and np.ptp([*checks.values()]) > tolerance * max(map(abs, checks.values())):
            raise ValueError(f"the peers do not compute the same: {checks}")
        times: dict[str, list[float]] = {name: [] for name in peers}
        began = time.perf_counter()
        for done in range(most):
            if done >= least and time.perf_counter() - began > budget:
                break
            for name, peer in running.items():
                times[name].append(peer.ask("run"))
        return {
            name: ready[name]._replace(
                seconds=np.asarray(times[name]),
                peak=running[name].ask("peak") if times[name] else 0,
            )
            for name in peers
        }
    finally:
        for peer in peers.values():
            peer.stop()


class _Peer:
    """A process that builds its work and runs it when asked."""

    def __init__(self, build: Callable[[], Work]) -> None:
        self._build = build
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Figures:
        """Returns the check and the seconds of the first run, or the reason why there are none."""
        # A program of its own: a child of multiprocessing would import what the parent did, and
        # JAX's memory would be counted as PyTorch's.
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            answer = self.ask(self._build)
        except (EOFError, BrokenPipeError):
            answer = "its process died, perhaps for want of memory"
        if isinstance(answer, str):
            return Figures(np.zeros(0), 0.0, 0, None, why_not=answer)
        check, first = answer
        return Figures(np.zeros(0), first, 0, check)

    def ask(self, what: Any) -> Any:
        """Returns the process's answer."""
        assert self._process and self._process.stdin and self._process.stdout
        pickle.dump(what, self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)

    def stop(self) -> None:
        """Ends the process."""
        if self._process:
            self._process.kill()
            self._process.wait()


def _serve() -> None:
    """Builds the work that arrives on standard input, then answers requests until it is ended."""
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(value: Any) -> None:
        pickle.dump(value, answers)
        answers.flush()

    try:
        work = pickle.load(questions)()
        began = time.perf_counter()
        work.run()
        first = time.perf_counter() - began
        work.run()  # a compiler may look again once it has seen what changes
    except Exception as error:
        traceback.print_exc()
        answer(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}")
        return
    _forget_peak()
    answer((work.check and work.check(), first))
    while True:
        if pickle.load(questions) == "peak":
            answer(work.peak_bytes() if work.peak_bytes else _peak_resident())
        else:
            began = time.perf_counter()
            work.run()
            answer(time.perf_counter() - began)


def _forget_peak() -> None:
    """Hands free memory back, then makes the kernel restart its count of the process's peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def threads() -> int:
    """Returns the number of cores this process may use, which every peer gets."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    _serve()
