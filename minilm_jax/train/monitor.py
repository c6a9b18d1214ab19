"""What a person sees of a run: metrics.jsonl, a progress bar or plain lines, a plot of the loss."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Monitor:
    """Writes one JSON line per logged step and shows progress with speed and time left.

    A bar on a terminal, plain lines elsewhere (a log file has no use for a bar).
    """

    def __init__(
        self,
        metrics_path: Path,
        *,
        steps: int,
        first_step: int,
        stream: io.TextIOBase | None = None,
    ) -> None:
        """Continues metrics.jsonl at `first_step`: rows of later steps, lost in a crash, go."""
        self._steps = steps
        self._start = self._last_time = time.monotonic()
        self._first = self._last_step = first_step
        self._truncate(metrics_path, first_step)
        self._file = metrics_path.open("a")
        self._console = Console(file=cast(IO[str], stream)) if stream else Console(stderr=True)
        self._progress = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[line]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "", total=steps, completed=first_step, line="compiling"
            )
            self._progress.start()

    def log(
        self,
        step: int,
        metrics: Mapping[str, Any],
        counts: Mapping[str, float],
        *,
        waited: float = 0.0,
    ) -> None:
        """Records one step.

        Args:
          step: steps taken, including this one.
          metrics: scalars or lists; written to metrics.jsonl as they are. They must be functions of
            the run alone, so that a resumed run writes the same rows.
          counts: sums since the last call, such as tokens; shown per second.
          waited: seconds since the last call that the devices had no batch; shown where they
            matter.
        """
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        now = time.monotonic()
        rates = {name: value / (now - self._last_time) for name, value in counts.items()}
        elapsed = now - self._last_time
        seconds_a_step = elapsed / max(step - self._last_step, 1)
        self._last_time, self._last_step = now, step
        left = (self._steps - step) * seconds_a_step
        parts = [f"loss {metrics['loss']:.4f}"]
        parts += [f"{_short(rate)} {name}/s" for name, rate in rates.items()]
        if waited > 0.02 * elapsed:
            parts.append(f"{waited / elapsed:.0%} waiting for data")
        parts.append(f"{_duration(left)} left")
        line = "  ".join(parts)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
        else:
            self._console.print(f"step {step}/{self._steps}  {line}", highlight=False)

    def close(self) -> None:
        """Ends the bar and the file."""
        if self._progress is not None:
            self._progress.stop()
        self._file.close()

    @staticmethod
    def _truncate(path: Path, step: int) -> None:
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):  # the half line of a crash
                break
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(kept))
        beside.rename(path)


def plot_loss(metrics_path: Path, target: Path) -> bool:
    """Draws every loss term over steps; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [json.loads(line) for line in metrics_path.read_text().splitlines()]
    if not rows:
        return False
    # The object API: no global figure, no display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    for name in (name for name, value in rows[-1].items() if isinstance(value, float)):
        if name not in ("grad_norm", "learning_rate"):
            axes.plot(steps, [row.get(name) for row in rows], label=name)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=120)
    return True


def _short(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
