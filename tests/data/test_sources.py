import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilm_jax.data import sources
from minilm_jax.data.skipped import Skipped
from minilm_jax.data.sources import Part, Stretch, TextSource, read_documents, read_part
from minilm_jax.errors import DataError


def texts(*paths, skipped=None, **settings):
    source = TextSource(paths=tuple(map(str, paths)), **settings)
    return [document.text for document in read_documents(source, skipped=skipped)]


def test_blank_lines_separate_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n\n \n\nthree\n")
    assert texts(tmp_path / "a.txt") == ["one\ntwo", "three"]


def test_lines_and_whole_files_can_be_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert texts(tmp_path / "a.txt", documents="line") == ["one", "two"]
    assert texts(tmp_path / "a.txt", documents="file") == ["one\n\ntwo"]


def test_a_file_of_markup_is_a_document_unless_told_otherwise(tmp_path):
    """Its blank lines end paragraphs: a page of documentation would be read in shreds."""
    (tmp_path / "a.md").write_text("# Title\n\ntext\n")
    with gzip.open(tmp_path / "b.RST.gz", "wt") as file:
        file.write("one\n\ntwo")
    (tmp_path / "c.txt").write_text("three\n\nfour")
    assert texts(tmp_path) == ["# Title\n\ntext", "one\n\ntwo", "three", "four"]
    assert len(texts(tmp_path, documents="blank-line")) == 6
    assert texts(tmp_path / "a.md", documents="line") == ["# Title", "text"]


def test_a_folder_is_read_in_the_order_of_names_with_all_known_formats(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "a.txt").write_text("one")
    with gzip.open(tmp_path / "a2.txt.gz", "wt") as file:
        file.write("two")
    (tmp_path / "notes.pdf").write_text("not text")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert texts(tmp_path) == ["one", "two", "three", "four"]


def test_what_leads_to_a_text_and_is_not_read_hides_it_from_nobody(tmp_path):
    """A link whose name has no ending stands before the file, in the order of names."""
    (tmp_path / "b.txt").write_text("one")
    (tmp_path / "a").symlink_to(tmp_path / "b.txt")
    skipped = Skipped()
    assert texts(tmp_path, skipped=skipped) == ["one"]
    assert not skipped.counts


def test_machine_docs_need_no_path():
    first = next(read_documents(TextSource(format="machine-docs", language="xx")))
    assert first.language == "en" and len(first.text) > 100


def test_the_language_comes_from_the_setting_the_column_the_file_or_the_folder(tmp_path):
    (tmp_path / "sw").mkdir()
    path = tmp_path / "sw" / "ur.news.jsonl"
    path.write_text('{"text": "a", "lang": "hi"}\n')
    for how, expected in (("setting", "de"), ("column", "hi"), ("file", "ur"), ("folder", "sw")):
        source = TextSource(
            paths=(str(path),), language="de", language_from=how, language_column="lang"
        )
        assert [d.language for d in read_documents(source)] == [expected]


def test_a_text_file_has_no_column_to_take_the_language_from(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "language": "hi"}\n')
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match=r"b.txt: a text file has no column 'language'; set"):
        texts(tmp_path, language_from="column")
    assert texts(tmp_path / "*.jsonl", language_from="column") == ["a"]


def test_a_file_that_gives_nothing_is_counted(tmp_path):
    """A language that is missing would not be missed otherwise."""
    for name, content in {"de": "", "en": "text", "fr": "\n\n \n", "it": "\ufeff"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    (tmp_path / "ru.txt").write_bytes(b"\xff")
    skipped = Skipped()
    assert texts(tmp_path, skipped=skipped) == ["text"]
    assert skipped.counts == {"no document in a file": 3, "broken utf-8": 1}


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "bb", "ccc ccc", "é"]), max_size=30),
    size=st.integers(1, 40),
    documents=st.sampled_from(["blank-line", "line"]),
)
def test_any_cutting_of_a_file_gives_its_documents_once(tmp_path_factory, lines, size, documents):
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_text(
        "\n".join(f"{line}{i}" if line.strip() else line for i, line in enumerate(lines))
    )
    source = TextSource(paths=(str(path),), documents=documents)
    length = path.stat().st_size
    whole = Part(source, (Stretch(str(path), "text"),))
    expected = list(read_part(whole, skipped=Skipped()))
    found = []
    for start in range(0, length, size):
        stretch = Stretch(str(path), "text", start, min(start + size, length))
        found += read_part(Part(source, (stretch,)), skipped=Skipped())
    assert found == expected


