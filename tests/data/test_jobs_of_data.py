"""The three thin jobs over this room: prepare, inspect, tokenizer."""

import shutil
import subprocess
import sys

import pytest

from minilm_jax.data.sources import TextSource
from minilm_jax.errors import DataError
from minilm_jax.jobs import inspect, prepare, tokenizer


def test_a_vocabulary_a_corpus_and_a_look_into_it(tmp_path, english):
    (tmp_path / "en.txt").write_text("\n".join(t.replace("\n", " ") for t in english[:100]))
    source = TextSource(paths=(str(tmp_path / "en.txt"),), documents="line", language_from="file")
    lines = []
    made = tokenizer.run(
        tokenizer.TokenizerConfig(source=source, output=tmp_path / "vocab", vocab_size=900),
        say=lines.append,
    )
    preparing = prepare.PrepareConfig(
        source=source,
        tokenizer=tmp_path / "vocab",
        output=tmp_path / "corpus",
        workers=0,
        heldout=0.1,
    )
    first, again = [], []
    manifest = prepare.run(preparing, say=first.append)
    prepare.run(preparing, say=again.append)
    done, *rest = again
    assert done.endswith("corpus is finished and undamaged; nothing to do.") and rest == first
    shard = next((tmp_path / "corpus/train").glob("*.tokens"))
    right = shard.read_bytes()
    shard.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with pytest.raises(DataError, match=r"is missing or not what prepare wrote; copy it again"):
        prepare.run(preparing, say=again.append)
    shard.write_bytes(right)
    own = tmp_path / "corpus/tokenizer"
    kept = own.rename(tmp_path / "kept")
    own.mkdir()
    (own / "vocab.txt").write_text((kept / "vocab.txt").read_text() + "another\n")
    with pytest.raises(DataError, match=r"tokenizer: is not the one that this corpus was made"):
        prepare.run(preparing, say=again.append)
    shutil.rmtree(own)
    kept.rename(own)
    lines += first
    found = inspect.run(
        inspect.InspectConfig(corpus=tmp_path / "corpus", sequence_length=64, rows=2),
        say=lines.append,
    )
    text = "\n".join(lines)
    assert manifest.documents == 100 and found.documents < 100
    assert made.fingerprint == manifest.tokenizer_fingerprint
    assert list(found.languages) == ["en"] and found.languages["en"].tokens == found.tokens
    assert found.efficiency > 0.9
    assert len(found.rows) == 2 and all(row.startswith("[CLS]") for row in found.rows)
    assert f"train    {found.documents:>14,} documents" in text
    assert f"documents   {found.documents} in train; {100 - found.documents} in heldout" in text
    assert "uint16, 1 shard)" in text and "row 1" in text and "en: " in text


@pytest.mark.parametrize(
    "module",
    ["batches", "corpus", "inspection", "masking", "prefetch", "prepare", "tokenizer_training"],
)
def test_the_room_loads_neither_jax_nor_transformers(module):
    """Worker processes start in a fraction of a second because of it."""
    code = (
        f"import sys, minilm_jax.data.{module};"
        "bad = {'jax', 'flax', 'transformers', 'tensorflow', 'pyarrow'} & set(sys.modules);"
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_options_are_parsed_into_configs(tmp_path):
    tyro = pytest.importorskip("tyro")
    command = ["--source.paths", "a", "b", "--tokenizer", "t", "--output", "o", "--workers", "3"]
    config = tyro.cli(prepare.PrepareConfig, args=command, config=(tyro.conf.AvoidSubcommands,))
    assert config.source == TextSource(paths=("a", "b")) and config.workers == 3
    assert config.heldout > 0  # or the corpus is refused by `distill`
    command = ["--source.format", "machine-docs", "--output", "o", "--kind", "sentencepiece"]
    assert tyro.cli(tokenizer.TokenizerConfig, args=command).source.paths == ()
    assert tyro.cli(inspect.InspectConfig, args=["c"]).split == "train"
