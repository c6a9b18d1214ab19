"""Official files in, examples out; and what each reader says of files that are not right."""

import csv
import gc
import json
import time

import pytest
from official_files import (
    CONTEXTS,
    SENTENCES,
    squad,
    write_glue,
    write_mlqa,
    write_squad,
    write_tsv,
    write_xnli,
)

from minilm_jax.errors import ConfigError, DataError
from minilm_jax.tasks.catalog import TASKS, Part, TaskData, all_languages, all_pairs, read_part
from minilm_jax.tasks.examples import Answer, Skips
from minilm_jax.tasks.glue import GLUE, read_glue
from minilm_jax.tasks.mlqa import read_mlqa
from minilm_jax.tasks.own import label_names, read_questions, read_scores, read_texts
from minilm_jax.tasks.squad import read_squad
from minilm_jax.tasks.xnli import read_xnli, read_xnli_train


@pytest.fixture
def skips():
    return Skips()


@pytest.fixture(scope="module")
def glue(tmp_path_factory):
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def xnli(tmp_path_factory):
    return write_xnli(tmp_path_factory.mktemp("xnli"))


@pytest.fixture(scope="module")
def mlqa(tmp_path_factory):
    return write_mlqa(tmp_path_factory.mktemp("mlqa"))


# GLUE


@pytest.mark.parametrize("task", GLUE)
def test_every_glue_task_reads_its_splits(glue, task, skips):
    splits = ("train", "dev", "test") + (("dev-mm", "test-mm", "ax") if task == "mnli" else ())
    for split in splits:
        found = read_glue(glue, task=task, split=split, skips=skips)
        assert len(found) == (5 if split[:2] in ("te", "ax") else 12)
        assert '"unfinished' in found[0].text  # quotes are text
        assert (found[0].text_pair is None) == (task in ("cola", "sst2"))
        labels = {example.label for example in found}
        if split[:2] in ("te", "ax"):
            assert labels == {None}
        elif task == "stsb":
            assert labels == {0.0, 5.0}
        else:
            assert labels == set(TASKS[task].labels)


def test_labels_go_by_name_in_the_order_of_hugging_face():
    assert TASKS["mnli"].labels == TASKS["xnli"].labels == (
        "entailment", "neutral", "contradiction",
    )  # fmt: skip
    # WNLI's files say 1 where RTE's say entailment; QNLI's first class is entailment.
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")
    assert TASKS["rte"].labels == ("entailment", "not_entailment")


def test_rows_the_official_readers_skip_are_counted_and_listed(glue, skips):
    read_glue(glue, task="qqp", split="train", skips=skips)
    read_glue(glue, task="mnli", split="dev", skips=skips)
    assert skips.counts == {
        "2 columns instead of 6": 1,
        "no gold label: the annotators disagreed": 1,
    }
    assert any("QQP/train.tsv:5: 2 columns" in line for line in skips.lines())


def test_a_row_that_is_skipped_takes_its_id_along(tmp_path, skips):
    rows = ("id", "question1", "question2"), (0, "a", "b"), (1, "broken"), (2, "c", "d")
    write_tsv(tmp_path / "QQP/test.tsv", *rows)
    assert [e.id for e in read_glue(tmp_path, task="qqp", split="test", skips=skips)] == ["0", "2"]


def test_a_task_folder_itself_will_do(glue, skips):
    assert read_glue(glue / "RTE", task="rte", split="dev", skips=skips)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("0", "a", "b", ""), r"dev.tsv:2: column 'label' is empty"),
        (("0", "a", "b", "maybe"), r"dev.tsv:2: label 'maybe' is not one of entailment, not"),
        (("0", "a", "b"), r"dev.tsv:2: 3 columns instead of 4"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, skips, row, message):
    write_tsv(tmp_path / "RTE/dev.tsv", ("index", "sentence1", "sentence2", "label"), row)
    with pytest.raises(DataError, match=message):
        read_glue(tmp_path, task="rte", split="dev", skips=skips)


