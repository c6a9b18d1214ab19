"""Where the wall time of a run went, over all its starts."""

import contextlib
import dataclasses
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minilm_jax.train.run_folder import write_json

Activity = Literal["startup", "training", "data", "checkpoints", "evaluation"]
GOODPUT = "goodput.json"
_NAMES = {
    "training": "training",
    "startup": "start-up and compiling",
    "data": "waiting for data",
    "checkpoints": "checkpoints",
    "evaluation": "evaluation",
    "recomputed": "steps done twice",
}


class Goodput:
    """A stopwatch: each lap books the time since the last one as one activity.

    The file holds an entry for each start of the run, as far as its last recorded step. What a
    killed process did after that is in no entry: it counts as time between starts.
    """

    def __init__(self, path: Path | None = None, *, began: float | None = None) -> None:
        """Starts the watch, at `began` of `time.monotonic` or now.

        Args:
          path: the run's account, continued where it exists; None keeps it in memory.
          began: when this process set out on the run.
        """
        self._last = time.monotonic() if began is None else began
        self._path = path
        self._interval: dict[str, float] = defaultdict(float)
        self._starts: list[dict[str, Any]] = []
        if path is not None:
            # An account that is missing or unreadable is no reason not to train.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self._starts = list(json.loads(path.read_text())["starts"])
        elapsed = time.monotonic() - self._last
        self._now: dict[str, Any] = {"began": time.time() - elapsed, "seconds": {}}
        self._starts.append(self._now)

    def begin(self, step: int) -> None:
        """Notes the step that this start continues from; the first call counts."""
        self._now.setdefault("first_step", step)
        self._now.setdefault("last_step", step)

    def lap(self, activity: Activity) -> None:
        """Books the time since the last lap."""
        now = time.monotonic()
        seconds = self._now["seconds"]
        seconds[activity] = seconds.get(activity, 0.0) + now - self._last
        self._interval[activity] += now - self._last
        self._last = now

    def interval(self) -> Mapping[str, float]:
        """Returns the seconds booked since the last call, by activity."""
        booked, self._interval = self._interval, defaultdict(float)
        return booked

    def record(self, step: int) -> None:
        """Writes the account up to `step`."""
        self._now.update(last_step=step, ended=time.time())
        if self._path is not None:
            # A full disk ends a run where its results are written, not here.
            with contextlib.suppress(OSError):
                write_json(self._path, {"starts": self._starts})

    def account(self) -> "Account":
        """Returns the account of all starts so far."""
        recorded = [start for start in self._starts if "ended" in start]
        seconds: dict[str, float] = defaultdict(float)
        for index, start in enumerate(recorded):
            spent = defaultdict(float, start["seconds"])
            first, last = start["first_step"], start["last_step"]
            kept = min((later["first_step"] for later in recorded[index + 1 :]), default=last)
            if last > max(kept, first):
                # These steps were lost with the process and done again by a later one.
                share = (last - max(kept, first)) / (last - first)
                for activity in ("training", "data"):
                    spent["recomputed"] += share * spent[activity]
                    spent[activity] *= 1 - share
            for activity, value in spent.items():
                seconds[activity] += value
        away = 0.0
        for earlier, later in itertools.pairwise(recorded):
            away += max(later["began"] - earlier["ended"], 0.0)  # clocks are set now and then
        return Account(starts=len(recorded), seconds=dict(seconds), between_starts=away)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """The wall time of a run."""

    starts: int
    """Processes that took a step of it."""
    seconds: dict[str, float]
    """By activity; `recomputed` is the training whose steps a later start had to do again."""
    between_starts: float
    """Seconds when no process ran."""

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = ", ".join(
            f"{name} {self.seconds[activity] / total:.1%}"
            for activity, name in _NAMES.items()
            if self.seconds.get(activity)
        )
        starts = f" in {self.starts} starts" if self.starts > 1 else ""
        away = f"; {duration(self.between_starts)} between starts" if self.starts > 1 else ""
        return f"{duration(total)}{starts}: {shares}{away}"


def duration(seconds: float) -> str:
    """Returns minutes and seconds, or hours, minutes and seconds; days where there are many."""
    days = seconds / 86_400
    if days >= 1000:
        return f"{days / 365.25:,.1f} years"
    if days >= 3:
        return f"{days:.3g} days"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
