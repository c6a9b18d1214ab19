"""How fast text becomes a token corpus, compared with common tokenizers.

    python benchmarks/data_preparing.py --tokenizer FOLDER # a BERT folder, about 5 minutes
    pip install datasets          # for its row, which is left out otherwise

The text is the docstrings of every Python package in this environment: natural English and code,
each text once. The ways take turns; the best of three rounds counts.
"""

import argparse
import ast
import os
import platform
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import tokenizers as rust

from minilm_jax.data.documents import Document
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource
from minilm_jax.data.tokenizer_training import train_sentencepiece
from minilm_jax.data.tokenizers import load_tokenizer


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = docstrings(arguments.megabytes << 20)
        (folder / "text.txt").write_text("\n\n".join(texts), "utf-8")
        size = sum(len(text.encode()) for text in texts)
        print(f"{size / 1e6:.1f} MB in {len(texts):,} documents; {environment()}")
        documents = (Document(text) for text in texts[:4000])
        train_sentencepiece(documents, output=folder / "xlmr", vocab_size=8000)
        for title, tokenizer in (
            ("WordPiece", arguments.tokenizer),
            ("SentencePiece, 8,000 pieces", folder / "xlmr"),
        ):
            table(title, tokenizer, folder, texts, arguments.workers)


def table(title: str, tokenizer: Path, folder: Path, texts: list[str], workers: int) -> None:
    """Prints the rates of every way for one tokenizer."""
    tokens = sum(len(ids) for ids in load_tokenizer(tokenizer).encode(texts))
    ways = {
        f"ours: prepare, {workers} processes, text file to checked corpus": lambda: ours(
            tokenizer, folder, workers
        ),
        **transformers_ways(tokenizer, texts),
        **datasets_ways(tokenizer, folder, workers),
    }
    if (tokenizer / "tokenizer.json").is_file():
        ways["tokenizers encode_batch_fast, all cores, ids left in Rust"] = lambda: fast(
            tokenizer, texts
        )
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(3):
        for name, way in ways.items():
            best[name] = min(best[name], way())
    print(f"\n{title}, {tokens:,} tokens\n\n| way | M tokens/s | of ours |\n|---|---|---|")
    first = next(iter(best.values()))
    for name, seconds in best.items():
        print(f"| {name} | {tokens / seconds / 1e6:.2f} | {first / seconds:.2f} |")
    sys.stdout.flush()


def docstrings(limit: int) -> list[str]:
    """Returns the distinct docstrings of the installed packages, in the order of their paths."""
    found: dict[str, None] = {}
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            continue
        parts = [
            text
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and (text := ast.get_docstring(node))
        ]
        # One document a file, its paragraphs joined, as a page of prose would be.
        lines = (line for line in "\n".join(parts).splitlines() if line.strip())
        text = "\n".join(lines).encode("utf-8", "replace").decode()
        if len(text) > 200 and text not in found:
            found[text] = None
            size += len(text)
        if size > limit:
            break
    return list(found)


def ours(tokenizer: Path, folder: Path, workers: int) -> float:
    """Returns the seconds of the whole command: start of the processes to the synced manifest."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        begin = time.perf_counter()
        prepare(
            TextSource(paths=(str(folder / "text.txt"),)),
            tokenizer=tokenizer,
            output=Path(output) / "corpus",
            workers=workers,
        )
        return time.perf_counter() - begin


def fast(tokenizer: Path, texts: list[str]) -> float:
    """Returns the seconds of the Rust encoder alone: no reading, no writing, no arrays."""
    encoder = rust.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encoder.no_padding()
    encoder.no_truncation()
    begin = time.perf_counter()
    for first in range(0, len(texts), 1000):
        encoder.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
    return time.perf_counter() - begin


def transformers_ways(tokenizer: Path, texts: list[str]) -> dict[str, Callable[[], float]]:
    """Returns the call that most scripts make, without its start-up."""
    from transformers import AutoTokenizer

    called = AutoTokenizer.from_pretrained(tokenizer)

    def way() -> float:
        begin = time.perf_counter()
        for first in range(0, len(texts), 1000):
            called(texts[first : first + 1000], add_special_tokens=False, verbose=False)
        return time.perf_counter() - begin

    return {"transformers tokenizer(texts), all cores, nothing written": way}


def datasets_ways(tokenizer: Path, folder: Path, workers: int) -> dict[str, Callable[[], float]]:
    """Returns `map` over the same file, written to disk as datasets does."""
    try:
        import datasets
    except ImportError:
        return {}
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    called = AutoTokenizer.from_pretrained(tokenizer)
    lines = (folder / "text.txt").read_text("utf-8").split("\n\n")

    def way() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as output:
            table = datasets.Dataset.from_dict({"text": lines})
            begin = time.perf_counter()
            mapped = table.map(
                lambda rows: {
                    "ids": called(rows["text"], add_special_tokens=False, verbose=False)[
                        "input_ids"
                    ]
                },
                batched=True,
                remove_columns=["text"],
                num_proc=workers,
                load_from_cache_file=False,
                new_fingerprint=f"run{time.time_ns()}",
            )
            mapped.save_to_disk(output)
            return time.perf_counter() - begin

    return {f"datasets map(batched), {workers} processes, saved to disk": way}


def environment() -> str:
    """Returns what the figures depend on."""
    import transformers

    versions = [f"Python {platform.python_version()}", f"tokenizers {rust.__version__}"]
    versions.append(f"transformers {transformers.__version__}")
    try:
        import datasets

        versions.append(f"datasets {datasets.__version__}")
    except ImportError:
        versions.append("datasets not installed")
    return ", ".join(versions)


if __name__ == "__main__":
    main()
