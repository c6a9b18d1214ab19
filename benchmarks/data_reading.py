"""How fast batches are read, compared with common alternatives.

    python benchmarks/data_reading.py # 60 M tokens, about 2 minutes
    pip install grain                 # for its rows, which are left out otherwise

Every way reads the same documents (log-normal lengths: median 148 tokens, mean about 300) from
the page cache into int32 rows of 512. The ways take turns; the best of three rounds counts.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilm_jax.data.batches import BatchConfig, Batches
from minilm_jax.data.corpus import Corpus, Manifest, Shard, ShardWriter
from minilm_jax.data.prefetch import Prefetch
from minilm_jax.data.tokenizers import Tokenizer

LENGTH, BATCH = 512, 32


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60_000_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = stand_in_tokenizer()
        corpus = write_corpus(Path(folder), tokenizer, arguments.tokens)
        ways = {**our_ways(corpus, tokenizer), **numpy_ways(corpus), **grain_ways(corpus)}
        best = dict.fromkeys(ways, 0.0)
        for _ in range(3):
            for name, way in ways.items():
                best[name] = max(best[name], tokens_per_second(way(), arguments.seconds))
        print(f"{corpus.num_tokens:,} tokens in {len(corpus):,} documents; {environment()}\n")
        print("| way | M tokens/s | of ours |\n|---|---|---|")
        ours = next(iter(best.values()))
        for name, rate in best.items():
            print(f"| {name} | {rate / 1e6:.1f} | {rate / ours:.2f} |")
        print()
        figures(corpus, tokenizer)


def stand_in_tokenizer() -> Tokenizer:
    """Returns special ids and a vocabulary of BERT's size; no text is encoded here."""
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    return Tokenizer(
        kind="wordpiece",
        pieces=[*names, *(f"piece{i}" for i in range(30_517))],
        special_names=("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"),
        encode=lambda texts: [np.zeros(0, np.uint32) for _ in texts],
        locate=lambda texts: [],
        decode=str,
        files=(Path("none/vocab.txt"),),
        separators_in_pair=1,
    )


def write_corpus(folder: Path, tokenizer: Tokenizer, tokens: int) -> Corpus:
    """Returns a corpus of random tokens with natural lengths."""
    rng = np.random.default_rng(0)
    shards: list[Shard] = []
    total = 0
    while total < tokens:
        writer = ShardWriter(folder / "train", f"{len(shards)}", "uint16")
        while writer.tokens < tokens / 8:
            length = int(np.exp(rng.normal(5.0, 1.2))) + 1
            writer.add(rng.integers(5, 30_000, length, np.uint32), "en")
        total += writer.tokens
        shards.append(writer.finish())
    manifest = Manifest(
        dtype="uint16",
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokenizer_kind="wordpiece",
        vocab_size=tokenizer.vocab_size,
        splits={"train": tuple(shards), "heldout": ()},
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return Corpus.open(folder)


Way = Callable[[], Iterator[np.ndarray]]


def our_ways(corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Way]:
    """Returns our packed and padded batches, in this thread and prefetched."""

    def batches(size: int, **shape: object) -> Batches:
        config = BatchConfig(batch_size=size, sequence_length=LENGTH, **shape)  # type: ignore[arg-type]
        made = Batches([corpus], config, seed=0, tokenizer=tokenizer)
        made.at(0)  # lays out the epoch
        return made

    packed, large = batches(BATCH), batches(256)
    bucketed = batches(BATCH, layout="padded", buckets=(64, 128, 256))

    def read(made: Batches, workers: int) -> Iterator[np.ndarray]:
        with Prefetch(made.at, workers=workers, ahead=4) as stream:
            for batch in stream:
                yield batch["input_ids"][batch["segments"] > 0]

    return {
        "ours, packed, batch 32": lambda: read(packed, 0),
        "ours, packed, batch 256": lambda: read(large, 0),
        "ours, packed, batch 256, 2 threads": lambda: read(large, 2),
        "ours, padded to buckets of 64 to 512": lambda: read(bucketed, 0),
    }


def numpy_ways(corpus: Corpus) -> dict[str, Way]:
    """Returns the ceiling: fixed blocks of one array, no document boundaries."""
    tokens = np.concatenate([corpus.tokens(i) for i in range(len(corpus.manifest.splits["train"]))])
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)

    def read() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        while True:
            yield blocks[rng.integers(0, len(blocks), BATCH)].astype(np.int32)

    return {"numpy, fixed blocks by fancy indexing (no boundaries)": read}


