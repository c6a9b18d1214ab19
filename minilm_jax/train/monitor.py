"""What a person sees of a run: metrics.jsonl, a progress bar or plain lines, a plot of the loss."""

import dataclasses
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from minilm_jax.atomic import write_atomically
from minilm_jax.train.checkpoint import HELDOUT
from minilm_jax.train.goodput import duration
from minilm_jax.train.hardware import GIB, peak_flops, peak_memory
from minilm_jax.train.trackers import Tracker

SPEED = "speed.jsonl"
log = logging.getLogger(__name__)
_NOT_TERMS = ("loss", "grad_norm", "learning_rate")
_TERMS_SHOWN = 6
_SHORT_NAMES = {"tokens": "tok", "examples": "ex", "documents": "doc"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """The steps between two reports, without the one that was compiled."""

    steps: int
    counts: Mapping[str, float]
    """Sums over the steps, such as tokens; shown per second."""
    flops: int
    """Of their matrix products, over all devices; 0 where not counted."""
    seconds: float
    """Spent on them, without checkpoints and evaluation."""
    waited: float
    """Those of the seconds that the devices had no batch; shown where they matter."""


class Monitor:
    """Writes one JSON line per logged step and shows progress with speed and time left.

    A bar on a terminal, plain lines elsewhere (a log file has no use for a bar). How fast it went
    is no function of the run: it is written to speed.jsonl beside the metrics, by every start in
    turn.
    """

    def __init__(
        self,
        metrics_path: Path,
        *,
        steps: int,
        first_step: int,
        devices: Sequence[Any] = (),
        trackers: Sequence[Tracker] = (),
        stream: io.TextIOBase | None = None,
    ) -> None:
        """Continues metrics.jsonl at `first_step`: rows of later steps, lost in a crash, go.

        Args:
          metrics_path: the metrics.jsonl.
          steps: of the whole run.
          first_step: steps taken before.
          devices: of the run, for memory and the share of their peak.
          trackers: where else metrics and speed are shown; closed with the monitor.
          stream: where progress is shown; None is stderr.
        """
        self._steps = steps
        self._trackers = trackers
        self._devices = devices
        self._peak = peak_flops(devices) if devices else None
        self._truncate(metrics_path, first_step)
        self._file = metrics_path.open("a")
        self._speed_file = metrics_path.with_name(SPEED).open("a")
        file = cast(IO[str], stream) if stream else None
        # A metric's name may have brackets.
        self._console = Console(file=file, stderr=file is None, markup=False)
        self._progress = None
        if first_step:
            self._console.print(f"resumed after step {first_step:,} of {steps:,}", highlight=False)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[line]}", markup=False),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "", total=steps, completed=first_step, line="compiling"
            )
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, Any], interval: Interval) -> None:
        """Records one step.

        Args:
          step: steps taken, including this one.
          metrics: scalars or lists, written to metrics.jsonl; null is one that is not finite. They
            must be functions of the run alone, so that a resumed run writes the same rows.
          interval: the steps since the last call, for the speed.
        """
        _append(self._file, {"step": step, **metrics})
        speed = self._speed(interval) if interval.steps else {}
        if speed:
            _append(self._speed_file, {"step": step, **speed})
        for tracker in self._trackers:
            speeds = {f"speed/{name}": value for name, value in speed.items()}
            tracker.log(step, {**metrics, **speeds})
        left = ""
        if interval.steps:
            seconds = (self._steps - step) * interval.seconds / interval.steps
            left = f"{duration(seconds)} left"
        self._show(step, _progress_line(metrics, speed), left)

    def log_heldout(self, step: int, loss: float) -> None:
        """Records the held-out loss after `step`, in a row of its own."""
        _append(self._file, {"step": step, HELDOUT: loss})
        for tracker in self._trackers:
            tracker.log(step, {HELDOUT: loss})
        self._console.print(
            f"step {step}/{self._steps}  held-out loss {decimal(loss, 4)}", highlight=False
        )

    def _speed(self, interval: Interval) -> dict[str, float]:
        """Returns figures per second and shares, without those that are not known."""
        seconds = interval.seconds
        speed = {f"{name}_per_second": value / seconds for name, value in interval.counts.items()}
        if interval.flops:
            speed["flops_per_second"] = interval.flops / seconds
            if self._peak is not None:
                speed["mfu"] = speed["flops_per_second"] / self._peak
        memory = peak_memory(self._devices)
        if memory is not None:
            speed["peak_memory_bytes"] = memory
        return {**speed, "data_wait": interval.waited / seconds, "seconds": seconds}

    def _show(self, step: int, line: str, left: str) -> None:
        if self._progress is not None:
            # A narrow terminal cuts the end off.
            self._progress.update(self._task, completed=step, line=f"{left}  {line}".strip())
        else:
            text = f"step {step}/{self._steps}  {line}  {left}"
            self._console.print(text.rstrip(), highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar, the files and the trackers."""
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._speed_file.close()
        for tracker in self._trackers:
            tracker.close()

    @staticmethod
    def _truncate(path: Path, step: int) -> None:
        if not path.exists():
            return
        kept = [line + "\n" for line, row in _read_rows(path) if row["step"] <= step]
        write_atomically(path, "".join(kept))


def decimal(value: float, digits: int) -> str:
    """Returns a loss with so many decimals, or with a power of ten where they would be zeros."""
    return f"{value:.1e}" if 0 < abs(value) < 10 ** (1 - digits) else f"{value:.{digits}f}"


def plot_loss(metrics_path: Path, target: Path) -> bool:
    """Draws every loss term over steps; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [row for _, row in _read_rows(metrics_path)]
    if not rows:
        return False
    # The object API: no global figure, no display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = {name: None for row in rows for name, x in row.items() if isinstance(x, float)}
    for name in names:
        if name not in ("grad_norm", "learning_rate"):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), label=name)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    return True


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(_finite(row), allow_nan=False) + "\n")
    file.flush()


