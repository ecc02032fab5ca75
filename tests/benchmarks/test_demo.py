"""The demo and the command line on a tiny random reader: every step runs, the report is there, errors are sentences."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from llama_index.core import MockEmbedding
from llama_index.core.schema import NodeWithScore, TextNode
from nutgraf.benchmarks import loading
from nutgraf.benchmarks.cli import demo
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.loading import CompressorSpec
from nutgraf.compressors import Reader, load_compressor
from nutgraf.recipes.data.corpus import read_records
from rich.console import Console
from typer.testing import CliRunner

RECORDS = sorted(read_records(loading.SAMPLE_QUESTIONS, half="report"), key=lambda r: len(r.gold_text))[:12]


@pytest.fixture(scope="module")
def reader(zoo: ModuleType) -> Reader:
    return zoo.reader("llama")


@pytest.mark.slow
def test_demo_runs_through(reader: Reader, tmp_path: Path) -> None:
    settings = demo.DemoSettings(out=tmp_path / "demo", questions=3, ratio=3)
    out = io.StringIO()
    path = demo.run_demo(
        reader,
        load_compressor("kv-match", reader, probes=2),
        RECORDS,
        settings,
        Console(file=out, width=200),
        embed_model=MockEmbedding(16),
    )
    printed = " ".join(out.getvalue().split())
    asked = demo.draw(RECORDS, settings)
    assert len(asked) == 3
    for text in ("full text", "no context", "kv-match 3x", "first tokens, as many", "bytes per passage", "TTFT"):
        assert text in printed
    assert all(record.question in printed for record in asked)
    page = path.read_text(encoding="utf-8")
    (lead,) = re.findall(r'<p class="lead">(.*?)</p>', page)
    pattern = (
        r"kv-match answered \d of 3 questions as the full text does, from a third of the keys and values, and gave"
    )
    assert re.match(pattern, lead)
    assert lead in printed
    assert "Answers side by side" in page
    assert "report.html" in printed


def test_the_headline_counts_answers_and_times() -> None:
    full = demo.Way("full", "", ["Warsaw", "in 1648", "no"], [9, 9, 9], [300.0, 100.0, 200.0])
    ours = demo.Way("kv-match", "", ["warsaw.", "1648", "No"], [3, 3, 3], [60.0, 50.0, 40.0])
    assert demo.headline([full, ours], 4) == (
        "kv-match answered 2 of 3 questions as the full text does, from a quarter of the keys and values, and gave the "
        "first token 4.0 times sooner."
    )
    assert "from 1/16 of" in demo.headline([full, ours], 16)


def test_the_shorter_text_has_the_budget(reader: Reader) -> None:
    text = RECORDS[0].gold_text
    nodes = [NodeWithScore(node=TextNode(text=t), score=1.0) for t in (text, "")]
    short, empty = demo.FirstTokens(reader, 4).postprocess_nodes(nodes)
    assert text.startswith(short.node.get_content())
    assert len(reader.tokenize(short.node.get_content())) == math.ceil(len(reader.tokenize(text)) / 4)
    assert empty.node.get_content() == ""


def test_draw_takes_different_passages_first() -> None:
    drawn = demo.draw(RECORDS, demo.DemoSettings(questions=len({r.passages for r in RECORDS})))
    assert len({record.passages for record in drawn}) == len(drawn)
    assert drawn == demo.draw(RECORDS, demo.DemoSettings(questions=len(drawn)))
    assert len(demo.draw(RECORDS, demo.DemoSettings(questions=100))) == len(RECORDS)


def test_specs() -> None:
    assert CompressorSpec.parse("kv-match@4,8.5") == CompressorSpec("kv-match", (4, 8.5))
    assert CompressorSpec.parse("a/b", [2]) == CompressorSpec("a/b", (2,))
    assert CompressorSpec.parse("a") == CompressorSpec("a", (None,))
    for bad in ("a@x", "a@0.5", "@4"):
        with pytest.raises(ValueError, match="kv-match@4,8"):
            CompressorSpec.parse(bad)


@pytest.mark.slow
def test_bench_commands(reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nutgraf.benchmarks.cli.options.find_reader", lambda name, device, dtype: reader)
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    common = ["--compressor", "selective-context", "--half", "report", "--out", "rows.jsonl"]
    done = run(bench_app, ["quality", "sample", *common, "--ratio", "4", "--limit", "3", "--baseline", "truncate",
                           "--max-new-tokens", "4", "--report", "quality.html"])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "selective-context 4x" in done.output
    done = run(bench_app, ["speed", "sample", *common, "--passages", "1", "--requests", "1",
                           "--repeats", "1", "--decode-tokens", "2"])  # fmt: skip
    assert done.exit_code == 0, done.output
    done = run(
        bench_app, ["reading", "sample", "--limit", "12", "--no-move", "--max-new-tokens", "2", "--out", "rows.jsonl"]
    )
    assert done.exit_code == 0, done.output
    assert "answer-swap" in done.output
    done = run(bench_app, ["report", "rows.jsonl", "--out", "all.html"])
    assert done.exit_code == 0, done.output
    assert Path("all.html").exists()
    assert Path("quality.html").exists()
    assert len(Path("rows.jsonl").read_text().splitlines()) == 5 + 2 + 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality", "absent.jsonl"], "absent.jsonl"),
        (["speed", "sample", "--half", "neither"], "no questions"),
        (["report", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(bench_app, arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


def test_dtypes() -> None:
    assert loading.torch_dtype("auto", "cpu") == torch.float32
    assert loading.torch_dtype("auto", "cuda") == "auto"
    assert loading.torch_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be"):
        loading.torch_dtype("int8", "cpu")