def test_a_file_of_another_task_is_refused(glue, tmp_path, skips):
    (tmp_path / "dev.tsv").write_bytes((glue / "QNLI/dev.tsv").read_bytes())
    with pytest.raises(DataError, match=r"dev.tsv:1: no column 'sentence1', 'sentence2'; it has"):
        read_glue(tmp_path, task="rte", split="dev", skips=skips)
    with pytest.raises(ConfigError, match=r"mnli has no split 'dev-m'; it has .*test-mm, ax$"):
        read_glue(glue, task="mnli", split="dev-m", skips=skips)
    with pytest.raises(DataError, match=r"RTE/train.tsv: no such file"):
        read_glue(tmp_path, task="rte", split="train", skips=skips)
    with pytest.raises(ConfigError, match=r"rte has no split 'dev-mm'; it has train, dev, test"):
        read_glue(tmp_path, task="rte", split="dev-mm", skips=skips)


@pytest.mark.parametrize("said", ["", "high", "5.1", "nan"])
def test_a_score_must_be_one(tmp_path, skips, said):
    write_tsv(tmp_path / "dev.tsv", ("sentence1", "sentence2", "score"), ("a", "b", said))
    with pytest.raises(DataError, match=r"dev.tsv:2: .* 'score' where a score of 0 to 5 belongs"):
        read_glue(tmp_path, task="stsb", split="dev", skips=skips)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"good\t1\ncaf\xe9\t1\n", r"dev.tsv:3: byte 4 \(0xe9\) is not UTF-8"),
        ("good\t1\n".encode("utf-16"), r"is not UTF-8|UTF-16"),
    ],
)
def test_mixed_encodings_are_named_with_their_line(tmp_path, skips, raw, message):
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\n" + raw)
    with pytest.raises(DataError, match=message):
        read_glue(tmp_path, task="sst2", split="dev", skips=skips)


def test_a_file_in_utf16_is_called_that(tmp_path, skips):
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"dev.tsv:1: is UTF-16; convert"):
        read_glue(tmp_path, task="sst2", split="dev", skips=skips)


def test_unicode_line_separators_are_text_and_windows_line_ends_are_not(tmp_path, skips):
    text = "one\u2028two\x0bthree\u0085four"
    (tmp_path / "dev.tsv").write_bytes(f"sentence\tlabel\r\n{text}\t1\r\n".encode())
    (example,) = read_glue(tmp_path, task="sst2", split="dev", skips=skips)
    assert (example.text, example.label) == (text, "positive")


# XNLI


def test_xnli_reads_fifteen_languages(xnli, skips):
    for part in all_languages("xnli", Part(split="test")):
        found = read_part("xnli", TaskData(folder=xnli), part, purpose="evaluate", skips=skips)
        assert [e.language for e in found] == [part.language] * 6
        assert found[0].text == SENTENCES[part.language][0]
        assert {e.label for e in found} == set(TASKS["xnli"].labels)


def test_xnli_training_sets_spell_contradiction_otherwise(xnli):
    for language in ("en", "de"):
        labels = {e.label for e in read_xnli_train(xnli, language=language)}
        assert labels == set(TASKS["xnli"].labels)


def test_a_training_set_in_another_language_is_refused(xnli, tmp_path):
    german = (xnli / "XNLI-MT-1.0/multinli/multinli.train.de.tsv").read_bytes()
    (tmp_path / "multinli.train.en.tsv").write_bytes(german)
    with pytest.raises(DataError, match=r"is said to be 'en' but reads like 'de'"):
        read_xnli_train(tmp_path, language="en")
    (tmp_path / "multinli.train.zh.tsv").write_bytes(german)
    with pytest.raises(DataError, match=r"is said to be 'zh' but is written in Latin letters"):
        read_xnli_train(tmp_path, language="zh")


