"""The demo and the command line on a tiny random reader: every step runs, the report is there, errors are sentences."""

from __future__ import annotations

import io
from pathlib import Path
from types import ModuleType

import pytest
import torch
from llama_index.core import MockEmbedding
from nutgraf.benchmarks import loading
from nutgraf.benchmarks.cli import demo
from nutgraf.benchmarks.cli.app import bench_app
from nutgraf.benchmarks.loading import CompressorSpec
from nutgraf.benchmarks.methods import Compressed
from nutgraf.compressors import Reader
from nutgraf.compressors.text.selective_context import SelectiveContextCompressor, SelectiveContextConfig
from nutgraf.recipes.data.corpus import read_records
from rich.console import Console
from typer.testing import CliRunner

RECORDS = sorted(read_records(loading.SAMPLE_QUESTIONS, half="report"), key=lambda r: len(r.gold_text))[:12]


@pytest.fixture(scope="module")
def reader(zoo: ModuleType) -> Reader:
    return zoo.reader("llama")


@pytest.mark.slow
def test_demo_runs_through(reader: Reader, tmp_path: Path) -> None:
    selective = SelectiveContextCompressor(SelectiveContextConfig(), reader)
    settings = demo.DemoSettings(out=tmp_path / "demo", questions=4, steps=1)
    out = io.StringIO()
    path = demo.run_demo(
        reader,
        [Compressed(selective, 3)],
        RECORDS,
        settings,
        Console(file=out, width=160),
        embed_model=MockEmbedding(16),
        train=lambda settings, console: "It trained.",
    )
    printed = out.getvalue()
    asked = demo.draw(RECORDS, settings)
    assert len(asked) == 4
    for text in (
        "full text",
        "no context",
        "selective-context 3x",
        "recovered share",
        "TTFT",
        "decode time",
        asked[0].question,
    ):
        assert text in printed
    page = path.read_text(encoding="utf-8")
    assert "Answers side by side" in page
    assert "It trained." in page
    assert page.count("data:image/svg+xml") == 1  # times; a random reader gains nothing that could be recovered
    assert "report.html" in printed


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
