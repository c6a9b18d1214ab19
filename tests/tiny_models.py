"""Small models with real tokenizers, made on the spot from the sentences of official_files.py."""

import io
import json
from pathlib import Path

import jax
import numpy as np
from official_files import CONTEXTS, SENTENCES

from minilm_jax.convert.folder import write_model
from minilm_jax.convert.model import Model
from minilm_jax.encoder.config import EncoderConfig
from minilm_jax.encoder.encoder import init_params

TEXTS = [text for pair in SENTENCES.values() for text in pair]
TEXTS += [text for context, pairs in CONTEXTS.values() for text in (context, *sum(pairs, ()))]
ENGLISH = "good bad plain film no is unfinished It the a of and Agreement 0 1 2 3 4 5 6 7 8 9"


def write_wordpiece(folder: Path) -> Path:
    """Whole English words, and every character of all languages."""
    folder.mkdir(parents=True, exist_ok=True)
    english = " ".join([*SENTENCES["en"], CONTEXTS["en"][0], ENGLISH]).lower()
    words = {word.strip('.,?"') for word in english.split()}
    import unicodedata

    characters = set(unicodedata.normalize("NFD", "".join(TEXTS).lower())) | set('".,?!¿')
    characters = {c for c in characters if not c.isspace()}
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab += sorted(characters | words) + [f"##{c}" for c in sorted(characters)]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


def write_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        vocab_size=700,
        hard_vocab_limit=False,
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        num_threads=1,
    )
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "XLMRobertaTokenizer"})
    )
    return folder


def write_tiny(folder: Path, *, family: str = "bert", layers: int = 1, seed: int = 0) -> Path:
    """A Hugging Face folder: a random encoder of 32 units; bert, xlm-roberta, or minilm, which is
    a BERT with XLM-R's tokenizer as Microsoft released it."""
    tokenizer = folder.with_name(folder.name + "-tokenizer")
    if family == "bert":
        write_wordpiece(tokenizer)
        size = len((tokenizer / "vocab.txt").read_text("utf-8").splitlines())
    else:
        write_sentencepiece(tokenizer)
        size = 800
    offset = 2 if family == "xlm-roberta" else 0
    config = EncoderConfig(
        model_type="xlm-roberta" if family == "xlm-roberta" else "bert",
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128 + offset,
        position_offset=offset,
        type_vocab_size=1 if family == "xlm-roberta" else 2,
        pad_token_id=1 if family == "xlm-roberta" else 0,
    )
    encoder = jax.tree.map(np.asarray, init_params(jax.random.key(seed), config))
    model = Model(config=config, params={"encoder": encoder})
    write_model(model, folder, tokenizer_files=sorted(tokenizer.iterdir()))
    return folder
