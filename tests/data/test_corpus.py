import numpy as np
import pytest

from minilm_jax.data import corpus as module
from minilm_jax.data.corpus import Corpus, Manifest, ShardWriter
from minilm_jax.data.prepare import prepare
from minilm_jax.data.sources import TextSource
from minilm_jax.errors import DataError


def test_large_vocabularies_take_four_bytes(tmp_path):
    writer = ShardWriter(tmp_path / "train", "0", "uint32")
    writer.add(np.asarray([250_001, 5, 70_000], np.uint32), "sw")
    shard = writer.finish()
    manifest = Manifest(
        dtype="uint32",
        tokenizer_fingerprint="",
        tokenizer_kind="sentencepiece",
        vocab_size=250_002,
        splits={"train": (shard,), "heldout": ()},
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    corpus = Corpus.open(tmp_path, verify="hashes")
    assert corpus.document(0).tolist() == [250_001, 5, 70_000]
    assert corpus.document(0).dtype == np.uint32


def test_every_document_keeps_its_language(xlmr_folder, tmp_path):
    for code, count in (("de", 3), ("ar", 2), ("zh", 4)):
        file = tmp_path / "text" / f"{code}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(f"{code} {i}" for i in range(count)))
    source = TextSource(paths=(str(tmp_path / "text"),), documents="line", language_from="file")
    prepare(source, tokenizer=xlmr_folder, output=tmp_path / "out", workers=0)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.languages == ("ar", "de", "zh")
    codes = [corpus.languages[i] for i in corpus.document_languages]
    assert codes == ["ar"] * 2 + ["de"] * 3 + ["zh"] * 4


def test_an_unasked_for_split_is_empty(make_corpus):
    corpus = Corpus.open(make_corpus("a", [3, 4]).folder, split="heldout")
    assert len(corpus) == 0 and corpus.num_tokens == 0 and len(corpus.lengths) == 0


def test_more_shards_than_may_be_open(make_corpus, monkeypatch):
    monkeypatch.setattr(module, "_OPEN_SHARDS", 2)
    corpus = make_corpus("a", list(range(1, 31)), shards=10)
    for i in [*range(30), *range(29, -1, -1)]:
        assert len(corpus.document(i)) == i + 1


def test_a_folder_that_is_no_corpus_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="minilm-jax prepare"):
        Corpus.open(tmp_path)
