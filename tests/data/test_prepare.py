import dataclasses
import errno
import fcntl
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minilm_jax import atomic
from minilm_jax.data import prepare as prepare_module
from minilm_jax.data import sources as sources_module
from minilm_jax.data.corpus import Corpus, ShardWriter
from minilm_jax.data.documents import Document
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource
from minilm_jax.data.tokenizer_training import train_wordpiece
from minilm_jax.data.tokenizers import load_tokenizer
from minilm_jax.errors import DataError


@pytest.fixture(scope="module")
def vocabulary(english, tmp_path_factory):
    """A small WordPiece folder: BERT's own takes half a second to load, and each run loads two."""
    folder = tmp_path_factory.mktemp("vocabulary") / "small"
    train_wordpiece((Document(t) for t in english[:50]), output=folder, vocab_size=400)
    return folder


def one_paragraph(text):
    return "\n".join(line for line in text.splitlines() if line.strip()).strip()


@pytest.fixture
def text(tmp_path, english, monkeypatch):
    """A folder of text in about ten parts."""
    monkeypatch.setattr(sources_module, "_SMALLEST_PART", 20_000)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # most of the time of these tests
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        documents = [one_paragraph(t) for t in english[i * 25 : (i + 1) * 25]]
        (folder / f"{i}.txt").write_text("\n\n".join(documents))
    return TextSource(paths=(str(folder),), language="en")


