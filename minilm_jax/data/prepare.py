"""Text to a token corpus: in parallel, resumable, and the same whatever the workers.

The sources are cut into parts. A worker reads a part, tokenises it and writes its shards; beside
each shard stands a record of how many documents of the part are done. Records are what a
repeated run goes on from, and the manifest is put together from them at the end.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any, Literal

from minilm_jax.atomic import write_atomically
from minilm_jax.data.corpus import (
    FORMAT,
    MANIFEST,
    Manifest,
    Shard,
    ShardWriter,
    read_manifest,
    shard_from_json,
)
from minilm_jax.data.documents import Document
from minilm_jax.data.skipped import Skipped
from minilm_jax.data.sources import (
    Part,
    TextSource,
    read_part,
    refuse_inside,
    split_source,
)
from minilm_jax.data.tokenizers import Tokenizer, load_tokenizer
from minilm_jax.differences import differences
from minilm_jax.errors import DataError
from minilm_jax.signals import starting_processes

_CHUNK_CHARACTERS = 1 << 20
SPLITS = ("train", "heldout")
_NO_TOKENS = "no tokens"
_SETTINGS, _LOCK = "settings.json", ".lock"
_SMALL_TEXT = 64 << 20
"""Bytes; as much text is read beforehand where the first documents leave nothing held out."""


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    done: float
    """Share of the text, 0 to 1."""
    documents: int
    tokens: int
    """Of this run: what an earlier run prepared is not counted."""
    seconds: float


@dataclass(frozen=True)
class _Record:
    """What is done of a part when one of its shards is whole."""

    consumed: int
    """Documents of the part that stand in this and earlier shards, in either split."""
    last: bool
    splits: dict[str, Shard]
    skipped: dict[str, int]
    """Of the part, from its beginning."""
    skipped_files: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Task:
    """All that a worker needs; it travels to another process."""

    part: Part
    output: Path
    tokenizer: Path
    dtype: Literal["uint16", "uint32"]
    heldout_below: float
    """A document whose hash is smaller is held out; 0 holds out none."""
    shard_tokens: int


@dataclass(frozen=True)
class _Written:
    documents: int
    tokens: int


Report = Callable[[int, int, int], None]


def prepare(
    source: TextSource,
    *,
    tokenizer: str | Path,
    output: str | Path,
    workers: int | None = None,
    holdout_fraction: float = 0.0,
    shard_tokens: int = 64 << 20,
    finished_is_enough: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Returns the manifest of the finished corpus in `output`.

    Run again after an interruption it goes on where it was; run again on a finished folder it
    does nothing.

    Args:
        source: What to read; the corpus keeps its order.
        tokenizer: Folder of the tokenizer; its files are copied into the corpus.
        output: Folder to write.
        workers: Processes; 0 works in this one, None takes one for each core.
        holdout_fraction: Share of documents, chosen by a hash of their text, that go to the split
            `heldout`. Equal texts go to the same split. Of a small corpus, one at least.
        shard_tokens: A shard ends after so many tokens; this much work is lost at most to an
            interruption, for each worker.
        finished_is_enough: Take a finished folder as it is, whatever became of the text since.
        progress: Called about four times a second.

    Raises:
        DataError: Bad input, another process at work on the folder, a folder with shards of other
            settings, a full disk. What was already prepared stays and counts.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if not 0 <= holdout_fraction < 1:
        raise DataError(f"heldout is {holdout_fraction}: give a share from 0 to below 1")
    check_guarded()
    if workers < 0:
        raise DataError(f"workers is {workers}: give 0, to work in this process, or more")
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}: give at least 1")
    output = Path(output)
    loaded = load_tokenizer(tokenizer)
    settings = _settings(source, loaded, holdout_fraction, shard_tokens)
    finished = finished_is_enough and (output / MANIFEST).is_file()
    # Before anything is written: what is refused here leaves no folder behind.
    unread = Skipped()
    parts = []
    if not finished:
        refuse_inside(source, output)
        parts = split_source(source, skipped=unread)
    try:
        _refuse_others(output)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{output}: cannot be made ({error.strerror})") from error
    with _locked(output):
        _check_settings(output, settings)
        if finished_is_enough and (output / MANIFEST).is_file():
            return read_manifest(output)
        settings["parts"] = [part.key for part in parts]
        if (output / MANIFEST).is_file():
            return _finished(output, settings)
        write_atomically(output / _SETTINGS, _json(settings))
        _copy_tokenizer(loaded, output)
        dtype: Literal["uint16", "uint32"] = "uint16" if loaded.vocab_size <= 1 << 16 else "uint32"
        heldout_below = _heldout_below(parts, holdout_fraction)
        tasks = [
            _Task(part, output, output / "tokenizer", dtype, heldout_below, shard_tokens)
            for part in parts
        ]
        _remove_leftovers(output, {part.key for part in parts})
        _check_disk(tasks)
        _run(tasks, workers, progress)
        manifest = _manifest(tasks, loaded, settings, unread)
        write_atomically(output / MANIFEST, manifest.to_json().encode())
        return manifest


def _settings(
    source: TextSource,
    tokenizer: Tokenizer,
    holdout_fraction: float,
    shard_tokens: int,
) -> dict[str, Any]:
    settings = {
        "format": FORMAT,
        "sources": [dataclasses.asdict(source)],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "holdout_fraction": holdout_fraction,
        "shard_tokens": shard_tokens,
    }
    return json.loads(_json(settings))  # as it is read back


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _refuse_others(output: Path) -> None:
    """Raises DataError where the folder holds files, and no corpus was begun in it."""
    if not output.is_dir() or (output / _SETTINGS).is_file():
        return
    # What a run leaves that is killed before it has written its settings.
    own = (_LOCK, ".unfinished")
    others = [path.name for path in output.iterdir() if not path.name.endswith(own)]
    if others:
        raise DataError(
            f"{output}: holds other files ({', '.join(sorted(others)[:3])}); give a new folder"
        )


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / _SETTINGS
    if not path.is_file():
        return
    before = json.loads(path.read_text("utf-8"))
    changed = [line for _, line in differences(_as_options(before), _as_options(settings))]
    if not changed:
        return
    if _has_tokens(output):
        raise DataError(
            f"{output}: was begun with other settings ({'; '.join(changed)}); give a new folder or"
            " delete it"
        )
    for name in ("tokenizer", "records", *SPLITS):
        if (output / name).exists():
            shutil.rmtree(output / name)


def _as_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as they are kept, under the names that a user gives them by."""
    (source,) = settings["sources"]
    return {
        "format": settings["format"],
        # How broken files are met may be changed to get past one.
        "source": {name: value for name, value in source.items() if name != "broken_files"},
        "tokenizer": settings["tokenizer_fingerprint"],
        "heldout": settings["holdout_fraction"],
        "shard_tokens": settings["shard_tokens"],
    }


