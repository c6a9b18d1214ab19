"""What was measured, on disk: a CSV row a figure, and the tables made of them."""

import dataclasses
import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from minilm_jax import __version__
from minilm_jax.atomic import write_atomically
from minilm_jax.convert.model import Model
from minilm_jax.data.tokenizers import Tokenizer
from minilm_jax.jobs.evaluator import PartResult
from minilm_jax.tasks.catalog import Task
from minilm_jax.tasks.tables import ResultRow, read_rows, tables, write_rows
from minilm_jax.train.run_folder import jsonable

RESULTS, TABLES, PREDICTIONS = "results.csv", "tables.md", "predictions"


def result_rows(
    result: PartResult,
    *,
    name: str,
    task: Task,
    model: Model,
    tokenizer: Tokenizer,
    settings: Any,
    seed: str = "",
) -> list[ResultRow]:
    """Returns a row a figure, with what is needed to measure it again."""
    part, data = result.data.part, result.data
    devices = jax.devices()
    crossed = part.question_language not in ("", part.language)
    return [
        ResultRow(
            name=name,
            task=task.name,
            split=part.split,
            language=part.language,
            question_language=part.question_language if crossed else "",
            metric=metric,
            value=value,
            examples=len(data.examples),
            skipped=sum(data.skips.counts.values()),
            seed=seed,
            model=model.source,
            model_sha256=model.fingerprint,
            tokenizer_sha256=tokenizer.fingerprint,
            data_sha256=data.sha256,
            settings=json.dumps(jsonable(dataclasses.asdict(settings))),
            versions=(
                f"minilm_jax {__version__}, jax {jax.__version__}, Python "
                f"{platform.python_version()}, {len(devices)} × {devices[0].device_kind}"
            ),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        for metric, value in result.scores.items()
    ]


def write_results(folder: Path, rows: Sequence[ResultRow]) -> None:
    """Writes results.csv and tables.md of a fine-tuning's rows, and of what `evaluate` added.

    A start that was cut off here has written none or all of them.
    """
    file = folder / RESULTS
    added = [row for row in read_rows(file) if not row.seed] if file.exists() else []
    write_rows(file, [*rows, *added])
    write_tables(folder)


def write_tables(folder: Path) -> None:
    """Writes tables.md of everything in results.csv, the published rows beside ours."""
    if (folder / RESULTS).exists():
        write_atomically(folder / TABLES, tables(read_rows(folder / RESULTS)))
