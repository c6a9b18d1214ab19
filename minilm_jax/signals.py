"""SIGTERM and SIGINT: the first ends a job in order, a second one ends the process."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minilm_jax.errors import UserError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):  # noqa: N818 - an outcome, not a fault
    """The job was asked to stop; what it did is saved. `signum` is the signal that asked."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


class _Asked(BaseException):
    """A signal, on its way through whatever the job was at; no handler of errors stops it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Ends a job at the first SIGTERM or SIGINT, wherever it is; a second one ends the process.

    What handles the signals itself while it runs, such as a training loop that finishes its step
    and saves it, does so inside of this.

    Raises:
      Stopped: a signal arrived.
    """

    def ask(signum: int) -> None:
        raise _Asked(signum)

    try:
        with first_signal(ask):
            yield
    except _Asked as asked:
        raise Stopped(
            f"stopped by {signal.Signals(asked.signum).name}; run the same command to continue",
            asked.signum,
        ) from None


@contextmanager
def first_signal(receive: Callable[[int], None]) -> Iterator[None]:
    """Has the first SIGTERM or SIGINT call `receive`; a second one ends the process."""

    def handle(signum: int) -> None:
        # The system's own action: at once, whatever Python waits for. A save that it cuts short
        # leaves the one before.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        receive(signum)

    with _handler(handle):
        yield


@contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Has SIGINT end the process at once where it would raise KeyboardInterrupt.

    Python does that when native code comes back, which can take long. Nothing is tidied up.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def starting_processes() -> Iterator[None]:
    """Has the processes that are started inside never see SIGINT, which a terminal sends to all.

    This one answers for them: what arrives meanwhile it handles when all have started.
    """
    arrived: list[int] = []
    # A new process inherits what is blocked. Another thread may still take a signal for this one.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with _handler(arrived.append):
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    finally:
        for signum in arrived:
            signal.raise_signal(signum)


@contextmanager
def _handler(handle: Callable[[int], None]) -> Iterator[None]:
    """Has both signals call `handle`."""
    previous: dict[signal.Signals, Any] = {}
    for number in _SIGNALS:
        try:
            previous[number] = signal.signal(number, lambda signum, _: handle(signum))
        except ValueError:  # not the main thread: the caller handles its own signals
            break
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