@pytest.mark.parametrize("language", SENTENCES)
def test_every_language_is_taken_for_itself_and_no_other_script(tmp_path, language, xnli):
    rows = [(SENTENCES[language][0], SENTENCES[language][1], "neutral")] * 30
    for other in SENTENCES:
        file = tmp_path / f"multinli.train.{other}.tsv"
        write_tsv(file, ("premise", "hypo", "label"), *rows)
    assert len(read_xnli_train(tmp_path, language=language)) == 30
    wrong = "en" if language in ("zh", "ar", "hi", "th", "el", "ru", "bg", "ur") else "zh"
    with pytest.raises(DataError, match="is said to be"):
        read_xnli_train(tmp_path, language=wrong)


def test_a_language_that_is_not_in_the_file(xnli, skips):
    with pytest.raises(DataError, match=r"no row has language 'it'; it has \['ar', 'bg'"):
        read_xnli(xnli, split="dev", language="it", skips=skips)
    with pytest.raises(ConfigError, match=r"xnli has no language 'it'"):
        part = Part(split="dev", language="it")
        read_part("xnli", TaskData(folder=xnli), part, purpose="evaluate", skips=skips)


# SQuAD and MLQA


def test_squad_reads_both_versions(tmp_path, skips):
    write_squad(tmp_path)
    one = read_squad(tmp_path / "dev-v1.1.json", purpose="evaluate", version="1.1", skips=skips)
    two = read_squad(tmp_path / "train-v2.0.json", purpose="train", version="2.0", skips=skips)
    assert [e.answers[0].text for e in one] == [a for _, a in CONTEXTS["en"][1]]
    assert [len(e.answers) for e in two] == [1, 1, 0]
    answer = two[0].answers[0]
    assert two[0].context[answer.start : answer.end] == "France"


def test_reading_takes_time_in_proportion_to_the_questions(tmp_path, skips):
    """A search of the file for each question took minutes for SQuAD's 88 thousand."""
    context, pairs = CONTEXTS["en"]

    def seconds(count):
        article = squad(context, pairs * (count // len(pairs)))
        (tmp_path / "x.json").write_text(json.dumps({"data": [article]}))
        began = time.process_time()
        read_squad(tmp_path / "x.json", purpose="evaluate", version="1.1", skips=skips)
        return time.process_time() - began

    gc.disable()  # it looks at what all tests of this process have left
    try:
        few, many = (min(seconds(count) for _ in range(3)) for count in (500, 4000))
    finally:
        gc.enable()
    assert many < 24 * few  # of 8 times as many; the square is 64


def test_the_other_version_is_refused(tmp_path, skips):
    write_squad(tmp_path)
    with pytest.raises(DataError, match=r"question 'qx': is_impossible occurs only in SQuAD 2.0"):
        read_squad(tmp_path / "dev-v2.0.json", purpose="evaluate", version="1.1", skips=skips)
    with pytest.raises(DataError, match=r"so it is SQuAD 1.1; take task squad1"):
        read_squad(tmp_path / "dev-v1.1.json", purpose="evaluate", version="2.0", skips=skips)


def broken_squad(tmp_path, change):
    context, pairs = CONTEXTS["en"]
    article = squad(context, pairs)
    change(article["paragraphs"][0]["qas"][1])
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"data": [article]}, indent=1))
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda qa: qa["answers"][0].update(text="Atlantis"), "stand in its context"),
        (lambda qa: qa["answers"][0].update(answer_start=3), "stand at its answer_start"),
        (lambda qa: qa["answers"][0].update(answer_start=-9), "stand at its answer_start"),
        (lambda qa: qa["answers"][0].update(text=" "), "the answer is empty"),
    ],
)
def test_answers_not_at_their_place_are_skipped_in_training_and_listed(
    tmp_path, skips, change, reason
):
    path = broken_squad(tmp_path, change)
    assert len(read_squad(path, purpose="train", version="any", skips=skips)) == 1
    (listed,) = skips.listed
    assert listed.startswith(f"{path}, question 'q1': ") and reason in listed
    # The official scorer reads texts alone.
    assert len(read_squad(path, purpose="evaluate", version="any", skips=Skips())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda qa: qa.update(question=" \n"), r"train.json, question 'q1': the question is e"),
        (lambda qa: qa.update(question=None), r"question 'q1': question is missing or no text"),
        (lambda qa: qa.update(answers=[]), r"question 'q1': has no answer to learn from"),
        (
            lambda qa: qa.update(is_impossible="false"),
            r"'q1': is_impossible is 'false'; expected true or f",
        ),
        (lambda qa: qa.update(id="q0"), r"train.json: the id 'q0' occurs 2 times"),
        (lambda qa: qa.pop("id"), r"has no id in quotes"),
        (lambda qa: qa["answers"][0].pop("answer_start"), r"needs a text and an integer answer_st"),
    ],
)
def test_questions_that_are_not_right_are_refused(tmp_path, skips, change, message):
    with pytest.raises(DataError, match=message):
        read_squad(broken_squad(tmp_path, change), purpose="train", version="any", skips=skips)


