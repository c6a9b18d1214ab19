"""Batches made ahead in threads, in order, with the time the consumer waited."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from minilm_jax.errors import DataError

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Iterates over `make(start)`, `make(start + 1)`, … made ahead by threads.

    Use it as a context manager, or call `close`. `make` may end with putting the batch on the
    device: the copy then overlaps with the step. Threads suffice, because numpy and device copies
    release the interpreter's lock.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        *,
        start: int = 0,
        stop: int | None = None,
        workers: int = 1,
        ahead: int = 2,
        patience_s: float = 600.0,
    ) -> None:
        """Begins to make batches.

        Args:
            make: Step to batch; a pure function, called from several threads when `workers` is
                above 1.
            start: First step.
            stop: Step after the last one, or None for no end.
            workers: Threads; 0 makes each batch when it is asked for.
            ahead: Batches that wait at most.
            patience_s: Seconds without a batch after which the consumer gets an error.
        """
        self.data_wait_s = 0.0
        """Seconds the consumer has waited for batches in all."""
        self._make = make
        self._next = start
        self._stop = stop
        self._ahead = max(1, ahead)
        self._patience_s = patience_s
        self._to_make = start
        self._ready: dict[int, Batch | _Failure] = {}
        self._condition = threading.Condition()
        self._closed = False
        # Daemons: a worker that hangs must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch-{i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Prefetch[Batch]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Returns the next step's batch.

        Raises:
            DataError: The workers died or made nothing for `patience_s` seconds.
            Exception: Whatever `make` raised, with its traceback.
        """
        if self._closed or (self._stop is not None and self._next >= self._stop):
            raise StopIteration
        begin = time.monotonic()
        try:
            batch = self._wait() if self._threads else self._make_now()
        finally:
            self.data_wait_s += time.monotonic() - begin
        if isinstance(batch, _Failure):
            self.close()
            raise batch.error
        return batch

    def close(self) -> None:
        """Stops the workers; a batch in the making is waited for up to five seconds."""
        with self._condition:
            self._closed = True
            self._ready.clear()
            self._condition.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5.0)

    def _make_now(self) -> Batch:
        batch = self._make(self._next)
        self._next += 1
        return batch

    def _wait(self) -> "Batch | _Failure":
        deadline = time.monotonic() + self._patience_s
        with self._condition:
            while self._next not in self._ready:
                if not any(thread.is_alive() for thread in self._threads):
                    raise DataError(
                        f"step {self._next}: the data workers died without an error; run again,"
                        " with workers 0 to see where"
                    )
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise DataError(
                        f"step {self._next}: no batch for {self._patience_s:g} s; the storage of"
                        " the corpus hangs, or patience_s is too short for it"
                    )
                self._condition.wait(min(remaining, 1.0))
            batch = self._ready.pop(self._next)
            # Before a worker that this wakes looks whether there is room.
            self._next += 1
            self._condition.notify_all()
            return batch

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._closed and self._to_make >= self._next + self._ahead:
                    self._condition.wait()
                if self._closed or (self._stop is not None and self._to_make >= self._stop):
                    return
                step = self._to_make
                self._to_make += 1
            result: Batch | _Failure
            try:
                result = self._make(step)
            except BaseException as error:
                result = _Failure(error)
            with self._condition:
                if self._closed:
                    return
                self._ready[step] = result
                self._condition.notify_all()
            if isinstance(result, _Failure):
                return


class _Failure:
    """An error on its way from a worker to the consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