def grain_ways(corpus: Corpus) -> dict[str, Way]:
    """Returns grain's packers and its block path, as its documentation has them."""
    try:
        import grain
        from grain import experimental
    except ImportError:
        return {}

    class Documents:
        def __len__(self) -> int:
            return len(corpus)

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"ids": corpus.document(int(index)).astype(np.int32)}

    class Blocks:
        def __init__(self) -> None:
            count = len(corpus.manifest.splits["train"])
            self._tokens = np.concatenate([corpus.tokens(i) for i in range(count)])

        def __len__(self) -> int:
            return len(self._tokens) // LENGTH

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"ids": self._tokens[index * LENGTH : (index + 1) * LENGTH].astype(np.int32)}

    still = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

    def documents() -> Any:
        shuffled = grain.MapDataset.source(Documents()).seed(0).shuffle().repeat(None)
        return shuffled.to_iter_dataset(still)

    def split() -> Iterator[np.ndarray]:
        packed = experimental.ConcatThenSplitIterDataset(documents(), length_struct={"ids": LENGTH})
        for batch in packed.batch(BATCH):
            ids = batch["ids"]
            yield ids[batch["ids_segment_ids"] > 0] if "ids_segment_ids" in batch else ids

    def first_fit() -> Iterator[np.ndarray]:
        cut = documents().map(lambda d: {"ids": d["ids"][:LENGTH]})
        packed = experimental.FirstFitPackIterDataset(
            cut, length_struct={"ids": LENGTH}, num_packing_bins=BATCH
        )
        for batch in packed.batch(BATCH):
            yield batch["ids"][batch["ids_segment_ids"] > 0]

    def blocks() -> Iterator[np.ndarray]:
        shuffled = grain.MapDataset.source(Blocks()).seed(0).shuffle().repeat(None)
        for batch in shuffled.batch(BATCH, drop_remainder=True).to_iter_dataset(still):
            yield batch["ids"]

    return {
        "grain ConcatThenSplit": split,
        "grain FirstFitPack, 32 bins (cuts documents at 512)": first_fit,
        "grain, fixed blocks (no boundaries)": blocks,
    }


def tokens_per_second(batches: Iterator[np.ndarray], seconds: float) -> float:
    """Returns tokens of text, padding not counted."""
    next(batches)
    tokens, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        tokens += next(batches).size
    close = getattr(batches, "close", None)
    if close:
        close()
    return tokens / elapsed


def figures(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Prints what packing gains and costs, and how long steps of 0.1 s wait for data."""
    print("| row length | packing efficiency | padded, one document a row | laying out an epoch |")
    print("|---|---|---|---|")
    for length in (128, 512):
        config = BatchConfig(batch_size=256, sequence_length=length)
        batches = Batches([corpus], config, seed=0, tokenizer=tokenizer)
        begin = time.perf_counter()
        batches.at(0)
        laying = time.perf_counter() - begin
        padded = BatchConfig(batch_size=256, sequence_length=length, layout="padded")
        share = Batches([corpus], padded, seed=0, tokenizer=tokenizer).efficiency
        print(f"| {length} | {batches.efficiency:.2%} | {share:.1%} | {laying:.2f} s |")
    batches = Batches(
        [corpus], BatchConfig(batch_size=256, sequence_length=512), seed=0, tokenizer=tokenizer
    )
    batches.at(0)
    with Prefetch(batches.at, workers=1, stop=101) as stream:
        next(stream)
        stream.data_wait_s, begin = 0.0, time.perf_counter()
        for _ in stream:
            time.sleep(0.1)
        share = stream.data_wait_s / (time.perf_counter() - begin)
    print(f"\nWaiting for data, batches of 256 × 512, steps of 0.1 s (1.3 M tokens/s): {share:.2%}")


def environment() -> str:
    """Returns what the figures depend on."""
    versions = [f"Python {platform.python_version()}", f"numpy {np.__version__}"]
    try:
        import grain

        versions.append(f"grain {grain.__version__}")
    except ImportError:
        versions.append("grain not installed")
    return ", ".join(versions)


if __name__ == "__main__":
    main()
