import json
import shutil

import numpy as np
import pytest
import tokenizers as rust
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilm_jax.data import tokenizers as module
from minilm_jax.data.tokenizers import load_tokenizer
from minilm_jax.errors import DataError

LITERALS = "[CLS] [SEP] [PAD] [MASK] <s> </s> <pad> <mask> a[MASK]b a<mask>b"


ODD = [
    *("the", "The", " ", "  ", "\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "don't", "'s"),
    *("é", "e\u0301", "\u0301", "ß", "İ", "Σ", "东京", "ａ", "\u200b", "\x00", "[CLS]", "[MASK]x"),
    *("<s>", "<mask>", "##ing", "▁", "Ġ", "1,2", "...", "\ufffd", "🙂", "x" * 120, "-"),
]
TEXT = st.text(max_size=60) | st.lists(st.sampled_from(ODD), max_size=25).map("".join)


@pytest.fixture(scope="module")
def plain_bert(bert_folder):
    """The tokenizers library's own encoding."""
    plain = rust.Tokenizer.from_file(str(bert_folder / "tokenizer.json"))
    plain.no_padding()
    plain.no_truncation()
    plain.encode_special_tokens = True
    return plain


def copy(folder, to, *names):
    for name in names:
        shutil.copy(folder / name, to / name)
    return to


def test_bert_ids_are_the_published_ones(bert):
    (ids,) = bert.encode(["Hello, World! Café unaffable"])
    assert bert.kind == "wordpiece"
    assert ids.dtype == np.uint32
    assert ids.tolist() == [7592, 1010, 2088, 999, 7668, 14477, 20961, 3468]
    assert (bert.cls_id, bert.sep_id, bert.pad_id, bert.unk_id, bert.mask_id) == (
        *(101, 102, 0, 100, 103),
    )
    assert bert.vocab_size == 30522


def test_padding_and_truncation_in_the_file_do_not_count(bert):
    short, long = bert.encode(["one", "word " * 1000])
    assert len(short) == 1 and len(long) == 1000


def test_vocab_txt_and_tokenizer_json_are_the_same_tokenizer(bert, bert_folder, tmp_path, english):
    plain = load_tokenizer(copy(bert_folder, tmp_path, "vocab.txt", "tokenizer_config.json"))
    assert plain.fingerprint == bert.fingerprint
    for a, b in zip(plain.encode(english[:50]), bert.encode(english[:50]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_lower_casing_is_part_of_the_fingerprint(bert, bert_folder, tmp_path):
    copy(bert_folder, tmp_path, "vocab.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load_tokenizer(tmp_path).fingerprint != bert.fingerprint


def test_literal_special_tokens_stay_text(bert, xlmr_folder):
    for tokenizer in (bert, load_tokenizer(xlmr_folder)):
        (ids,) = tokenizer.encode([LITERALS])
        forbidden = set(tokenizer.special_ids) - {tokenizer.unk_id}
        assert len(ids) > 10 and not forbidden & set(ids.tolist())


ADDED = ["the newtok is here, Hello", "[E1] x [/E1] Ünïcödé", "a<E>b", "[MASK]x"]


def same_as_transformers(folder, texts=ADDED[:3]):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
    return ours


@pytest.mark.parametrize(
    "name, content",
    [
        ("added_tokens.json", {"newtok": 30522, "[E1]": 30523, "[/E1]": 30524}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"30522": {"content": "newtok", "normalized": True}}},
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"30522": {"content": "[E1]", "special": True}}},
        ),
    ],
)
def test_tokens_added_to_vocab_txt_are_found_in_text(bert_folder, tmp_path, name, content):
    copy(bert_folder, tmp_path, "vocab.txt")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / name).write_text(json.dumps(content))
    ours = same_as_transformers(tmp_path)
    assert {30522} <= set(np.concatenate(ours.encode(ADDED)).tolist())
    assert not {ours.mask_id, ours.cls_id} & set(np.concatenate(ours.encode(ADDED)).tolist())