def test_json_of_another_kind_is_refused(tmp_path, skips):
    for text, message in [
        ("[1]", "is a list, not an object"),
        ('{"data": 3}', "no list 'data'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "a paragraph has no context"),
        ('{"data": []}', "holds no question"),
        ('{"data": ', "is not JSON"),
        (r'{"data": [{"title": "so \ude00!"}]}', r"x.json: .*so \\ude00!"),
    ]:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=message):
            read_squad(tmp_path / "x.json", purpose="evaluate", version="any", skips=skips)


def test_mlqa_reads_all_pairs_of_languages(mlqa, skips):
    for part in all_pairs(Part(split="test")):
        data = TaskData(folder=mlqa)
        found = read_part("mlqa", data, part, purpose="evaluate", skips=skips)
        answer = found[0].answers[0]
        assert found[0].context[answer.start : answer.end] == CONTEXTS[part.language][1][0][1]
        assert found[0].question == CONTEXTS[part.question_language][1][0][0]
    train = read_part("mlqa", data, Part(split="train"), purpose="train", skips=skips)
    assert len(train) == 2


def test_a_context_in_another_language_is_refused(mlqa, tmp_path, skips):
    name = "dev-context-{}-question-{}.json"
    chinese = mlqa / "MLQA_V1/dev" / name.format("zh", "zh")
    (tmp_path / name.format("hi", "zh")).write_bytes(chinese.read_bytes())
    with pytest.raises(DataError, match=r"\(contexts\): is said to be 'hi' but .* Cjk letters"):
        read_mlqa(tmp_path, split="dev", language="hi", question_language="zh", skips=skips)
    with pytest.raises(DataError, match=r"no dev-context-en-question-zh.json"):
        read_mlqa(tmp_path, split="dev", language="en", question_language="zh", skips=skips)
    with pytest.raises(ConfigError, match=r"MLQA has no language 'fr'"):
        read_mlqa(tmp_path, split="dev", language="fr", question_language="en", skips=skips)


# A user's own