def files(folder):
    """Everything that was written, by relative path."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def test_a_corpus_holds_the_documents_in_order(text, vocabulary, tmp_path, english):
    manifest = prepare(text, tokenizer=vocabulary, output=tmp_path / "out", workers=0)
    corpus = Corpus.open(tmp_path / "out", verify="hashes")
    expected = load_tokenizer(vocabulary).encode([one_paragraph(t) for t in english[:100]])
    assert len(corpus) == 100 == manifest.documents
    assert corpus.manifest == manifest
    assert corpus.num_tokens == sum(map(len, expected)) == manifest.tokens
    assert corpus.lengths.tolist() == list(map(len, expected))
    assert corpus.languages == ("en",) and set(corpus.document_languages) == {0}
    for i, ids in enumerate(expected):
        np.testing.assert_array_equal(corpus.document(i), ids)
    assert corpus.document(0).dtype == np.uint16
    with pytest.raises(IndexError):
        corpus.document(100)


def test_holding_out_is_a_function_of_the_text(text, vocabulary, tmp_path):
    for name in ("a", "b"):
        prepare(text, tokenizer=vocabulary, output=tmp_path / name, workers=0, holdout_fraction=0.3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    train, heldout = (Corpus.open(tmp_path / "a", split=s) for s in ("train", "heldout"))
    assert len(train) + len(heldout) == 100 and 15 < len(heldout) < 45
    in_train = {train.document(i).tobytes() for i in range(len(train))}
    assert not in_train & {heldout.document(i).tobytes() for i in range(len(heldout))}
    assert train.fingerprint != heldout.fingerprint


def test_a_second_run_does_nothing_and_other_settings_are_refused(text, vocabulary, tmp_path):
    out = tmp_path / "out"
    first = prepare(text, tokenizer=vocabulary, output=out, workers=0)
    before = files(out)
    assert prepare(text, tokenizer=vocabulary, output=out, workers=0) == first
    assert files(out) == before
    with pytest.raises(DataError, match=r"other settings \(heldout: 0\.0 -> 0\.1\)"):
        prepare(text, tokenizer=vocabulary, output=out, workers=0, holdout_fraction=0.1)
    (tmp_path / "text" / "0.txt").write_text("another text")
    with pytest.raises(DataError, match="have changed since"):
        prepare(text, tokenizer=vocabulary, output=out, workers=0)
    assert files(out) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_the_corpus_does_not_depend_on_the_workers(text, vocabulary, tmp_path, workers):
    seen = []
    prepare(text, tokenizer=vocabulary, output=tmp_path / "alone", workers=0)
    prepare(
        text, tokenizer=vocabulary, output=tmp_path / "many", workers=workers, progress=seen.append
    )
    assert files(tmp_path / "alone") == files(tmp_path / "many")
    assert seen[-1].done == 1.0 and seen[-1].documents == 100
    assert [p.done for p in seen] == sorted(p.done for p in seen)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 5, 17])
def test_an_interrupted_run_goes_on_without_losing_or_repeating(
    text, vocabulary, tmp_path, monkeypatch, at
):
    """`at` shards are finished, then the process stops in the midst of the next one."""
    settings = {"tokenizer": vocabulary, "workers": 0, "shard_tokens": 1500}
    prepare(text, output=tmp_path / "whole", **settings)
    finish = ShardWriter.finish
    done = []

    def stopping(self):
        if len(done) == at:
            raise StoppedError
        done.append(self)
        return finish(self)

    monkeypatch.setattr(ShardWriter, "finish", stopping)
    with pytest.raises(StoppedError):
        prepare(text, output=tmp_path / "cut", **settings)
    with pytest.raises(DataError, match="is unfinished"):
        Corpus.open(tmp_path / "cut")
    kept = len(list((tmp_path / "cut" / "records").glob("*"))) if at else 0
    assert kept == at
    monkeypatch.setattr(ShardWriter, "finish", lambda s: done.append(s) or finish(s))
    prepare(text, output=tmp_path / "cut", **settings)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(done) == len(list((tmp_path / "whole" / "records").glob("*")))


def test_a_full_disk_is_a_sentence_and_keeps_what_was_prepared(
    text, vocabulary, tmp_path, monkeypatch
):
    write = atomic.write_synced
    left = [12]

    def filling(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    settings = {"tokenizer": vocabulary, "output": tmp_path / "out", "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_synced", filling)
        with pytest.raises(DataError, match=r"No space left.*finished shards are kept"):
            prepare(text, **settings)
    kept = files(tmp_path / "out")
    assert not any(name.endswith(".unfinished") for name in kept)
    assert any(name.startswith("records/") for name in kept)
    prepare(text, **settings)
    after = files(tmp_path / "out")
    assert all(after[name] == content for name, content in kept.items())


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    text, vocabulary, tmp_path, monkeypatch
):
    usage = shutil._ntuple_diskusage(1000, 1000, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        DataError, match=r" \d{2,3} kB of text need at least [1-9]\d* kB, and 0 bytes are free"
    ):
        prepare(text, tokenizer=vocabulary, output=tmp_path / "out", workers=0)
    assert not (tmp_path / "out" / "records").exists()


def test_a_script_without_its_guard_is_told_so(text, vocabulary, tmp_path):
    """Its workers run it once more."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from minilm_jax.data.prepare import prepare\n"
        "from minilm_jax.data.sources import TextSource\n"
        f"prepare({text!r}, tokenizer=Path({str(vocabulary)!r}), output=Path('out'), workers=1)\n"
    )
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    in_worker, here = done.stderr.split("BrokenProcessPool")[0], done.stderr.splitlines()[-1]
    assert 'put what it does under `if __name__ == "__main__":`' in in_worker
    assert 'a script without `if __name__ == "__main__":`' in here


def test_a_killed_worker_is_a_sentence_and_costs_only_its_shard(text, vocabulary, tmp_path):
    records = tmp_path / "out" / "records"

    def kill_one(progress):
        while not list(records.glob("*.json")):
            time.sleep(0.001)
        for child in multiprocessing.active_children()[:1]:
            child.kill()

    settings = {"tokenizer": vocabulary, "output": tmp_path / "out"}
    with pytest.raises(DataError, match="a worker process was killed"):
        prepare(text, workers=1, progress=kill_one, **settings)
    assert list(records.glob("*.json"))
    prepare(text, workers=0, **settings)
    assert len(Corpus.open(tmp_path / "out")) == 100


