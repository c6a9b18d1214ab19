"""The same examples by name from tensorflow-datasets, prepared without TensorFlow or network."""

import hashlib
import json
import sys
import zipfile

import pytest
from official_files import CONTEXTS, SENTENCES, write_glue, write_mlqa, write_xnli

from minilm_jax.errors import ConfigError, DataError
from minilm_jax.tasks.catalog import Part, TaskData, read_part
from minilm_jax.tasks.examples import Skips
from minilm_jax.tasks.tfds_source import prepare

pytestmark = pytest.mark.filterwarnings("ignore")  # of tensorflow-datasets and what it imports


@pytest.fixture
def tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    import tensorflow_datasets.question_answering
    import tensorflow_datasets.text  # noqa: F401

    return tfds


def zip_folder(folder, target, *, inside):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{inside}/{path.relative_to(folder)}")


def expect(monkeypatch, tfds, name, files):
    """Puts our small files' checksums in the place of the published ones."""
    cls = tfds.builder_cls(name.split("/")[0])
    ours = {path.name: path for path in files.iterdir()}
    infos = {
        url: type(info)(
            size=ours[info.filename].stat().st_size,
            checksum=hashlib.sha256(ours[info.filename].read_bytes()).hexdigest(),
            filename=info.filename,
        )
        if info.filename in ours
        else info
        for url, info in cls.url_infos.items()
    }
    monkeypatch.setattr(cls, "url_infos", infos)


def read(task, folder, split, *, purpose="evaluate", skips=None, **part):
    return read_part(
        task,
        TaskData(tfds=folder),
        Part(split=split, **part),
        purpose=purpose,
        skips=skips or Skips(),
    )


def test_glue_and_squad_and_xnli_and_mlqa_by_name(tfds, monkeypatch, tmp_path):
    files, data = tmp_path / "files", tmp_path / "data"
    files.mkdir()
    zip_folder(write_glue(tmp_path / "glue") / "CoLA", files / "CoLA.zip", inside="CoLA")
    zip_folder(write_xnli(tmp_path / "x") / "XNLI-1.0", files / "XNLI-1.0.zip", inside="XNLI-1.0")
    mlqa = write_mlqa(tmp_path / "m")
    zip_folder(mlqa / "MLQA_V1", files / "MLQA_V1.zip", inside="MLQA_V1")
    squad = json.loads((mlqa / "train-v1.1.json").read_text())
    squad["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    (mlqa / "train-v1.1.json").write_text(json.dumps(squad))
    for name in ("train-v1.1.json", "dev-v1.1.json"):
        (files / name).write_bytes((mlqa / name).read_bytes())
    for name in ("glue/cola", "xnli", "mlqa/zh", "squad/v1.1"):
        with monkeypatch.context() as patch:
            expect(patch, tfds, name, files)
            prepare(name, data_dir=data, files=files)

    for split in ("train", "dev"):
        plain = read_part(
            "cola",
            TaskData(folder=tmp_path / "glue"),
            Part(split=split),
            purpose="evaluate",
            skips=Skips(),
        )
        found = read("cola", data, split)
        assert sorted((e.text, e.label) for e in found) == sorted((e.text, e.label) for e in plain)
    assert {e.label for e in read("cola", data, "test")} == {None}

    for language in ("de", "ur"):
        found = read("xnli", data, "test", language=language)
        assert {e.text for e in found} == {SENTENCES[language][0]}
        assert {e.label for e in found} == {"entailment", "neutral", "contradiction"}

    (context, pairs), found = CONTEXTS["zh"], read("mlqa", data, "test", language="zh")
    assert {(e.question, e.answers[0].text) for e in found} == set(pairs)
    assert found[0].context == context and found[0].language == "zh"
    trained = read("mlqa", data, "train")
    assert {e.answers[0].text for e in trained} == {a for _, a in CONTEXTS["en"][1]}
    assert len(read("squad1", data, "dev")) == 2
    # What the files cannot teach, the same questions by name cannot either.
    skips = Skips()
    learnt = read("squad1", data, "train", purpose="train", skips=skips)
    plain = read_part(
        "squad1", TaskData(folder=mlqa), Part(split="train"), purpose="train", skips=Skips()
    )
    assert [e.answers for e in learnt] == [e.answers for e in plain] and len(learnt) == 1
    assert skips.lines()[0] == "skipped 1: the answer does not stand at its answer_start"
    assert "tensorflow" not in sys.modules

    with pytest.raises(ConfigError, match="no cross-language pair such as test-zh-en"):
        read("mlqa", data, "test", language="zh", question_language="en")
    with pytest.raises(ConfigError, match="no translated training set for 'de'"):
        read("xnli", data, "train", language="de")
    with pytest.raises(ConfigError, match="cola has no split 'dev-mm'"):
        read("cola", data, "dev-mm")


def test_a_damaged_archive_leaves_nothing_that_looks_whole(tfds, monkeypatch, tmp_path):
    files, data = tmp_path / "files", tmp_path / "data"
    files.mkdir()
    archive = files / "CoLA.zip"
    zip_folder(write_glue(tmp_path / "glue") / "CoLA", archive, inside="CoLA")
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        last = opened.infolist()[-1].header_offset  # the files before it can be extracted
    damaged = bytearray(whole)
    damaged[last + 60] ^= 1
    for broken, reason in [(bytes(damaged), "CRC-32"), (whole[:last], "not a zip file")]:
        archive.write_bytes(broken)
        for _ in range(2):
            with pytest.raises(DataError, match=rf"CoLA.zip: is no whole .*{reason}.*fetch it aga"):
                prepare("glue/cola", data_dir=data, files=files)
    archive.write_bytes(whole)
    expect(monkeypatch, tfds, "glue/cola", files)
    prepare("glue/cola", data_dir=data, files=files)
    assert len(read("cola", data, "train")) == 12


def test_what_is_missing_is_named(tfds, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="xnli is not prepared in"):
        read("xnli", tmp_path / "data", "test")

    def unreachable(self, **_):
        raise ConnectionError("no route to host\nand ten more lines")

    monkeypatch.setattr(tfds.builder_cls("squad"), "download_and_prepare", unreachable)
    message = r"\(no route to host\); put these files into .*: dev-v1.1.json, .*train-v1\.1"
    with pytest.raises(DataError, match=message):
        prepare("squad/v1.1", data_dir=tmp_path / "data", files=tmp_path)