def test_own_texts_as_tsv_and_jsonl(tmp_path):
    tsv = write_tsv(tmp_path / "a.tsv", ("label", "text"), ("spam", "win"), ("ham", "hi"))
    (tmp_path / "a.jsonl").write_text(
        '{"text": "win", "label": "spam"}\n\n{"text": "hi", "text_pair": "ho", "label": "ham"}\n'
    )
    first, second = read_texts(tsv), read_texts(tmp_path / "a.jsonl")
    assert [e.label for e in first] == [e.label for e in second] == ["spam", "ham"]
    assert (second[1].text_pair, second[1].origin) == ("ho", f"{tmp_path / 'a.jsonl'}:3")
    assert label_names(first, name="a") == ("ham", "spam")
    with pytest.raises(
        DataError, match=r"a.tsv:3: label 'ham' is none of the model's .*: spam, eggs"
    ):
        read_texts(tsv, labels=("spam", "eggs"))
    twice = write_tsv(tmp_path / "b.tsv", ("text", "label", "label"), ("x", "spam", "eggs"))
    with pytest.raises(DataError, match=r"b.tsv:1: column 'label' occurs twice"):
        read_texts(twice)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"}', r"a.jsonl:1: label is missing"),
        ('{"label": "x"}', r"a.jsonl:1: no text 'text'; there is label"),
        ("text", r"a.jsonl:1: is not JSON"),
        ("[]", r"a.jsonl:1: is a list"),
        ('{"text": "x", "label": NaN}', r"a.jsonl:1: label is missing"),
        ('{"text": "x", "label": "pos "}', r"a.jsonl:1: label 'pos ' begins or ends with a space"),
        (
            '{"text": "x", "label": "a\\tb"}',
            r"a.jsonl:1: label 'a\\tb' contains a tab or a line break",
        ),
        (
            '{"text": "x", "label": "a", "id": "1\\n2"}',
            r"id '1\\n2' contains a tab or a line break",
        ),
        (
            '{"text": "x", "label": ["a", "b"]}',
            r'label \["a", "b"\] is a list; expected one class name',
        ),
        ('{"text": "x", "label": {"a": 1}}', r"is a dict; expected one class name"),
        (r'{"text": "so \ud83d!", "label": "x"}', r"a.jsonl:1: .*so \\ud83d!"),
    ],
)
def test_own_texts_that_are_not_right(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "a.jsonl")


def test_a_table_quoted_as_csv_is_not_taken_literally(tmp_path):
    """pandas' and csv's writers quote a cell that holds quotes, whatever divides the columns."""
    texts = ('He said "hi".', '"Hi", he said. "Ho."', '""', '"Hi."')
    with (tmp_path / "a.tsv").open("w") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), (texts[0], "x")])
    with pytest.raises(DataError, match=r'a.tsv:2: "He said ""hi""\." is quoted as in CSV'):
        read_texts(tmp_path / "a.tsv")
    plain = write_tsv(tmp_path / "b.tsv", ("text", "label"), *((text, "x") for text in texts))
    assert [e.text for e in read_texts(plain)] == list(texts)


def test_what_is_optional_may_be_null_or_an_empty_cell(tmp_path, skips):
    """As pandas writes a table in which some rows have it."""
    tsv = write_tsv(
        tmp_path / "a.tsv", ("text", "label", "id", "language"), *2 * [("win", "x", "", "")]
    )
    lines = '{"text": "win", "label": "x", "id": null, "language": null, "text_pair": NaN}\n' * 2
    (tmp_path / "a.jsonl").write_text(lines)
    for file in (tsv, tmp_path / "a.jsonl"):
        found = read_texts(file, language="en")
        assert [(e.id, e.language, e.text_pair) for e in found] == [
            ("0", "en", None),
            ("1", "en", None),
        ]
    row = {"question": "Who?", "context": "In Rome.", "answers": [], "id": None}
    row |= {"language": None, "question_language": None}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    questions = read_questions(tmp_path / "q.jsonl", purpose="evaluate", skips=skips)
    assert [(e.id, e.language, e.question_language) for e in questions] == [
        ("0", "en", "en"),
        ("1", "en", "en"),
    ]