def test_a_large_file_is_cut_into_parts_that_share_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_PART", 1000)
    lines = [f"document {i}" for i in range(2000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    source = TextSource(paths=(str(tmp_path),), documents="line")
    parts = sources.split_source(source)
    assert len(parts) > 20
    assert len({part.key for part in parts}) == len(parts)
    assert [d.text for d in read_documents(source)] == lines


def test_what_is_left_out_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nbr\xffken\n\n" + b"x" * 500 + b"\n\nend\n")
    skipped = Skipped()
    assert texts(tmp_path / "a.txt", skipped=skipped, longest_document=100) == ["good", "end"]
    assert skipped.counts == {"broken utf-8": 1, "too long": 1}
    assert (
        texts(tmp_path / "a.txt", broken_text="replace", longest_document=100)[1] == "br\ufffdken"
    )


def test_json_lines_that_are_no_records_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "good"}\n{"text": \n[1]\n{"text": null}\n{"other": 1}\n{"text": "  "}\n'
        '{"text": "half \\ud800 pair"}\n'
    )
    skipped = Skipped()
    assert texts(tmp_path / "a.jsonl", skipped=skipped) == ["good", "half \ufffd pair"]
    assert skipped.counts == {"broken json": 2, "no text": 2, "empty": 1}


def test_a_missing_column_names_those_that_are_there(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 3}\n')
    with pytest.raises(DataError, match="no column 'text'; it has content, id"):
        texts(tmp_path / "a.jsonl")


def test_a_column_is_missing_from_the_file_and_not_from_where_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_PART", 1000)
    rows = [f'{{"text": "document {i}"}}' for i in range(100)] + ['{"pad": 1}'] * 300
    for found, lines in ((True, rows), (False, rows[::-1])):
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        skipped = Skipped()
        parts = sources.split_source(TextSource(paths=(str(tmp_path),)))
        assert len(parts) > 3
        for part in parts:
            if found:
                assert all(d.text.startswith("document") for d in read_part(part, skipped=skipped))
            else:
                with pytest.raises(DataError, match="no column 'text'; it has pad"):
                    next(read_part(part, skipped=skipped))
        assert skipped.counts == ({"no text": 300} if found else {})


def test_a_json_array_is_refused_wherever_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALLEST_PART", 100)
    (tmp_path / "a.json").write_text("[\n" + '{"text": "x"},\n' * 30 + "]")
    parts = sources.split_source(TextSource(paths=(str(tmp_path),)))
    assert len(parts) > 3
    for part in parts:
        with pytest.raises(DataError, match="one JSON array"):
            next(read_part(part, skipped=Skipped()))


def test_a_truncated_gzip_is_an_error_or_a_counted_break(tmp_path):
    whole = gzip.compress("\n\n".join(f"document number {i}" for i in range(5000)).encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.txt\.gz.*broken"):
        texts(tmp_path / "a.txt.gz")
    skipped = Skipped()
    found = texts(tmp_path / "a.txt.gz", skipped=skipped, broken_files="keep")
    assert len(found) > 100 and skipped.counts == {"broken file": 1}


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_without_a_byte_is_broken(tmp_path, ending):
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt\..*is broken"):
        texts(path)
    skipped = Skipped()
    assert texts(path, skipped=skipped, broken_files="keep") == []
    assert skipped.counts == {"broken file": 1}


def test_a_file_is_read_once_however_often_it_is_reached(tmp_path):
    folder = tmp_path / "text"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "b" / "b.txt").write_text("two")
    (folder / "b" / "round").symlink_to(folder)
    (folder / "c").symlink_to(folder / "b")
    (folder / "d.txt").symlink_to(folder / "a.txt")
    assert texts(folder) == ["one", "two"]
    assert texts(f"{folder}/*", folder / "c", folder / "d.txt") == ["one", "two"]
    assert texts(folder / "d.txt", folder) == ["one", "two"]
    (folder / "e.txt").symlink_to(folder / "absent.txt")
    with pytest.raises(DataError, match=r"e\.txt: cannot be read \(No such file"):
        texts(folder)


def test_paths_that_lead_nowhere_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        texts(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="known ending"):
        texts(tmp_path)
    with pytest.raises(DataError, match="needs paths"):
        TextSource()
    (tmp_path / "a.txt").write_text('{"text": "one"}')
    assert texts(tmp_path / "a.txt", format="jsonl") == ["one"]
    with pytest.raises(DataError, match="no file ends as jsonl does; name the file in full"):
        texts(tmp_path / "*.txt", format="jsonl")


def test_empty_files_have_no_documents(tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert texts(tmp_path) == []


def test_what_is_left_out_is_told_with_the_first_files(tmp_path):
    for number in range(5):
        (tmp_path / f"latin{number}.txt").write_bytes("é\n\nà\n\nplain".encode("latin-1"))
    (tmp_path / "good.txt").write_text("é")
    (tmp_path / "figure.png").write_bytes(b"")
    skipped = Skipped()
    assert len(texts(tmp_path, skipped=skipped)) == 6
    broken, other = skipped.lines()
    first = ", ".join(str(tmp_path / f"latin{number}.txt") for number in range(3))
    assert broken == f"10 broken utf-8: {first}, …"
    assert other == f"1 file of another kind: {tmp_path / 'figure.png'}"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.csv", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_the_way_out(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("\ufefftext\none\n\ntwo\n".encode(encoding))
    (tmp_path / "b.txt").write_text("good")
    with pytest.raises(DataError, match=rf"{name}: is UTF-16; convert it to UTF-8 \(iconv does\)"):
        texts(tmp_path)
    skipped = Skipped()
    assert texts(tmp_path, broken_files="keep", skipped=skipped) == ["good"]
    assert skipped.lines() == [f"1 broken file: {tmp_path / name}"]


@pytest.mark.parametrize("ending", [".csv", ".CSV.gz"])
def test_a_row_of_a_csv_is_a_document(tmp_path, ending):
    rows = '\ufefflang,text\nen,"one, two\nand ""three"""\n\nde,vier\nxx\nen,\nfr,"br\udce9ken"\n'
    raw = rows.encode("utf-8", "surrogateescape")
    (tmp_path / f"a{ending}").write_bytes(gzip.compress(raw) if ending != ".csv" else raw)
    source = TextSource(paths=(str(tmp_path),), language_from="column", language_column="lang")
    skipped = Skipped()
    found = list(read_documents(source, skipped=skipped))
    assert [d.text for d in found] == ['one, two\nand "three"', "vier"]
    assert [d.language for d in found] == ["en", "de"]
    assert skipped.counts == {"row of another width": 1, "empty": 1, "broken utf-8": 1}


def test_semicolons_may_divide_a_csv_and_quotes_of_a_tsv_are_text(tmp_path):
    (tmp_path / "a.csv").write_text('id;text\n1;"one, two"\n')
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"three" and\n2\t"four\n')
    assert texts(tmp_path) == ["one, two", '"three" and', '"four']


def test_a_csv_says_what_it_lacks_and_where_it_breaks(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sentence,label\none,1\n")
    with pytest.raises(DataError, match="no column 'text'; it has label, sentence: set text_col"):
        texts(path)
    assert texts(path, text_column="sentence") == ["one"]
    with pytest.raises(DataError, match=r"no column 'language'; .* set language_column"):
        texts(path, text_column="sentence", language_from="column")
    path.write_text('text\none\n"two\n')
    with pytest.raises(DataError, match=r"is not CSV .* put a cell with a quote in it in quotes"):
        texts(path)
    assert texts(path, broken_files="keep") == ["one"]
    path.write_text("")
    with pytest.raises(DataError, match="no column 'text'; it has none"):
        texts(path)


def test_a_cell_of_a_csv_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{"word " * 50_000}"\nshort\n')
    assert [len(text) for text in texts(tmp_path)] == [250_000, 5]
    assert texts(tmp_path, longest_document=1000) == ["short"]