@pytest.mark.parametrize("family", ["bert", "roberta", "xlmr"])
def test_tokens_that_users_added_and_saved_are_found_in_text(
    family, bert_folder, roberta_folder, xlmr_folder, tmp_path
):
    import transformers

    folder, name = {
        "bert": (bert_folder, "BertTokenizer"),
        "roberta": (roberta_folder, "RobertaTokenizer"),
        "xlmr": (xlmr_folder, "XLMRobertaTokenizer"),
    }[family]
    theirs = getattr(transformers, name).from_pretrained(folder)
    theirs.add_tokens(["newtok"])
    theirs.add_special_tokens({"additional_special_tokens": ["[E1]", "[/E1]", "<E>"]})
    theirs.save_pretrained(tmp_path)
    if family == "xlmr":  # as transformers 4 saved it, with the file of the model as it was
        copy(xlmr_folder, tmp_path, module.SENTENCEPIECE_FILE)
    ours = load_tokenizer(tmp_path)
    assert ours.vocab_size == len(theirs)
    for text, ids in zip(ADDED[:3], ours.encode(ADDED[:3]), strict=True):
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
    forbidden = set(ours.special_ids) - {ours.unk_id}
    assert not forbidden & set(np.concatenate(ours.encode([*ADDED, LITERALS])).tolist())
    if family == "xlmr":
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "added_tokens.json").write_text(json.dumps({"newtok": ours.vocab_size}))
        with pytest.raises(module.UnsupportedTokenizerError, match="added to the vocabulary"):
            load_tokenizer(tmp_path)


def test_an_added_token_of_another_vocabulary_is_refused(bert_folder, tmp_path):
    copy(bert_folder, tmp_path, "vocab.txt")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"newtok": 30999}))
    with pytest.raises(DataError, match="'newtok' has id 30999, where the vocabulary leaves 30522"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "settings_",
    [
        {"do_lower_case": False},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
    ],
)
def test_tokenizer_config_wins_over_tokenizer_json_as_in_transformers(
    bert_folder, tmp_path, settings_
):
    copy(bert_folder, tmp_path, "tokenizer.json")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    settings_ = {"tokenizer_class": "BertTokenizer", **settings_}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings_))
    same_as_transformers(tmp_path, ["Hello Ünïcödé World", "东京タワー 12"])


def test_pairs_follow_the_family(bert, xlmr_folder):
    pair = bert.build([5, 6], [7])
    assert pair.ids == [101, 5, 6, 102, 7, 102]
    assert pair.token_type_ids == [0, 0, 0, 0, 1, 1]
    pair = load_tokenizer(xlmr_folder).build(np.array([5, 6]), [7])
    assert pair.ids == [0, 5, 6, 2, 2, 7, 2]
    assert pair.token_type_ids == [0] * 7
    assert bert.build([5]).ids == [101, 5, 102]


