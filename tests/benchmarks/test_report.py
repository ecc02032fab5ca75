"""The report and the table, from made-up rows: self-contained, escaped, honest."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

import pytest
from nutgraf.benchmarks.report import report
from nutgraf.benchmarks.report.table import COLUMNS, table_lines, terminal_table
from rich.console import Console

COMMON = {"suite": "quality", "dataset": "toy", "passages": 1, "n": 80, "command": "nutgraf bench quality toy.jsonl"}


def quality(method: str, f1: float, tokens: float, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    row = {**COMMON, "method": method, "f1": f1, "em": f1 / 2, "reader_tokens": tokens, **more}
    row |= {} if ratio is None else {"ratio": ratio * 0.9, "ratio_asked": ratio, "recovered_share": (f1 - 0.1) / 0.5}
    return row


ROWS = [
    quality("full", 0.6, 190, ratio=None) | {"ratio": 1.0, "recovered_share": 1.0},
    quality("none", 0.1, 15),
    quality("soft", 0.35, 40, 8, ci_low=0.4, ci_high=0.6, f1_ci_low=0.3, f1_ci_high=0.4),
    quality("soft-shuffled", 0.12, 40, 8),
    quality("truncate", 0.2, 39, 8, budget_of="soft"),
    quality("extract", 0.4, 38, 8, budget_of="soft"),
    quality("soft", 0.45, 60, 4, ci_low=0.6, ci_high=0.8),
    {**COMMON, "test": "gold-position", "method": "full", "position": 0, "f1": 0.5, "em": 0.4},
    {**COMMON, "test": "gold-position", "method": "full", "position": 1, "f1": 0.4, "em": 0.3},
    {**COMMON, "test": "answer-swap", "method": "full", "em": 0.5, "em_old": 0.1, "follows": 0.8, "n_right": 50},
    *(
        {"suite": "speed", "method": method, "ratio_asked": ratio, "passages": passages, "context_tokens": 150.0 * passages,
         "ttft_ms": ms * passages, "decode_ms_per_token": 5.0} | online
        for passages in (1, 4)
        for method, ratio, ms, online in (
            ("full", None, 20.0, {}),
            ("soft", 8, 6.0, {"ttft_online_ms": 40.0, "ttft_online_speedup": 0.5}),
        )
    ),
]  # fmt: skip


def test_table_has_the_columns_and_the_times() -> None:
    lines = table_lines(ROWS)
    assert [line.cells[0] for line in lines] == [
        "full text", "no context", "soft 8x", "shuffled", "truncate", "extract", "soft 4x"
    ]  # fmt: skip
    assert [line.kind for line in lines] == ["fixed", "fixed", "method", "beside", "beside", "beside", "method"]
    soft = dict(zip(COLUMNS, lines[2].cells))
    assert soft == {
        "method": "soft 8x",
        "compression ratio": "7.2x",
        "tokens the reader read": "40",
        "TTFT": "6.0 ms",
        "decode time": "5.0 ms",
        "EM": "17.5",
        "F1": "35.0",
        "recovered share": "50 (40 to 60)",
    }
    assert lines[1].cells[1] == "–"
    out = io.StringIO()
    Console(file=out, width=120).print(terminal_table(ROWS, "A table"))
    for name in ("full text", "soft 8x", "recovered share", "50 (40 to 60)"):
        assert name in out.getvalue()


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    examples = [
        report.Example("Who <b>signed</b> it?", ("Ann",), {"full text": "Ann", "soft 8x": "Bob"}, "passage & more"),
        report.Example("When?", ("1648",), {"full text": "in 1648", "soft 8x": ""}),
    ]
    path = report.write_report(tmp_path / "out" / "report.html", ROWS, examples=examples, notes=["A <note>."])
    page = path.read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"<script|https?://|src=\"(?!data:)|@import|url\(", page)
    assert "Who &lt;b&gt;signed&lt;/b&gt; it?" in page
    assert "A &lt;note&gt;." in page
    for name in (*COLUMNS, "Answers side by side", "Notes", "How it was measured", "nutgraf bench quality toy.jsonl"):
        assert name in page
    assert page.count('class="right"') == 1
    assert list(tmp_path.glob("out/*")) == [path]


def test_notes_say_what_speaks_against() -> None:
    notes = report.honest_notes(ROWS)
    assert (
        "soft 8x (F1 35.0) is behind the best plain-text baseline with as many reader tokens, extract (F1 40.0)."
        in notes
    )
    assert any("another question" in note and "12.0" in note for note in notes)
    assert any("80 questions are few" in note for note in notes)
    assert any("slower than reading the full text" in note for note in notes)
    lead = report.summary(ROWS)
    assert "full text scores F1 60.0 and no context 10.0" in lead
    assert "Of what the passages bring in 190 tokens, soft 8x keeps 50 % in 40 tokens." in lead


def test_report_of_speed_rows_alone(tmp_path: Path) -> None:
    page = report.write_report(tmp_path / "r.html", [row for row in ROWS if row["suite"] == "speed"]).read_text("utf-8")
    assert "Time to first token" in page
    assert "<table>" not in html.unescape(page)


def test_datasets_stand_apart_and_newer_rows_replace(tmp_path: Path) -> None:
    other = [row | {"dataset": "other", "f1": 0.3} for row in ROWS if row["suite"] == "quality"]
    newer = [quality("full", 0.77, 190) | {"ratio": 1.0}]
    page = report.write_report(tmp_path / "r.html", [*ROWS, *other, *newer]).read_text("utf-8")
    assert page.count('class="set"') == 3  # toy, other, and the speed rows that name none
    assert page.count("<td>full text</td>") == 2
    assert "77.0" in page
    assert "60.0" not in page.split('class="set"')[1]


def test_lines_of_an_older_reader_and_of_other_questions_are_left_out(tmp_path: Path) -> None:
    old = [row | {"reader": "a", "questions": "q", "f1": 0.333} for row in ROWS if row["suite"] == "quality"]
    new = [row | {"reader": "b", "questions": "q"} for row in ROWS if row["method"] in ("full", "none")]
    few = [quality("full", 0.99, 190) | {"reader": "b", "questions": "few"}]
    few += [quality("soft", 0.88, 40, 8) | {"reader": "b", "half": "report"}]
    page = report.write_report(tmp_path / "r.html", [*old, *new, *few]).read_text("utf-8")
    assert "33.3" not in page
    assert "99.0" not in page
    assert "88.0" not in page
    assert "60.0" in page


def test_an_empty_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        report.write_report(tmp_path / "r.html", [])
