"""Sweeps of fine-tuning runs: values tried in all combinations."""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minilm_jax.errors import ConfigError
from minilm_jax.jobs.finetune_config import FinetuneConfig, FinetuneResult, SweepConfig
from minilm_jax.jobs.results import RESULTS, write_results
from minilm_jax.jobs.running import Say
from minilm_jax.tasks.catalog import TASKS
from minilm_jax.tasks.tables import ResultRow, mean_and_deviation, read_rows
from minilm_jax.train.hosts import writes
from minilm_jax.train.run_folder import BEST, CONFIG, SWEEP, write_json

Runs = dict[tuple[float, int], list[FinetuneConfig]]
"""By learning rate and epochs, one a seed."""


def check_folder(folder: Path) -> None:
    """Raises ConfigError where a folder holds something else than a sweep, which writes there."""
    if (folder / CONFIG).exists():
        raise ConfigError(
            f"output {folder} is a run by itself, whose tables those of a sweep would replace; "
            "choose another --output"
        )
    ours = (folder / SWEEP).exists() or any(folder.glob(f"{_name('*', '*', '*')}/{CONFIG}"))
    if folder.is_dir() and not ours and any(folder.iterdir()):
        raise ConfigError(
            f"output {folder} is not empty and holds no run of a sweep: choose another --output"
        )


def sweep(
    config: FinetuneConfig,
    runs: Runs,
    run: Callable[[FinetuneConfig], FinetuneResult],
    *,
    say: Say,
) -> list[FinetuneResult]:
    """Returns every run's result, after writing results.csv, tables.md and sweep.json.

    The best setting is that of the best mean of the selecting figure; the tables show its seeds
    as mean ± standard deviation.

    Args:
      config: the sweep.
      runs: what `sweep_runs` makes of it.
      run: a run of it, computed or read.
      say: tells of the runs and of the settings compared.
    """
    results: list[FinetuneResult] = []
    rows: list[ResultRow] = []
    settings: list[dict[str, Any]] = []
    began = time.monotonic()
    for (rate, passes), configs in runs.items():
        found = []
        for inner in configs:
            say(f"\n{inner.output.name}")
            result = run(inner)
            found.append(result)
            # What `evaluate` has added to a run's rows has no seed, and is not of the sweep.
            rows += [row for row in read_rows(inner.output / RESULTS) if row.seed]
        values = [result.selection for result in found]
        first = values.index(max(values))
        settings.append(
            {
                "learning_rate": rate,
                "epochs": passes,
                "seeds": [inner.train.seed for inner in configs],
                "selection": values,
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                "models": [result.model for result in found],
                # As it is called in here: the folder may be moved.
                "best_run": configs[first].output.name,
            }
        )
        results += found
    best = max(settings, key=lambda setting: setting["mean"])
    if writes():
        write_json(config.output / SWEEP, {"settings": settings, "best": best})
        write_results(config.output, rows)
    metric = TASKS[config.task].metrics[0]
    seconds = time.monotonic() - began
    say(f"\n{len(results)} runs in {seconds:.0f} s; {metric} on the selection parts")
    for setting in settings:
        mark = "  best" if setting is best else ""
        say(
            f"  lr {setting['learning_rate']}  epochs {setting['epochs']}  "
            f"{mean_and_deviation(setting['selection'])}{mark}"
        )
    say(f"best model {config.output / best['best_run'] / BEST}")
    return results


def sweep_runs(config: FinetuneConfig) -> Runs:
    """Returns the runs of a sweep, one a seed, by learning rate and epochs."""
    sweep, name = config.sweep, config.name or config.output.name
    rates = sweep.learning_rates or (config.optimizer.learning_rate,)
    epochs = sweep.epochs or (config.schedule.epochs,)
    return {
        (rate, passes): [
            dataclasses.replace(
                config,
                # Every digit of the rate: what is close by is still another run.
                output=config.output / _name(rate, passes, seed),
                name=f"{name} lr {rate}, {passes} epochs",
                optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
                schedule=dataclasses.replace(config.schedule, epochs=passes),
                train=dataclasses.replace(config.train, seed=seed),
                sweep=SweepConfig(),
            )
            for seed in sweep.seeds or (config.train.seed,)
        ]
        for rate, passes in itertools.product(rates, epochs)
    }


def _name(rate: float | str, passes: int | str, seed: int | str) -> str:
    return f"lr{rate}-epochs{passes}-seed{seed}"