def _has_tokens(output: Path) -> bool:
    """Tells whether any finished shard holds a token: else nothing is lost by beginning anew."""
    shards = (path for split in SPLITS for path in (output / split).glob("*.tokens"))
    return (output / MANIFEST).is_file() or any(path.stat().st_size for path in shards)


def _finished(output: Path, settings: dict[str, Any]) -> Manifest:
    manifest = read_manifest(output)
    if manifest.settings["parts"] != settings["parts"]:
        raise DataError(
            f"{output} is finished, but the text files have changed since; give a new folder"
        )
    return manifest


def _check_disk(tasks: list[_Task]) -> None:
    """Refuses a disk that is surely too small; few languages have more than 8 bytes a token."""
    width = 2 if tasks[0].dtype == "uint16" else 4
    output = tasks[0].output
    left = 0
    for task in tasks:
        records = _records(output, task.part.key)
        if not (records and records[-1].last) and task.part.source.format != "tfds":
            left += task.part.size
    needed, free = left // 8 * width, shutil.disk_usage(output).free
    if needed > free:
        raise DataError(
            f"{output}: {_size(left)} of text need at least {_size(needed)}, and {_size(free)}"
            " are free; give another disk or make room"
        )


def _size(count: int) -> str:
    """Returns bytes in the unit that leaves one to three digits before the point."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _copy_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    (output / "tokenizer").mkdir(exist_ok=True)
    for file in tokenizer.files:
        write_atomically(output / "tokenizer" / file.name, file.read_bytes())


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    try:
        opened = (output / _LOCK).open("a+")
    except OSError as error:
        raise DataError(
            f"{output}: cannot be written to ({error.strerror}); give another folder"
        ) from error
    # The system frees the lock when the process ends, however it ends.
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{output}: another process is preparing this folder; wait for it or give another"
            ) from error
        yield


def _remove_leftovers(output: Path, keys: set[str]) -> None:
    """Removes halves of an interrupted run and shards of files that have changed since."""
    kept = {
        shard.name
        for key in keys
        for record in _records(output, key)
        for shard in record.splits.values()
    }
    for folder in (*SPLITS, "records"):
        for path in (output / folder).glob("*"):
            name, _, _ = path.name.partition(".")
            known = name.rpartition("-")[0] in keys if folder == "records" else name in kept
            if not known or path.name.endswith(".unfinished"):
                path.unlink()


# One part


def _records(output: Path, key: str) -> list[_Record]:
    """Returns the unbroken run of records of a part whose shards are all there."""
    records: list[_Record] = []
    while True:
        path = _record_path(output, key, len(records))
        try:
            content = json.loads(path.read_text("utf-8"))
            splits = {name: shard_from_json(s) for name, s in content.pop("splits").items()}
            record = _Record(splits=splits, **content)
        except (OSError, ValueError, KeyError, TypeError):
            return records
        for split, shard in record.splits.items():
            for ending in shard.hashes:
                if not (output / split / f"{shard.name}.{ending}").is_file():
                    return records
        records.append(record)
        if record.last:
            return records


def _record_path(output: Path, key: str, number: int) -> Path:
    return output / "records" / f"{key}-{number:05d}.json"


def _prepare_part(task: _Task, tokenizer: Tokenizer, report: Report) -> None:
    """Writes the shards of a part that are not there yet."""
    records = _records(task.output, task.part.key)
    if records and records[-1].last:
        return
    number = len(records)
    skipped = Skipped()
    documents = read_part(task.part, skipped=skipped)
    consumed = records[-1].consumed if records else 0
    without_tokens = records[-1].skipped.get(_NO_TOKENS, 0) if records else 0
    for chunk in _chunks(itertools.islice(documents, consumed)):
        report(0, 0, _characters(chunk))
    (task.output / "records").mkdir(exist_ok=True)
    last = False
    while not last:
        writers = {
            split: ShardWriter(task.output / split, f"{task.part.key}-{number:05d}", task.dtype)
            for split in (SPLITS if task.heldout_below else SPLITS[:1])
        }
        try:
            last = True
            for chunk in _chunks(documents):
                written = _write_chunk(chunk, tokenizer, writers, task.heldout_below)
                consumed += len(chunk)
                without_tokens += len(chunk) - written.documents
                report(written.documents, written.tokens, _characters(chunk))
                if sum(writer.tokens for writer in writers.values()) >= task.shard_tokens:
                    last = False
                    break
            splits = {split: writer.finish() for split, writer in writers.items()}
        finally:
            for writer in writers.values():
                writer.discard()
        counts = dict(skipped.counts) | ({_NO_TOKENS: without_tokens} if without_tokens else {})
        record = _Record(consumed, last, splits, counts, skipped.files)
        path = _record_path(task.output, task.part.key, number)
        write_atomically(path, _json(dataclasses.asdict(record)))
        number += 1


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(chunk: list[Document]) -> int:
    return sum(len(document.text) for document in chunk)


def _write_chunk(
    chunk: list[Document],
    tokenizer: Tokenizer,
    writers: dict[str, ShardWriter],
    heldout_below: float,
) -> _Written:
    documents = tokens = 0
    encoded = tokenizer.encode([document.text for document in chunk])
    for document, ids in zip(chunk, encoded, strict=True):
        if not len(ids):
            continue
        held_out = heldout_below and _unit_hash(document.text) < heldout_below
        writers["heldout" if held_out else "train"].add(ids, document.language)
        documents += 1
        tokens += len(ids)
    return _Written(documents, tokens)


def _heldout_below(parts: list[Part], fraction: float) -> float:
    """Returns the share of all hashes that is held out.

    It is `fraction`, except where a small text has two documents or more and none of them would
    be: then the one of the smallest hash is. The same in each run over the same text.
    """
    smallest: list[float] = []
    plenty = any(part.source.format == "machine-docs" for part in parts)
    if not fraction or plenty or sum(part.size for part in parts) > _SMALL_TEXT:
        return fraction
    for part in parts:
        with contextlib.suppress(DataError):  # it will come up again, once all else is done
            for document in read_part(part, skipped=Skipped()):
                found = _unit_hash(document.text)
                if found < fraction:
                    return fraction
                smallest = sorted({*smallest, found})[:2]
    return math.nextafter(smallest[0], 1.0) if len(smallest) == 2 else fraction


def _unit_hash(text: str) -> float:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


# All parts


def _run(tasks: list[_Task], workers: int, progress: Callable[[Progress], None] | None) -> None:
    meter = _Meter(tasks, progress)
    if workers == 0:
        tokenizer = load_tokenizer(tasks[0].tokenizer)
        errors = []
        for task in tasks:
            try:
                _prepare_part(task, tokenizer, meter.add)
                meter.part_done(task)
            except Exception as error:
                errors.append(error)
                if not isinstance(error, DataError):
                    break
    else:
        errors = _run_processes(tasks, workers, meter)
    if errors:
        _raise(errors, tasks[0].output)
    meter.finish()


def _raise(errors: list[Exception], output: Path) -> None:
    for error in errors:
        if isinstance(error, OSError):
            raise DataError(
                f"{output}: cannot be written ({error.strerror or error}); finished shards are"
                " kept: make room and run the same command again"
            ) from error
        if isinstance(error, BrokenProcessPool):
            raise DataError(
                f"{output}: a worker process was killed, often because memory ran out, or a script"
                ' without `if __name__ == "__main__":` started it; finished shards are kept: run'
                " the same command again, with fewer workers"
            ) from error
        if not isinstance(error, DataError):
            raise error
    more = f" (and {len(errors) - 1} more like it)" if len(errors) > 1 else ""
    kept = "; finished shards are kept" if _has_tokens(output) else ""
    raise DataError(f"{errors[0]}{more}{kept}") from errors[0]


def check_guarded() -> None:
    """Raises DataError in a worker that is running its parent's script once more.

    To be called before a worker could be told that its parent's folder is in use.
    """
    # As Python does before it lets a process start others (multiprocessing/spawn.py).
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(
            "text is prepared by processes that run the main script again: put what it does under"
            ' `if __name__ == "__main__":`'
        )


def _run_processes(tasks: list[_Task], workers: int, meter: "_Meter") -> list[Exception]:
    # spawn: a fork of a process with threads (JAX has many) can hang.
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    stop = context.Event()
    errors: list[Exception] = []
    with concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(reports, stop, tasks[0].tokenizer),
    ) as pool:
        try:
            with starting_processes():
                running = {pool.submit(_work, task): task for task in tasks}
            while running:
                done, _ = concurrent.futures.wait(
                    running, timeout=0.25, return_when=concurrent.futures.FIRST_COMPLETED
                )
                meter.drain(reports)
                for future in done:
                    task = running.pop(future)
                    error = future.exception()
                    if error is None:
                        meter.part_done(task)
                    elif isinstance(error, Exception):
                        errors.append(error)
                if any(not isinstance(error, DataError) for error in errors):
                    break
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            meter.drain(reports)
            reports.close()
            reports.join_thread()
    return errors


_worker: dict[str, Any] = {}
"""What a worker process keeps between its parts."""


class _StoppedError(Exception):
    """The run ends: what a worker is at is not needed."""


def _start_worker(reports: Any, stop: Any, tokenizer: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["reports"] = reports
    _worker["stop"] = stop
    _worker["tokenizer"] = load_tokenizer(tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: _Task) -> None:
    _prepare_part(task, _worker["tokenizer"], _report)


def _report(documents: int, tokens: int, size: int) -> None:
    if _worker["stop"].is_set():
        raise _StoppedError
    _worker["reports"].put((documents, tokens, size))


class _Meter:
    def __init__(self, tasks: list[_Task], show: Callable[[Progress], None] | None) -> None:
        self._show = show
        self._total = max(1, sum(task.part.size for task in tasks))
        self._begin = time.monotonic()
        self._shown = 0.0
        self._done = 0.0
        self._documents = 0
        self._tokens = 0
        self._parts = 0
        self._inside = 0

    def add(self, documents: int, tokens: int, size: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._inside += size
        self._update(every=0.25)

    def part_done(self, task: _Task) -> None:
        self._parts += task.part.size
        # Characters were counted on the way, bytes are known now.
        self._inside = max(0, self._inside - task.part.size)
        self._update(every=0.25)

    def finish(self) -> None:
        # Once more: what workers reported may have come after their last part was done.
        self._update(every=0.0)

    def drain(self, reports: Any) -> None:
        while True:
            try:
                self.add(*reports.get_nowait())
            except Empty:
                return

    def _update(self, *, every: float) -> None:
        now = time.monotonic()
        if self._show is None or now - self._shown < every:
            return
        self._shown = now
        self._done = max(self._done, min(1.0, (self._parts + self._inside) / self._total))
        self._show(Progress(self._done, self._documents, self._tokens, now - self._begin))


def _manifest(
    tasks: list[_Task], tokenizer: Tokenizer, settings: dict[str, Any], unread: Skipped
) -> Manifest:
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    skipped = unread
    for task in tasks:
        records = _records(task.output, task.part.key)
        skipped.update(Skipped(Counter(records[-1].skipped), records[-1].skipped_files))
        for record in records:
            for split, shard in record.splits.items():
                if shard.documents:
                    splits[split].append(shard)
    manifest = Manifest(
        dtype=tasks[0].dtype,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        splits={split: tuple(shards) for split, shards in splits.items()},
        skipped=dict(skipped.counts),
        skipped_files=skipped.files,
        settings=settings,
    )
    if not manifest.documents:
        reasons = "; ".join(skipped.lines())
        raise DataError(
            f"{tasks[0].output}: no document in the sources (skipped: {reasons or 'none'})"
        )
    return manifest