def test_a_batch_of_texts_is_what_transformers_makes_of_them(bert, bert_folder):
    from transformers import AutoTokenizer

    texts = ["a few words", "", "many more words than the row has room for, one would think"]
    theirs = AutoTokenizer.from_pretrained(bert_folder)(
        texts, padding=True, truncation=True, max_length=9, return_tensors="np"
    )
    batch = bert.batch(texts, max_length=9)
    np.testing.assert_array_equal(batch["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(batch["segments"], theirs["attention_mask"])
    assert {x.dtype.name for x in batch.values()} == {"int32"}


@pytest.mark.parametrize(
    "texts, max_length, message",
    [
        ("one text", 8, "texts is one str, 'one text': give a list"),
        ([], 8, "texts is empty: give a list"),
        ((text for text in ()), 8, "texts is empty: give a list"),
        (["one"], 2, "max_length is 2: give at least 3"),
    ],
)
def test_what_is_no_batch_is_refused(bert, texts, max_length, message):
    with pytest.raises(DataError, match=message):
        bert.batch(texts, max_length=max_length)


def test_texts_may_come_in_any_order_of_things_and_not_as_one(bert):
    texts = ["a few words", "more"]
    expected = [ids.tolist() for ids in bert.encode(texts)]
    for form in (tuple(texts), (text for text in texts), np.array(texts)):
        assert [ids.tolist() for ids in bert.encode(form)] == expected
    np.testing.assert_array_equal(
        bert.batch(np.array(texts), max_length=8)["input_ids"],
        bert.batch(texts, max_length=8)["input_ids"],
    )
    with pytest.raises(DataError, match="texts is one str, 'more': give a list"):
        bert.encode("more")


def test_a_batch_is_filled_with_the_pad_id_to_the_length_that_is_asked_for(xlmr_folder):
    xlmr = load_tokenizer(xlmr_folder)
    (ids,) = xlmr.encode(["hello"])
    batch = xlmr.batch(["hello", ""], max_length=30, multiple_of=8)
    rows = [[0, *ids, 2], [0, 2]]  # the pad id of this family is 1, not 0
    assert batch["input_ids"].tolist() == [row + [1] * (8 - len(row)) for row in rows]
    assert batch["segments"].sum(axis=1).tolist() == list(map(len, rows))
    assert xlmr.batch(["hello " * 40], max_length=30, multiple_of=8)["segments"].shape == (1, 30)


def test_the_folder_that_calls_itself_bert_and_holds_sentencepiece(xlmr_folder, tmp_path):
    copy(xlmr_folder, tmp_path, "sentencepiece.bpe.model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 700}))
    tokenizer = load_tokenizer(tmp_path, vocab_size=700)
    assert tokenizer.kind == "sentencepiece"
    assert tokenizer.pieces[:4] == ("<s>", "<pad>", "</s>", "<unk>")
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    (ids,) = tokenizer.encode(["the return value is a string"])
    assert tokenizer.unk_id not in ids
    assert tokenizer.decode(ids) == "the return value is a string"


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(bert_folder):
    load_tokenizer(bert_folder, vocab_size=30592)  # rows padded to a multiple of 128
    with pytest.raises(DataError, match=r"30522 ids, the model only 28996 rows"):
        load_tokenizer(bert_folder, vocab_size=28996)
    with pytest.raises(DataError, match="belongs to another model"):
        load_tokenizer(bert_folder, vocab_size=250002)


def test_a_tokenizer_that_knows_no_word_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(DataError, match="knows no word"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}'),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1"),
        ("vocab.txt", b""),
        ("vocab.txt", b"\xff\xfe\x00"),
        ("vocab.txt", b"[PAD]\nword\nword\n"),
        ("sentencepiece.bpe.model", b""),
        ("sentencepiece.bpe.model", b"not a model"),
    ],
)
def test_broken_tokenizer_files_are_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json, vocab\.txt"):
        load_tokenizer(tmp_path)


def test_xlms_own_bpe_is_not_read_as_robertas(tmp_path):
    """Its files have the same names; ids of byte-level BPE would be wrong ones, in silence."""
    pieces = ["<s>", "</s>", "<pad>", "<unk>", "<special1>", *"thea", "th", "the</w>", "a</w>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    for counts in ("", " 123"):
        (tmp_path / "merges.txt").write_text(f"t h{counts}\nth e</w>{counts}\n")
        with pytest.raises(DataError, match=r"are XLM's.* can be converted, but not distilled"):
            load_tokenizer(tmp_path)


def test_a_vocabulary_of_other_rules_is_not_read_as_berts(bert_folder, tmp_path):
    """BERT's for Japanese have a vocab.txt, and divide words by MeCab."""
    copy(bert_folder, tmp_path, "vocab.txt")
    settings = {"tokenizer_class": "BertJapaneseTokenizer", "word_tokenizer_type": "mecab"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        DataError, match=r"BertJapaneseTokenizer .* can be converted, but not distill"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(tmp_path).kind == "wordpiece"


@settings(max_examples=300, deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
@example(texts=["a\x0bb c\x1cd", "", " ", "word " * 40])
def test_remembered_words_give_bert_the_ids_of_the_whole_text(bert, plain_bert, texts):
    for text, ids in zip(texts, bert.encode(texts), strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == plain_bert.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("prefix", [False, True])
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
@example(texts=["a  b", " a b", "a \n b", "don't we'll", "\x1c a"])
def test_remembered_words_give_byte_level_bpe_the_ids_of_the_whole_text(
    roberta_folder, tmp_path_factory, prefix, texts
):
    folder = tmp_path_factory.mktemp("bpe")
    copy(roberta_folder, folder, "vocab.json", "merges.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
    plain = rust.ByteLevelBPETokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), add_prefix_space=prefix
    )
    for text, ids in zip(texts, load_tokenizer(folder).encode(texts), strict=True):
        assert ids.tolist() == plain.encode(text).ids


def test_byte_level_bpe(roberta_folder):
    tokenizer = load_tokenizer(roberta_folder)
    assert tokenizer.kind == "bpe" and tokenizer.vocab_size == 800
    assert tokenizer.pieces[:5] == ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    (ids,) = tokenizer.encode(["the return value\n is 你好 <mask>"])
    assert tokenizer.decode(ids) == "the return value\n is 你好 <mask>"
    assert not set(ids.tolist()) & set(tokenizer.special_ids)
    assert tokenizer.build([9], [8]).ids == [0, 9, 2, 2, 8, 2]


def test_a_book_is_encoded_in_stretches_to_the_same_ids(
    bert_folder, roberta_folder, xlmr_folder, english, monkeypatch
):
    book = "\n".join(english[:20])
    for folder in (bert_folder, roberta_folder, xlmr_folder):
        tokenizer = load_tokenizer(folder)
        (whole,) = tokenizer.encode([book])
        monkeypatch.setattr(module, "_LONGEST_STRETCH", 1000)
        cut, short = tokenizer.encode([book, "short"])
        monkeypatch.undo()
        np.testing.assert_array_equal(cut, whole)
        np.testing.assert_array_equal(short, tokenizer.encode(["short"])[0])


def test_sentencepiece_and_its_tokenizer_json_are_the_published_numbering(xlmr_folder, tmp_path):
    """transformers' own reading of the folder is the reference; it costs seconds to import."""
    from transformers import XLMRobertaTokenizer

    reference = XLMRobertaTokenizer.from_pretrained(xlmr_folder)
    ours = load_tokenizer(xlmr_folder)
    texts = ["the return value", "Ünïcödé  is 12,345 bytes!", "你好 unknown characters", " x ", ""]
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ours.build(ids).ids == reference(text)["input_ids"]
    pair = ours.build(*ours.encode(["the return", "value"]))
    assert pair.ids == reference("the return", "value")["input_ids"]
    reference.save_pretrained(tmp_path)  # writes tokenizer.json only
    converted = load_tokenizer(tmp_path)
    assert converted.kind == "sentencepiece"
    assert converted.pieces == ours.pieces
    assert converted.special_ids == ours.special_ids
    (ids,) = converted.encode([LITERALS])
    assert not set(ids.tolist()) & (set(converted.special_ids) - {converted.unk_id})


PLACES = "Ünïcödé  façade, ﬁn² Ｆｕｌｌ 东京タワー हिन्दी e\u0301a 🙂 end"


def test_offsets_cut_the_pieces_out_of_the_text(bert, xlmr_folder):
    for tokenizer in (bert, load_tokenizer(xlmr_folder)):
        texts = [PLACES, "", " lead", *tokenizer.pieces[1000:1003], "one\ttwo\nthree"]
        for text, ids, located in zip(
            texts, tokenizer.encode(texts), tokenizer.encode_with_offsets(texts), strict=True
        ):
            np.testing.assert_array_equal(located.ids, ids)
            assert located.offsets.shape == (len(ids), 2)
            assert (np.diff(located.offsets, axis=1) >= 0).all()
            assert (located.offsets[1:, 0] >= located.offsets[:-1, 0]).all()
            covered = "".join(text[start:end] for start, end in located.offsets.tolist())
            # Nothing but blanks, dropped accents and double counts differ.
            assert set(text) - set(covered) <= set(" \t\n\u0301ि्ी")
            for start, end in located.offsets.tolist():
                assert text[start:end] == text[start:end].strip()


def test_offsets_of_a_word_are_the_words(bert):
    (located,) = bert.encode_with_offsets(["A  Café!"])
    assert located.offsets.tolist() == [[0, 1], [3, 7], [7, 8]]