def test_own_files_to_predict_need_no_label(tmp_path):
    file = write_tsv(tmp_path / "a.tsv", ("text",), ("win",))
    assert read_texts(file, hidden=True)[0].label is None
    some = write_tsv(tmp_path / "s.tsv", ("text", "label"), ("win", "x"), ("hi", ""), ("ho", "x"))
    with pytest.raises(DataError, match=r"s.tsv:3: label is missing where 2 of 3 examples have"):
        read_texts(some, hidden=True)
    with pytest.raises(DataError, match=r"a.txt: is none of \.tsv and \.csv"):
        read_texts(tmp_path / "a.txt")
    same = write_tsv(tmp_path / "b.tsv", ("text", "label"), ("win", "x"), ("hi", "x"))
    many = write_tsv(tmp_path / "m.tsv", ("text", "label"), *(("win", str(n)) for n in range(50)))
    with pytest.raises(
        DataError, match=r"label 'x' is none of .*: 0, 1, 10, .*, 26, … \(50 in all\)$"
    ):
        read_texts(same, labels=label_names(read_texts(many), name="m"))
    with pytest.raises(DataError, match="at least two classes"):
        label_names(read_texts(same), name="b")
    case = write_tsv(tmp_path / "c.tsv", ("text", "label"), ("win", "Pos"), ("hi", "pos"))
    with pytest.raises(DataError, match="labels 'Pos' and 'pos' differ only in case"):
        label_names(read_texts(case), name="c")
    with pytest.raises(DataError, match=r"is a folder"):
        (tmp_path / "d.tsv").mkdir()
        read_texts(tmp_path / "d.tsv")


def test_own_scores_are_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": -0.5}\n{"text": "b", "label": "3"}\n')
    assert [e.label for e in read_scores(tmp_path / "a.jsonl")] == [-0.5, 3.0]
    for wrong in ('"good"', "true", "[1]", "Infinity", '"1,5"', "1" + "0" * 400, '"1_000"'):
        (tmp_path / "b.jsonl").write_text(f'{{"text": "a", "label": {wrong}}}\n')
        with pytest.raises(DataError, match=r"b.jsonl:1: label .* is no number; classes are"):
            read_scores(tmp_path / "b.jsonl")
    # Taken for classes they would be learnt as unrelated names.
    with pytest.raises(DataError, match=r"labels are numbers \(-0.5, 3\).*; task scores learns"):
        label_names(read_texts(tmp_path / "a.jsonl"), name="the training set")
    hidden = write_tsv(tmp_path / "h.tsv", ("text", "Label"), ("win", "x"))
    with pytest.raises(DataError, match=r"there is 'Label'; the name is 'label'"):
        read_texts(hidden, hidden=True)
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": true}\n{"text": "b", "label": "x"}\n')
    assert [e.label for e in read_texts(tmp_path / "t.jsonl")] == ["true", "x"]
    (tmp_path / "n.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 1.0}\n')
    assert [e.label for e in read_texts(tmp_path / "n.jsonl")] == ["1", "1"]
    stars = write_tsv(tmp_path / "c.tsv", ("text", "label"), ("win", "1"), ("hi", "5"))
    assert label_names(read_texts(stars), name="c") == ("1", "5")


def test_own_csv_is_quoted_as_spreadsheets_do(tmp_path):
    texts = ('He said "hi", twice.', "two\nlines", "plain", "naïve, über\u2028")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("label", "text"), *(("x", text) for text in texts)])
    found = read_texts(tmp_path / "a.csv")
    assert [e.text for e in found] == list(texts)
    assert [e.origin.rpartition(":")[2] for e in found] == ["2", "3", "5", "6"]
    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f'label;text\nx;"{long}"\ny;"1,5; or 2"\n')
    assert [e.text for e in read_texts(tmp_path / "a.csv")] == [long, "1,5; or 2"]
    for content, message in [
        (
            "text,label\nwin,x,y\n",
            r"a.csv:2: 3 columns instead of 2 \(text, label\); a cell with a ','",
        ),
        ('text,label\n"win" or,x\n', r"a.csv:2: is not CSV \("),
        ('text,label\n"win,x\nhi,y\n', r"a.csv:2: is not CSV \(.*a quote that opens in this row"),
        ("text,label\n,x\n", r"a.csv:2: the text is empty; write one or remove the row"),
        ("text,label,id,id\nwin,x,1,2\n", r"a.csv:1: column 'id' occurs twice"),
        ("text,Label\nwin,x\n", r"no column 'label'"),
        ("text,label,Text_Pair \nwin,x,y\n", r"there is 'Text_Pair '; the name is 'text_pair'"),
        ("text,label\rwin,x\r", r"a.csv:1: lines end in a carriage return alone"),
        ("\ufeff\ntext,label\n", r"a.csv:1: is empty, where the names of the columns belong"),
        ("win,x\nhi,y\n", r"a.csv:1: no column 'text', 'label'; it has 'win', 'x': rename the"),
        ("", r"a.csv: is empty"),
    ]:
        (tmp_path / "a.csv").write_text(content)
        with pytest.raises(DataError, match=message):
            read_texts(tmp_path / "a.csv")


