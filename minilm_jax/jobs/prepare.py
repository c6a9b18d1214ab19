"""The prepare job: raw text in, a token corpus out."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from minilm_jax.data.corpus import MANIFEST, Manifest
from minilm_jax.data.inspection import check_corpus
from minilm_jax.data.prepare import SPLITS, Progress, prepare
from minilm_jax.data.sources import TextSource
from minilm_jax.settings import Count, Positive, Rate, Settings, check
from minilm_jax.signals import stoppable


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Settings):
    """Tokenise text into a corpus. Run the same command again to resume."""

    source: TextSource
    """The text."""
    tokenizer: Path
    """Folder of the tokenizer, usually the teacher's model folder, or a Hub id."""
    output: Path
    """Folder of the corpus."""
    workers: Count | None = None
    """Worker processes; 0 works in this process, None starts one per core."""
    heldout: Rate = 0.01
    """Share of documents held out of training, chosen by a hash of their
    text; of a small text one at least. Distillation measures its loss on
    them."""
    shard_tokens: Positive = 64 << 20
    """Tokens per shard. An interruption loses at most one unfinished shard per worker."""


def run(config: PrepareConfig, *, say: Callable[[str], None] = print) -> Manifest:
    """Returns the manifest of the finished corpus."""
    check("config", config, PrepareConfig)
    finished = (config.output / MANIFEST).is_file()
    with stoppable(), _Bar() if sys.stderr.isatty() else nullcontext() as bar:
        manifest = prepare(
            config.source,
            tokenizer=_local(config.tokenizer),
            output=config.output,
            workers=config.workers,
            holdout_fraction=config.heldout,
            shard_tokens=config.shard_tokens,
            progress=bar.show if bar else None,
        )
        if finished:
            check_corpus(config.output)
            say(f"{config.output} is finished and undamaged; nothing to do.")
    for split in SPLITS:
        if shards := manifest.splits.get(split):
            documents = sum(shard.documents for shard in shards)
            tokens = sum(shard.tokens for shard in shards)
            say(f"{split:<9}{documents:>14,} documents {tokens:>18,} tokens")
    for line in manifest.left_out().lines():
        say(f"skipped  {line}")
    say(f"corpus   {config.output}")
    if not manifest.splits.get("heldout"):
        say("         holds out no document: minilm-jax distill needs some, see --heldout")
    return manifest


def _local(tokenizer: Path) -> Path:
    """Returns the folder of a tokenizer, downloaded where it is a Hub id."""
    if tokenizer.exists():
        return tokenizer
    from minilm_jax.convert.hub import resolve_tokenizer  # it imports JAX

    return resolve_tokenizer(tokenizer)


class _Bar:
    """A progress bar on a terminal; elsewhere nothing is drawn."""

    def __init__(self) -> None:
        # Here: half of rich is not needed where no terminal is.
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("prepare"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0, count="")

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def show(self, progress: Progress) -> None:
        rate = progress.tokens / max(progress.seconds, 1e-9)
        count = f"{progress.documents:,} documents, {rate / 1e6:.2f} M tokens/s"
        self._bar.update(self._task, completed=progress.done, count=count)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
