import json
import re
import signal
import subprocess
import sys

import pytest

from minilm_jax.data.documents import Document
from minilm_jax.data.tokenizer_training import train_sentencepiece, train_wordpiece
from minilm_jax.errors import DataError

SAMPLES = ["The return value is a string.", "Ünïcödé 12,345", "x = [1, 2]", "a <mask> [MASK] b"]


@pytest.fixture(scope="module")
def documents(english):
    return [Document(text) for text in english[:150]]


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_is_read_alike_by_us_and_by_transformers(documents, tmp_path, lowercase):
    from transformers import AutoTokenizer

    ours = train_wordpiece(documents, output=tmp_path / "new", vocab_size=700, lowercase=lowercase)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert ours.kind == "wordpiece" and ours.vocab_size == len(theirs) == 700
    for text in SAMPLES[:3]:
        (ids,) = ours.encode([text])
        assert ours.build(ids).ids == theirs(text)["input_ids"]
    assert ours.encode(["THE"])[0].tolist() == ours.encode(["the"])[0].tolist() or not lowercase
    assert ours.mask_id == theirs.mask_token_id


def test_sentencepiece_is_read_alike_by_us_and_by_transformers(documents, tmp_path):
    from transformers import AutoTokenizer

    ours = train_sentencepiece(documents, output=tmp_path / "new", vocab_size=600, threads=1)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert ours.kind == "sentencepiece" and ours.vocab_size == len(theirs) == 600
    for text in SAMPLES[:3]:
        (ids,) = ours.encode([text])
        assert ours.build(ids).ids == theirs(text)["input_ids"]
    assert ours.mask_id == theirs.mask_token_id


def test_the_same_text_gives_the_same_sentencepiece(documents, tmp_path):
    a, b = (train_sentencepiece(documents, output=tmp_path / i, vocab_size=500) for i in "ab")
    assert a.fingerprint == b.fingerprint


def test_nothing_is_left_where_it_cannot_be(documents, tmp_path):
    with pytest.raises(DataError, match=r"character_coverage is 2\.0: give 0\.98 to 1"):
        train_sentencepiece(documents, output=tmp_path / "new", character_coverage=2.0)
    with pytest.raises(DataError, match="more than the 5 specials"):
        train_wordpiece(documents, output=tmp_path / "new", vocab_size=5)
    with pytest.raises(DataError, match="no text"):
        train_wordpiece([], output=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "new").mkdir()
    with pytest.raises(DataError, match="exists already"):
        train_wordpiece(documents, output=tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be made .*; give another folder"):
        train_wordpiece(documents, output=tmp_path / "file" / "new")


@pytest.mark.parametrize(
    "train,size,reason",
    [
        (train_sentencepiece, 100_000, r"gives ([\d,]+) pieces at most"),
        (train_sentencepiece, 10, r"characters alone take ([\d,]+) pieces.*character_coverage"),
        (train_wordpiece, 10, r"characters alone take ([\d,]+) pieces"),
    ],
)
def test_a_size_that_the_text_does_not_give_is_refused_with_one_that_it_does(
    train, size, reason, documents, tmp_path
):
    with pytest.raises(DataError, match=f"vocab_size is {size}: the text.* {reason}") as refused:
        train(documents, output=tmp_path / "new", vocab_size=size)
    named = int(re.search(reason, str(refused.value))[1].replace(",", ""))
    assert train(documents, output=tmp_path / "new", vocab_size=named).vocab_size == named


def test_ctrl_c_ends_the_learning_at_once_and_leaves_nothing(tmp_path):
    """What Python does with SIGINT waits for native code, which here counts for minutes."""
    (tmp_path / "text.txt").write_text("A document.")
    script = (
        "import itertools, sentencepiece, signal, sys\n"
        # A shell that starts the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from minilm_jax import cli\n"
        "def train(**_):\n"
        "    print('learning', flush=True)\n"
        "    sum(itertools.repeat(1, 10**11))\n"
        "sentencepiece.SentencePieceTrainer.train = train\n"
        "sys.exit(cli.main(['tokenizer', '--source.paths', 'text.txt', '--output', 'new',"
        " '--kind', 'sentencepiece']))\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "learning\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(timeout=20) == -signal.SIGINT
        finally:
            process.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_transformers_is_told_the_class_and_the_length(documents, tmp_path):
    train_sentencepiece(documents, output=tmp_path / "a", vocab_size=500, longest_input=128)
    settings = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "XLMRobertaTokenizer"
    assert settings["model_max_length"] == 128