def test_a_table_whose_lines_end_in_carriage_returns_is_said_to_be_one(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\rwin\tspam\rhi\tham\r")
    with pytest.raises(DataError, match=r"a.tsv:1: lines end in a carriage return alone; convert"):
        read_texts(tmp_path / "a.tsv")
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\r\nwin\tspam\r\nhi\tham\r\n")
    assert [e.label for e in read_texts(tmp_path / "a.tsv")] == ["spam", "ham"]


def test_own_questions(tmp_path, skips):
    rows = [
        {
            "question": "Where?",
            "context": "In Rome.",
            "answers": [{"text": "Rome", "answer_start": 3}],
        },
        {"question": "Who?", "context": "In Rome.", "answers": []},
        {"question": "When?", "context": "In Rome.", "answers": [{"text": "x", "answer_start": 3}]},
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    found = read_questions(file, purpose="train", skips=skips)
    assert [e.answers for e in found] == [(Answer(text="Rome", start=3),), ()]
    assert skips.listed == [f"{file}:3: the answer does not stand in its context"]
    file.write_text(json.dumps(rows[0] | {"context": " "}))
    with pytest.raises(DataError, match=r"q.jsonl:1: the context is empty"):
        read_questions(file, purpose="train", skips=skips)
    # Scored, an empty text would be the gold answer of a question that has none.
    file.write_text(json.dumps(rows[0] | {"answers": [{"text": "", "answer_start": 0}]}))
    with pytest.raises(DataError, match=r"q.jsonl:1: an answer is empty; .* answers is empty"):
        read_questions(file, purpose="evaluate", skips=skips)


def test_a_file_of_which_nothing_can_be_learnt_says_why(tmp_path):
    """As where answer_start counts bytes: the file does hold questions."""
    answers = [{"text": "Norway", "answer_start": 9}]
    qas = [{"id": str(i), "question": "Where?", "answers": answers} for i in range(3)]
    paragraph = {"context": "Élan in Norway.", "qas": qas}
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    rows = [json.dumps(qa | {"context": "Élan in Norway."}) for qa in qas]
    (tmp_path / "q.jsonl").write_text("\n".join(rows))
    for name, first in (("q.json", "q.json, question '0'"), ("q.jsonl", "q.jsonl:1")):
        with pytest.raises(
            DataError,
            match=rf"{name}: every question is left out: skipped 3: the "
            rf"answer does not stand at its answer_start; .*{first}: the answer",
        ):
            read_questions(tmp_path / name, purpose="train", skips=Skips())
    row = ("0", "a", "b", "-")
    write_tsv(tmp_path / "dev_matched.tsv", ("index", "sentence1", "sentence2", "gold_label"), row)
    with pytest.raises(DataError, match="every example is left out: skipped 1: no gold label"):
        read_glue(tmp_path, task="mnli", split="dev", skips=Skips())


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_questions_without_answers_are_not_taken_for_unanswerable_ones(tmp_path, suffix):
    """Only an empty list says that there is none: a key may be misspelt, or the answers hidden."""
    file = tmp_path / f"q{suffix}"
    context = "In Rome."

    def read(*rows, hidden, purpose="evaluate"):
        questions = [{"id": str(i), "question": "Where?", **row} for i, row in enumerate(rows)]
        if suffix == ".json":
            paragraphs = [{"context": context, "qas": questions}]
            file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
        else:
            file.write_text("\n".join(json.dumps(q | {"context": context}) for q in questions))
        return read_questions(file, purpose=purpose, skips=Skips(), hidden=hidden)

    gold = [{"text": "Rome", "answer_start": 3}]
    misspelt = {"answer": gold}
    origin = rf"q{suffix}(:2|, question '1')"
    for purpose in ("train", "evaluate"):
        with pytest.raises(
            DataError, match=rf"{origin}: answers is missing beside id, que.*answer"
        ):
            read({"answers": gold}, misspelt, purpose=purpose, hidden=False)
    assert [example.answers for example in read(misspelt, misspelt, hidden=True)] == [None, None]
    empty = {"answers": []}
    assert [example.answers for example in read(empty, empty, hidden=True)] == [(), ()]
    with pytest.raises(
        DataError, match=rf"{origin}: answers is missing where 2 of 3 examples have"
    ):
        read(empty, misspelt, empty, hidden=True)
    for wrong, message in [
        (
            {"text": ["Rome"], "answer_start": [3]},
            "answers is a dict; expected a list of objects",
        ),
        (["Rome"], "an answer needs a text and an integer answer_start"),
    ]:
        with pytest.raises(DataError, match=message):
            read({"answers": wrong}, hidden=False)


def test_own_data_of_one_language(tmp_path):
    """Ids are those of the whole file; what is in another language is not this part's business."""
    rows = [("a", "de"), ("b", "fr"), ("c", "de")]
    columns = ("text", "language", "label")
    texts = write_tsv(tmp_path / "a.tsv", columns, *((*row, "x") for row in rows))
    questions = tmp_path / "q.jsonl"
    objects = [{"question": q, "context": "In Rome.", "language": code} for q, code in rows]
    answers = [{"text": "Atlantis", "answer_start": 3}], [], []
    lines = [json.dumps(o | {"answers": a}) for o, a in zip(objects, answers, strict=True)]
    questions.write_text("\n".join(lines))

    def read(task, language, skips):
        data = TaskData(train=texts if task == "texts" else questions)
        part = Part(split="train", language=language)
        return [e.id for e in read_part(task, data, part, purpose="train", skips=skips)]

    for task, first in (("texts", ["0"]), ("questions", [])):
        assert read(task, "", Skips()) == [*first, "1", "2"]
        assert read(task, "de", Skips()) == [*first, "2"]
        skips = Skips()
        assert read(task, "fr", skips) == ["1"] and not skips.counts
        with pytest.raises(DataError, match=r": no row has language 'it'; it has de, fr"):
            read(task, "it", Skips())
    write_squad(tmp_path)
    data = TaskData(train=tmp_path / "train-v1.1.json")
    part = Part(split="train", language="de")
    with pytest.raises(DataError, match=r"SQuAD's format names no language, so none can be chosen"):
        read_part("questions", data, part, purpose="train", skips=Skips())


def test_data_comes_from_one_place(tmp_path):
    for given in (
        {},
        {"folder": tmp_path, "tfds": tmp_path},
        {"folder": tmp_path, "dev": tmp_path},
    ):
        with pytest.raises(ConfigError, match="give one of folder, tfds, or own files"):
            TaskData(**given)
    with pytest.raises(ConfigError, match="needs a file for split 'dev'"):
        data = TaskData(train=tmp_path)
        read_part("texts", data, Part(split="dev"), purpose="evaluate", skips=Skips())


def test_a_file_that_is_not_there_is_told_with_its_option_and_its_neighbours(tmp_path):
    for name in ("cases.tsv", "b.csv", ".hidden.tsv"):
        (tmp_path / name).write_text("text\tlabel\n")
    data = TaskData(train=tmp_path / "cases.tsv", dev=tmp_path / "dev.tsv")
    with pytest.raises(
        DataError,
        match=r"dev\.tsv: no such file, .*with --data\.dev; beside it there is cases\.tsv, b\.csv$",
    ):
        read_part("texts", data, Part(split="dev"), purpose="evaluate", skips=Skips())