def test_two_processes_on_one_folder_are_refused(text, vocabulary, tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing this folder"):
            prepare(text, tokenizer=vocabulary, output=tmp_path / "out", workers=0)


def test_a_flipped_byte_is_found_and_mended_by_preparing_again(text, vocabulary, tmp_path):
    out = tmp_path / "out"
    prepare(text, tokenizer=vocabulary, output=out, workers=0)
    before = files(out)
    for ending in ("tokens", "offsets", "languages"):
        path = max(out.glob(f"train/*.{ending}"), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            Corpus.open(out)
        path.unlink()
        with pytest.raises(DataError, match=path.name):
            Corpus.open(out, verify="sizes")
        (out / "manifest.json").unlink()
        prepare(text, tokenizer=vocabulary, output=out, workers=0)
        assert files(out) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_damaged_manifest_is_a_sentence(text, vocabulary, tmp_path, content):
    out = tmp_path / "out"
    prepare(text, tokenizer=vocabulary, output=out, workers=0)
    (out / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="manifest"):
        Corpus.open(out)


def test_one_broken_file_stops_nothing_else_and_can_be_mended(text, vocabulary, tmp_path):
    out = tmp_path / "out"
    broken = tmp_path / "text" / "2b.txt.gz"
    whole = gzip.compress(b"\n\n".join(b"document %d" % i for i in range(4000)))
    broken.write_bytes(whole[:-50])
    with pytest.raises(DataError, match=r"2b\.txt\.gz.*finished shards are kept"):
        prepare(text, tokenizer=vocabulary, output=out, workers=0)
    before = {k: v for k, v in files(out).items() if k.startswith("train/")}
    assert before
    broken.write_bytes(whole)
    manifest = prepare(text, tokenizer=vocabulary, output=out, workers=0)
    after = files(out)
    assert manifest.documents == 4100 and not manifest.skipped
    assert all(after[name] == content for name, content in before.items())


def test_a_broken_file_can_be_kept_as_far_as_it_goes(text, vocabulary, tmp_path):
    whole = gzip.compress(b"\n\n".join(b"document %d" % i for i in range(4000)))
    (tmp_path / "text" / "2b.txt.gz").write_bytes(whole[:-50])
    keeping = dataclasses.replace(text, broken_files="keep")
    manifest = prepare(keeping, tokenizer=vocabulary, output=tmp_path / "out", workers=0)
    assert 2000 < manifest.documents < 4100
    assert manifest.skipped == {"broken file": 1}


def test_skipped_documents_are_counted_once_through_an_interruption(
    vocabulary, tmp_path, monkeypatch
):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n".join([b"good text", b"br\xffken", b"\xe2\x80\x8b"] * 40))
    source = TextSource(paths=(str(path),))
    monkeypatch.setattr(prepare_module, "_CHUNK_CHARACTERS", 30)
    settings = {"tokenizer": vocabulary, "workers": 0, "shard_tokens": 10}
    whole = prepare(source, output=tmp_path / "whole", **settings)
    assert whole.documents == 40
    assert whole.skipped == {"broken utf-8": 40, "no tokens": 40}
    record = sorted((tmp_path / "whole" / "records").glob("*"))[3:]
    for p in [tmp_path / "whole" / "manifest.json", *record]:
        p.unlink()
    assert prepare(source, output=tmp_path / "whole", **settings) == whole


def test_sources_without_any_document_are_refused(vocabulary, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match="no document in the sources"):
        prepare(
            TextSource(paths=(str(tmp_path / "a.txt"),)),
            tokenizer=vocabulary,
            output=tmp_path / "out",
            workers=0,
        )


def test_a_folder_without_a_finished_shard_takes_other_settings(
    text, english, vocabulary, tmp_path
):
    (tmp_path / "text" / "0.txt").rename(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in english[:20]))
    (tmp_path / "empty.jsonl").write_text("")
    right = TextSource(paths=(str(tmp_path / "a.jsonl"),))
    other = tmp_path / "other"
    train_wordpiece((Document(t) for t in english[:50]), output=other, vocab_size=300)
    (other / "tokenizer.json").unlink()
    for wrong in (
        dataclasses.replace(right, text_column="txt"),
        dataclasses.replace(right, paths=(str(tmp_path / "empty.jsonl"),)),
    ):
        out = tmp_path / "out"
        with pytest.raises(DataError, match=r"no column 'txt'|no document in the sources"):
            prepare(wrong, tokenizer=vocabulary, output=out, workers=0)
        prepare(right, tokenizer=other, output=out, workers=0)
        with pytest.raises(
            DataError, match=r"settings \(source\.(paths|text_column): [^;]*; token"
        ):
            prepare(wrong, tokenizer=vocabulary, output=out, workers=0)
        prepare(right, tokenizer=other, output=tmp_path / "new", workers=0)
        assert files(out) == files(tmp_path / "new")
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "new")


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"workers": -1}, "workers is -1: give 0, to work in this process, or more"),
        ({"shard_tokens": 0}, "shard_tokens is 0: give at least 1"),
        ({"holdout_fraction": 1.5}, "heldout is 1.5: give a share from 0 to below 1"),
    ],
)
def test_a_setting_out_of_range_is_named(text, vocabulary, tmp_path, settings, message):
    with pytest.raises(DataError, match=f"^{message}$"):
        prepare(text, tokenizer=vocabulary, output=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_a_sentence(text, vocabulary, tmp_path):
    (tmp_path / "out" / ".lock").mkdir(parents=True)
    with pytest.raises(DataError, match=r"out: cannot be written to \(Is a directory\)"):
        prepare(text, tokenizer=vocabulary, output=tmp_path / "out", workers=0)


def test_a_folder_with_other_files_is_left_alone(text, vocabulary, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"holds other files \(thesis\.txt\)"):
        prepare(text, tokenizer=vocabulary, output=tmp_path / "home", workers=0)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("output", ["text/out", "text/deep/out", "link/out", "text"])
def test_a_corpus_does_not_lie_in_its_own_text(text, vocabulary, tmp_path, output):
    """Its tokenizer's vocab.txt would be read as text by the next run."""
    (tmp_path / "link").symlink_to(tmp_path / "text")
    before = files(tmp_path / "text")
    with pytest.raises(DataError, match=r"lies in .*text, where its files would be read"):
        prepare(text, tokenizer=vocabulary, output=tmp_path / output, workers=0)
    assert files(tmp_path / "text") == before
    # Nor where a pattern would find it the next time.
    matched = TextSource(paths=(str(tmp_path / "text" / "*"),))
    with pytest.raises(DataError, match=r"out matches .*text/\*, so its files would be read as"):
        prepare(matched, tokenizer=vocabulary, output=tmp_path / "text" / "out", workers=0)
    assert not (tmp_path / "text" / "out").exists()


@pytest.mark.parametrize("documents", [1, 2, 5, 30])
def test_a_small_text_holds_out_a_document(vocabulary, tmp_path, english, documents):
    """Unless it has but one; where the share holds out some, those and no others."""
    folder, out = tmp_path / "text", tmp_path / "out"
    folder.mkdir()
    for i, document in enumerate(english[:documents]):
        (folder / f"{i}.md").write_text(document)
    source, settings = TextSource(paths=(str(folder),)), {"tokenizer": vocabulary, "workers": 0}
    prepare(source, output=out, holdout_fraction=1e-6, **settings)
    sizes = [len(Corpus.open(out, split=split)) for split in ("train", "heldout")]
    assert sizes == ([1, 0] if documents == 1 else [documents - 1, 1])
    held = sum(prepare_module._unit_hash(document) < 0.5 for document in english[:documents])
    prepare(source, output=tmp_path / "half", holdout_fraction=0.5, **settings)
    assert len(Corpus.open(tmp_path / "half", split="heldout")) == max(held, documents > 1)


def test_equal_documents_are_not_divided_to_hold_one_out(vocabulary, tmp_path, english):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.md").write_text(english[0])
    source, out = TextSource(paths=(str(folder),)), tmp_path / "out"
    prepare(source, tokenizer=vocabulary, output=out, workers=0, holdout_fraction=1e-6)
    assert len(Corpus.open(out)) == 3


def test_files_that_hold_no_text_are_counted(text, vocabulary, tmp_path):
    for name in ("figure.png", "notes", "page.mdx", "dataset_info.json", ".hidden"):
        (tmp_path / "text" / name).write_text("something")
    (tmp_path / "text" / "again.png").symlink_to(tmp_path / "text" / "figure.png")
    manifest = prepare(text, tokenizer=vocabulary, output=tmp_path / "out", workers=0)
    assert manifest.skipped == {"file of another kind": 3}


# A file: the worker runs it too, for its small chunks.
STOPPED = """
import sys
from minilm_jax import cli
from minilm_jax.data import prepare
prepare._CHUNK_CHARACTERS = 2_000
if __name__ == "__main__":
    sys.exit(cli.main(["prepare", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    "signum,send,begun,status",
    [
        (signal.SIGTERM, os.kill, True, 75),
        (signal.SIGINT, os.killpg, True, 130),
        (signal.SIGINT, os.killpg, False, 130),
    ],
)
def test_a_signal_ends_the_run_in_order(
    text, vocabulary, tmp_path, monkeypatch, signum, send, begun, status
):
    """Whether the worker works or is about to; a terminal sends SIGINT to it as well."""
    out = tmp_path / "out"
    (tmp_path / "stopped.py").write_text(STOPPED)
    options = {"source.paths": text.paths[0], "source.language": "en", "tokenizer": vocabulary}
    options |= {"output": out, "workers": 1, "shard-tokens": 500, "heldout": 0}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    child = subprocess.Popen(
        [sys.executable, tmp_path / "stopped.py", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children")
    # The worker, beside a process that keeps account of semaphores.
    while len(children.read_text().split()) < 2 or (begun and not list(out.glob("records/*.json"))):
        time.sleep(0.001)
    time.sleep(0 if begun else 0.1)  # amid the worker's imports
    send(child.pid, signum)
    _, said = child.communicate(timeout=60)
    name = signal.Signals(signum).name
    assert said == f"minilm-jax: stopped by {name}; run the same command to continue\n"
    assert child.returncode == status
    assert not any('"last": true' in path.read_text() for path in out.glob("records/*.json"))
    assert not list(out.rglob("*.unfinished"))
    monkeypatch.setattr(sources_module, "_SMALLEST_PART", 1 << 20)
    monkeypatch.setattr(prepare_module, "_CHUNK_CHARACTERS", 2_000)
    again = {"tokenizer": vocabulary, "workers": 0, "shard_tokens": 500}
    assert prepare(text, output=out, **again) == prepare(text, output=tmp_path / "whole", **again)
    assert files(out) == files(tmp_path / "whole")


# Small parts, chunks and shards: about three hundred files to be killed between.
CHILD = """
import sys
from minilm_jax.data import prepare, sources
sources._SMALLEST_PART = 20_000
prepare._CHUNK_CHARACTERS = 2_000
prepare.prepare(
    sources.TextSource(paths=(sys.argv[1],), language="en"),
    tokenizer=sys.argv[2], output=sys.argv[3], workers=int(sys.argv[4]), shard_tokens=500,
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_process_loses_no_finished_shard(text, vocabulary, tmp_path, workers):
    def start(output):
        arguments = [text.paths[0], vocabulary, output, workers]
        return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)])

    assert start(tmp_path / "whole").wait() == 0
    cut = tmp_path / "cut"
    kills = 0
    for wanted in (1, 3, 10, 30, 60, 1000):
        child = start(cut)
        while child.poll() is None and len(list(cut.glob("records/*.json"))) < wanted:
            time.sleep(0.001)
        child.kill()
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 3
    assert start(cut).wait() == 0
    assert files(cut) == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_counted_in_bounded_memory(vocabulary, tmp_path):
    import resource

    with (tmp_path / "a.txt").open("wb") as file:
        file.write(b"before\n\n")
        for _ in range(1024):
            file.write(b"x " * (1 << 19))
        file.write(b"\n\nafter\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = TextSource(paths=(str(tmp_path / "a.txt"),))
    manifest = prepare(source, tokenizer=vocabulary, output=tmp_path / "out", workers=0)
    assert manifest.documents == 2 and manifest.skipped == {"too long": 1}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10
