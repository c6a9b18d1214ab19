"""SIGTERM and SIGINT: the first ends a job in order, a second one ends the process."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


@contextmanager
def stoppable(left: str = "run the same command to continue") -> Iterator[None]:
    """Ends a job at the first SIGTERM or SIGINT, wherever it is; a second one ends the process.

    What handles the signals itself while it runs, such as a training loop that finishes its step
    and saves it, does so inside of this.

    Args:
      left: what the user is told about what the job left undone.

    Raises:
      Stopped: a signal arrived.
    """
    received: list[int] = []

    def ask(signum: int) -> None:
        received.append(signum)
        raise _Asked

    def ignored(unraisable: Any) -> None:
        # Raised where Python cannot but ignore it: JAX has a callback of the garbage collector,
        # and finalizers run anywhere. Here it would be ignored, too, so it comes again.
        if unraisable.exc_type is not _Asked:
            hook(unraisable)
            return
        held.enter_context(first_signal(ask))
        timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), received[0]))
        held.callback(timer.cancel)
        timer.start()

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        with ExitStack() as held:
            held.enter_context(first_signal(ask))
            yield
    except BaseException as error:
        # Libraries make an error of their own of what they are interrupted by.
        if not received or isinstance(error, Stopped):
            raise
        said = f"stopped by {signal.Signals(received[0]).name}; {left}"
        raise Stopped(said, received[0]) from error
    finally:
        sys.unraisablehook = hook


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
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
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
