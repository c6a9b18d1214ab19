"""Formats of the optional extra: Parquet, Arrow, Hugging Face folders, tfds, zstandard."""

import hashlib
import json
import sys

import numpy as np
import pytest

from minilm_jax.data import sources
from minilm_jax.data.readers import _ZstdFile
from minilm_jax.data.skipped import Skipped
from minilm_jax.data.sources import TextSource, read_documents
from minilm_jax.errors import DataError

TEXTS = [f"document number {i}" for i in range(50)]


def texts(path, *, skipped=None, **settings):
    source = TextSource(paths=(str(path),), **settings)
    return [d.text for d in read_documents(source, skipped=skipped)]


@pytest.fixture
def table():
    arrow = pytest.importorskip("pyarrow")
    codes = ["en" if i % 2 else "de" for i in range(50)]
    return arrow.table({"id": list(range(50)), "text": TEXTS, "language": codes})


def test_parquet_is_cut_at_row_groups(table, tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr(sources, "_SMALLEST_PART", 500)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    source = TextSource(paths=(str(tmp_path),), language_from="column")
    assert len(sources.split_source(source)) > 2
    found = list(read_documents(source))
    assert [d.text for d in found] == TEXTS
    assert [d.language for d in found[:2]] == ["de", "en"]


def test_the_longest_document_of_a_table_is_measured_in_bytes(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"text": ["ééé", "éé", "eeeee"]}), tmp_path / "a.parquet")
    skipped = Skipped()
    assert texts(tmp_path, longest_document=5, skipped=skipped) == ["éé", "eeeee"]
    assert skipped.counts == {"too long": 1}


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_streams_and_files(table, tmp_path, kind):
    from pyarrow import ipc

    new = ipc.new_stream if kind == "stream" else ipc.new_file
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    assert texts(tmp_path / "a.arrow") == TEXTS


def test_hugging_face_folders_keep_their_shards_order_and_split(table, tmp_path):
    from pyarrow import ipc

    for split, rows in (("train", slice(0, 40)), ("test", slice(40, 50))):
        (tmp_path / split).mkdir()
        names = []
        part = table.slice(rows.start, rows.stop - rows.start)
        for i, shard in enumerate((part.slice(0, 6), part.slice(6))):
            # Named so that sorting by name would turn them round.
            names.append(f"data-{9 - i}.arrow")
            with ipc.new_stream(str(tmp_path / split / names[-1]), table.schema) as writer:
                writer.write_table(shard)
        state = {"_data_files": [{"filename": name} for name in names]}
        (tmp_path / split / "state.json").write_text(json.dumps(state))
        (tmp_path / split / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert texts(tmp_path) == TEXTS[:40]
    assert texts(tmp_path, split="test") == TEXTS[40:]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        texts(tmp_path, split="dev")
    (tmp_path / "train" / "data-9.arrow").unlink()
    with pytest.raises(DataError, match=r"data-9\.arrow: missing"):
        texts(tmp_path)


def test_a_table_without_the_column_or_without_text_says_so(table, tmp_path):
    from pyarrow import parquet

    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'content'; it has id, language, text"):
        texts(tmp_path, text_column="content")
    with pytest.raises(DataError, match="'id' holds int, not text"):
        texts(tmp_path, text_column="id")


@pytest.mark.parametrize("cut", [10, 400])
def test_a_broken_table_is_named(table, tmp_path, cut):
    from pyarrow import parquet

    parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:cut])
    with pytest.raises(DataError, match=r"a\.parquet.*broken"):
        texts(tmp_path)


def test_a_text_of_one_line_over_and_over_is_inflated_a_part_at_a_time(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    text = b"the same line\n" * (5 << 20)
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor().compress(text))
    read = hashlib.sha256()
    with _ZstdFile(str(tmp_path / "a.zst")) as file:
        while part := file.read(1 << 20):
            assert len(file._rest) < len(text) // 1.2
            read.update(part)
    assert read.digest() == hashlib.sha256(text).digest()


def test_zstandard_frames_and_a_file_that_breaks_off(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor().compress
    halves = ["\n\n".join(TEXTS[:20]) + "\n\n", "\n\n".join(TEXTS[20:])]
    whole = b"".join(compress(half.encode()) for half in halves)
    (tmp_path / "a.txt.zst").write_bytes(whole)
    assert texts(tmp_path) == TEXTS
    (tmp_path / "a.txt.zst").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.zst.*ends inside a frame"):
        texts(tmp_path)
    skipped = Skipped()
    assert texts(tmp_path, broken_files="keep", skipped=skipped)[:20] == TEXTS[:20]
    assert skipped.counts == {"broken file": 1}
    (tmp_path / "a.txt.zst").write_bytes(b"not zstandard at all")
    with pytest.raises(DataError, match="broken"):
        texts(tmp_path)


def test_what_the_extra_brings_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"\x28")
    with pytest.raises(
        DataError, match=r"zstandard; install it: pip install 'minilm_jax\[corpora\]'"
    ):
        texts(tmp_path)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A data set prepared without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int32})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, text in enumerate(TEXTS):
                yield i, {"text": text, "n": i}

    folder = tmp_path_factory.mktemp("tfds")
    Tiny.pkg_dir_path = tfds.core.Path(folder)  # else it looks for a package around this file
    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.mark.filterwarnings("ignore")
def test_tfds_is_read_without_tensorflow(tfds_folder):
    found = texts(tfds_folder, format="tfds")
    assert sorted(found) == sorted(TEXTS)
    assert "tensorflow" not in sys.modules
    with pytest.raises(DataError, match="no split 'dev'; it has train"):
        texts(tfds_folder, format="tfds", split="dev")
    with pytest.raises(DataError, match="no column 'story'; it has n, text"):
        texts(tfds_folder, format="tfds", text_column="story")
    with pytest.raises(DataError, match="no_such_data_set"):
        texts("no_such_data_set", format="tfds")
