"""New vocabularies, in folders that both `load_tokenizer` and transformers read."""

import io
import itertools
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers as rust

from minilm_jax.data.documents import Document
from minilm_jax.data.tokenizers import (
    SENTENCEPIECE_FILE,
    USUAL_NAMES,
    Tokenizer,
    load_tokenizer,
    wordpiece_spec,
)
from minilm_jax.errors import DataError

_BERT_NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_XLMR_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
# <pad> and <mask>: XLM-R has them, a SentencePiece model has not.
_ADDED_BY_XLMR = 2
_LONGEST_SENTENCE = 16_384
# At most so many are drawn from the text and held in memory.
_MOST_SENTENCES = 10_000_000


def train_wordpiece(
    documents: Iterable[Document],
    *,
    output: str | Path,
    vocab_size: int = 30_522,
    lowercase: bool = True,
    longest_input: int = 512,
) -> Tokenizer:
    """Returns a new BERT tokenizer, written to the folder `output`.

    The library breaks ties between equally frequent pairs by chance: two runs may differ in a few
    pieces, so keep the vocabulary, not the recipe.

    Args:
        documents: Text to learn from.
        output: A folder that does not exist yet.
        vocab_size: Pieces, special ones included; little text may give fewer.
        lowercase: Whether case and accents are dropped.
        longest_input: Tokens that models of this vocabulary take, for transformers.

    Raises:
        DataError: The folder exists, the vocabulary is too small, or there is no text.
    """
    _check_new(output)
    names = list(_BERT_NAMES.values())
    if vocab_size <= len(names):
        raise DataError(f"vocab_size is {vocab_size}: give more than the {len(names)} specials")
    learner = rust.Tokenizer(rust.models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = rust.normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = rust.pre_tokenizers.BertPreTokenizer()
    trainer = rust.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=names,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    learner.train_from_iterator((d.text for d in _some(documents)), trainer=trainer)
    vocab = learner.get_vocab(with_added_tokens=True)
    if len(vocab) > vocab_size:
        raise DataError(
            f"vocab_size is {vocab_size}: the text's characters alone take {len(vocab):,} pieces; "
            "give at least that many"
        )
    with _new_folder(output) as folder:
        pieces = sorted(vocab, key=lambda piece: vocab[piece])
        (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in pieces), "utf-8")
        spec = wordpiece_spec(
            vocab,
            special_names=USUAL_NAMES["wordpiece"],
            lowercase=lowercase,
            strip_accents=None,
            chinese=True,
        )
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": lowercase,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
            "model_max_length": longest_input,
            **_BERT_NAMES,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), "utf-8")
    return load_tokenizer(output)


def train_sentencepiece(
    documents: Iterable[Document],
    *,
    output: str | Path,
    vocab_size: int = 250_002,
    character_coverage: float = 0.9995,
    longest_input: int = 512,
    threads: int = 4,
) -> Tokenizer:
    """Returns a new unigram SentencePiece tokenizer in XLM-R's layout, written to `output`.

    Args:
        documents: Text to learn from; every line is a sentence.
        output: A folder that does not exist yet.
        vocab_size: Pieces, special ones included.
        character_coverage: Share of the characters that get a piece; the rest are unknown.
        longest_input: Tokens that models of this vocabulary take, for transformers.
        threads: For the training itself.

    Raises:
        DataError: The folder exists, or the text does not give so large a vocabulary.
    """
    import sentencepiece

    _check_new(output)
    if not 0.98 <= character_coverage <= 1:
        raise DataError(f"character_coverage is {character_coverage}: give 0.98 to 1")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(_some(documents)),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - _ADDED_BY_XLMR,
            character_coverage=character_coverage,
            input_sentence_size=_MOST_SENTENCES,
            shuffle_input_sentence=True,
            max_sentence_length=_LONGEST_SENTENCE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"vocab_size is {vocab_size}: {_why_refused(str(error))}") from error
    with _new_folder(output) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(model.getvalue())
        settings = {
            "tokenizer_class": "XLMRobertaTokenizer",
            "model_max_length": longest_input,
            **_XLMR_NAMES,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), "utf-8")
    return load_tokenizer(output)


def _why_refused(error: str) -> str:
    """Returns SentencePiece's reason and the way out, in pieces as a user counts them."""
    if found := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", error):
        most = int(found[1]) + _ADDED_BY_XLMR
        return f"the text gives {most:,} pieces at most; give no more, or more text"
    if found := re.search(r"smaller than required_chars\. -?\d+ vs (\d+)", error):
        least = int(found[1]) + _ADDED_BY_XLMR
        return (
            f"the text's characters alone take {least:,} pieces; give at least that many, or a "
            "smaller character_coverage"
        )
    reason = error.strip().splitlines()[-1]
    return f"SentencePiece refuses ({reason}); give another size or more text"


def _some(documents: Iterable[Document]) -> Iterator[Document]:
    iterator = iter(documents)
    first = next(iterator, None)
    if first is None:
        raise DataError("there is no text to learn a vocabulary from; check the source")
    return itertools.chain([first], iterator)


def _sentences(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        # The null character ends a sentence in C++.
        for line in document.text.replace("\0", " ").splitlines():
            if line.strip():
                yield line


def _check_new(output: str | Path) -> None:
    """Raises DataError where the folder cannot be made: before the learning, which takes long."""
    output = Path(output)
    if output.exists():
        raise DataError(f"{output}: exists already; give a new folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise DataError(
            f"{output}: cannot be made ({error.strerror}); give another folder"
        ) from error


@contextmanager
def _new_folder(output: str | Path) -> Iterator[Path]:
    """Gives a folder that becomes `output` at the end, whole or not at all.

    The learning is over by then: a signal that ends the process before leaves nothing behind.
    """
    output = Path(output)
    beside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=output.parent))
    try:
        beside.chmod(0o755)
        yield beside
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside)
        raise
