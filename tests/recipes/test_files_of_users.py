"""Files of users: every reader gives the right rows, or a sentence with file and line."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf.adapters.store.corpus import read_corpus
from nutgraf.benchmarks.rows import append_rows, read_rows
from nutgraf.compressors.core.textfiles import check_strings, kind_of, read_json_lines, read_text
from nutgraf.recipes.data.corpus import parse_record, read_documents, read_pairs, read_records
from nutgraf.recipes.data.overlap import HeldOut

ROW = {"question": "When?", "answers": ["1901"], "passages": [{"title": "t", "text": "In 1901."}], "gold": 0}
READERS = {
    "records": read_records,
    "pairs": lambda path: list(read_pairs(path)),
    "corpus": lambda path: list(read_corpus(path)),
    "results": read_rows,
}


def write(folder: Path, *rows: object, name: str = "x.jsonl", before: str = "") -> Path:
    path = folder / name
    path.write_text(before + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# -- shapes of question rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ("1901", ("1901",)),
        (["1901", " 1902 ", ""], ("1901", "1902")),
        ({"text": ["1901"], "answer_start": [3]}, ("1901",)),
        ({"text": "1901"}, ("1901",)),
        ([{"text": "1901", "answer_start": 3}], ("1901",)),
        ([], ()),
    ],
)
def test_one_string_is_one_answer(tmp_path, answers, wanted):
    assert read_records(write(tmp_path, ROW | {"answers": answers}))[0].answers == wanted
    squad = {"question": "When?", "context": "In 1901.", "answers": answers}
    (record,) = read_records(write(tmp_path, squad))
    assert record.answers == wanted
    assert (record.gold, record.passages) == (0 if answers else None, ("In 1901.",))


def test_passages_may_be_texts_and_ids_numbers(tmp_path):
    row = ROW | {"passages": ["In 1901.", {"text": "Later.", "title": None}], "id": 7, "source": None}
    (record,) = read_records(write(tmp_path, row))
    assert record.passages == ("In 1901.", "Later.")
    assert (record.titles, record.id, record.source) == (("", ""), "7", "")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"answers": [1901]}, "answers.0=1901"),
        ({"answers": 1901}, "answers=1901"),
        ({"answers": None}, "answers=null"),
        ({"answers": {"value": "1901"}}, "answers="),
        ({"answers": ["a", None]}, "answers.1=null"),
        ({"answers": [["1901"]]}, "answers.0="),
        ({"question": None}, "question=null"),
        ({"question": ["When?"]}, "question="),
        ({"question": " "}, "blank"),
        ({"gold": "0"}, 'gold="0"'),
        ({"gold": True}, "gold=true"),
        ({"gold": 0.5}, "gold=0.5"),
        ({"gold": 1}, "gold=1 but 1 passages"),
        ({"gold": -1}, "gold=-1"),
        ({"passages": "In 1901."}, "passages="),
        ({"passages": [{"contents": "In 1901."}]}, "passages.0.text"),
        ({"passages": [{"text": None}]}, "passages.0.text=null"),
        ({"passages": [3]}, "passages.0=3"),
        ({"passages": [{"text": "a", "title": 3}]}, "passages.0.title=3"),
        ({"passages": {"text": ["In 1901."]}}, "passages="),
        ({"half": 1}, "half=1"),
        ({"source": ["squad"]}, "source="),
    ],
)
def test_other_shapes_are_refused_with_file_and_line(tmp_path, change, field):
    path = write(tmp_path, ROW, ROW | change)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2 ")) as caught:
        read_records(path)
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_squad_row_without_text_is_refused():
    with pytest.raises(ValueError, match=r"passages\.0\.text=null"):
        parse_record({"question": "When?", "context": None, "answers": []})
    with pytest.raises(ValueError, match="lacks answers, passages"):
        parse_record({"question": "When?"})


def test_pairs_hold_two_strings(tmp_path):
    path = write(tmp_path, {"original": "a b", "compressed": None})
    with pytest.raises(ValueError, match="line 1 has compressed=null"):
        list(read_pairs(path))


# -- every reader ------------------------------------------------------------------------------------------------------

names = st.sampled_from(["question", "answers", "passages", "gold", "text", "title", "context", "id", "source", "half"])
more_names = st.sampled_from(["original", "compressed", "contents", "suite", "dataset", "method", "f1"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | more_names | st.text(), inner, max_size=4),
    max_leaves=12,
)
near = st.builds(lambda changes: ROW | changes, st.dictionaries(names, values, max_size=3))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=values | near)
def test_rows_of_any_shape_are_read_or_refused_with_file_and_line(tmp_path, reader, row):
    path = write(tmp_path, row)
    found, said = [], ""
    try:
        found = READERS[reader](path)
    except ValueError as error:
        said = str(error)
    assert not said or f"{path}, line 1 " in said
    assert "\n" not in said
    for record in found if reader == "records" else ():
        assert all(isinstance(text, str) for text in (record.question, *record.answers, *record.passages))
        assert isinstance(row, dict)
        if isinstance(row["answers"], str):
            assert record.answers == ((row["answers"].strip(),) if row["answers"].strip() else ())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"gold": ' + "1" * 5000 + "}", "digits"),
        ('{"a": ', "not JSON"),
        ("\x00", "not JSON"),
    ],
)
def test_bad_json_is_named(tmp_path, reader, bad, sentence):
    path = tmp_path / "x.jsonl"
    good = {"pairs": {"original": "a", "compressed": "b"}, "corpus": {"text": "a"}, "results": {"n": 1}}.get(
        reader, ROW
    )
    path.write_text(json.dumps(good) + "\n\n" + bad)
    with pytest.raises(ValueError, match=f"line 3 .*{sentence}"):
        READERS[reader](path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "x.jsonl"
    path.write_bytes((json.dumps(ROW) + "\n").encode() + '{"question": "Müller?"}'.encode(encoding))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        read_records(path)


@pytest.mark.parametrize("name", ["x.xz", "x.gz"])
def test_torn_archives_are_named(tmp_path, name):
    packed = {"x.xz": lzma.compress, "x.gz": gzip.compress}[name](b"\n".join(b'{"a": %d}' % i for i in range(9999)))
    (tmp_path / name).write_bytes(packed[:-20])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        list(read_json_lines(tmp_path / name))


def test_byte_order_marks_are_no_text(tmp_path):
    mark = "\ufeff"
    assert read_records(write(tmp_path, ROW, before=mark))[0].question == "When?"
    assert read_rows(write(tmp_path, {"suite": "speed"}, before=mark)) == [{"suite": "speed"}]
    assert next(read_pairs(write(tmp_path, {"original": "a", "compressed": "b"}, before=mark))) == ("a", "b")
    assert [p.text for p in read_corpus(write(tmp_path, {"text": "a"}, before=mark))] == ["a"]
    text = tmp_path / "x.txt"
    text.write_text(f"{mark}first\n\n{mark}second\n<|doc|>\n{mark}third", encoding="utf-8")
    assert [p.text for p in read_corpus(text)] == ["first", "second\n<|doc|>\nthird"]
    assert list(read_documents(text)) == ["first\n\nsecond", "third"]
    assert read_text(text).startswith("first")


def test_endings_are_read_in_any_case(tmp_path):
    assert [kind_of(Path(name)) for name in ("A.JSONL", "b.Jsonl.XZ", "c.TXT.gz", "d")] == [
        ".jsonl", ".jsonl", ".txt", "",
    ]  # fmt: skip
    (tmp_path / "A.TXT").write_text("one")
    write(tmp_path, {"text": "two"}, name="B.JSONL")
    (tmp_path / "C.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "three"}'))
    (tmp_path / ".hidden").write_text("")
    assert [p.text for p in read_corpus(tmp_path)] == ["one", "two", "three"]
    held = HeldOut.from_files([write(tmp_path, ROW | {"question": "a b c d e f?"}, name="Q.JSONL")])
    assert held.has_question("A B C D E F")


def test_other_files_of_a_folder_are_told(tmp_path):
    write(tmp_path, {"text": "a"})
    for name in ("b.json", "c.csv", "d.pdf"):
        (tmp_path / name).write_text("b")
    with pytest.warns(UserWarning, match=r"3 files in .* are left out.*b\.json, c\.csv, d\.pdf"):
        assert len(list(read_corpus(tmp_path))) == 1


@pytest.mark.parametrize("change", [{"f1": "abc"}, {"n": [1]}, {"ratio": {}}, {"dataset": 3}, {"method": ["full"]}])
def test_results_rows_of_wrong_types_are_named(tmp_path, change):
    row = {"suite": "quality", "dataset": "x", "method": "full", "f1": 0.5, "n": 1, "own": [change]}
    assert read_rows(write(tmp_path, row)) == [row]
    (name,) = change
    with pytest.raises(ValueError, match=f"line 2 has {name}="):
        read_rows(write(tmp_path, row, row | change))


def test_results_rows_with_line_separators_are_read_back(tmp_path):
    rows = [{"suite": "quality", "method": "one\u2028two\x85three"}]
    append_rows(tmp_path / "r.jsonl", rows)
    assert read_rows(tmp_path / "r.jsonl") == rows


@pytest.mark.parametrize("wrong", ["abc", b"abc", 3, None, ["a", 1], [None]])
def test_a_string_is_no_list(wrong):
    with pytest.raises(TypeError, match=r"^texts must "):
        check_strings("texts", wrong)
    assert check_strings("texts", ("a", "b")) == ["a", "b"]