def _finite(value: Any) -> Any:
    """Returns the value with null for numbers that JSON has none for."""
    match value:
        case Mapping():
            return {name: _finite(inner) for name, inner in value.items()}
        case list():
            return [_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the lines of a metrics.jsonl with what they say.

    A line that cannot be read is left out, with a warning unless it is the last: the half one of a
    crash.
    """
    lines = path.read_text(errors="replace").splitlines()
    rows, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append((line, row))
        elif number < len(lines):
            damaged.append(str(number))
    if damaged:
        log.warning("%s: skipped unreadable lines: %s", path, ", ".join(damaged))
    return rows


def _progress_line(metrics: Mapping[str, Any], speed: Mapping[str, float]) -> str:
    """Returns what fits one line of a terminal: the loss and its parts, and how fast it goes."""
    terms = [
        f"{name} {decimal(value, 3)}"
        for name, value in metrics.items()
        if isinstance(value, float) and name not in _NOT_TERMS
    ]
    if len(terms) > _TERMS_SHOWN:
        terms = [*terms[:_TERMS_SHOWN], "…"]
    loss = f"loss {decimal(metrics['loss'], 4)}"
    parts = [f"{loss} ({' '.join(terms)})" if len(terms) > 1 else loss]
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.2g}")
    if "grad_norm" in metrics:
        parts.append(f"grad {metrics['grad_norm']:.2g}")
    for name, value in speed.items():
        match name.removesuffix("_per_second"):
            case "flops":
                parts.append(f"{_short(value)}FLOP/s")
            case "mfu":
                parts[-1] += f" {value:.0%} MFU"
            case "peak_memory_bytes":
                parts.append(f"{value / GIB:.1f} GiB")
            case "data_wait" if value > 0.02:
                parts.append(f"{value:.0%} waiting for data")
            case count if count != name:
                parts.append(f"{_short(value)} {_SHORT_NAMES.get(count, count)}/s")
    return "  ".join(parts)


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"
