"""The HTML report and the pages of results, from made-up rows: self-contained, escaped, honest, those of the rows."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from nutgraf.benchmarks.quality import pooled
from nutgraf.benchmarks.report import __main__ as pages
from nutgraf.benchmarks.report import html, kv_tables, plots, quality_tables, speed_tables, text_tables
from nutgraf.benchmarks.report.table import Column, build, render, rich_table
from rich.console import Console

COMMON = {"suite": "quality", "dataset": "toy", "passages": 1, "n": 80, "command": "nutgraf bench quality toy.jsonl"}
CPU = {"device": "cpu (x86_64, 2 cores)", "dtype": "float32", "threads": 2, "reader": "a"}


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


def account(method: str, tokens: int = 2000, **more: Any) -> dict[str, Any]:
    full = method == "full"
    row = {
        "suite": "speed", "test": "account", "reader_shape": "reader-small", **CPU, "method": method, "batch": 1,
        "interface": "text" if full else "embeds", "context_asked": tokens, "context_tokens": tokens - 5, "passages": 10,
        "reader_tokens": tokens if full else 194, "ttft_ms": 250.4 if full else 29.0, "roofline_share": 0.54, "ratio": 15.7,
        "ttft_speedup": 1.0 if full else 8.63, "requests_per_s": 4.0, "decode_ms_per_token": 5.5,
        "roofline_ms": 135.0 if full else 9.0,
    }  # fmt: skip
    return row | ({} if full else {"slots": 130, "ratio_asked": 16.0, "break_even_reads": 0.97}) | more


SPEED = [
    account("full", ttft_ms=999.0),
    account("full"),
    account("mean-pool"),
    account("mean-pool", batch=4, requests_per_s=7.0),
    account("mean-pool", reader="an older reader", ttft_ms=1.0) | {"reader_shape": "other"},
    {"suite": "speed", "test": "compress", **CPU, "method": "icae", "ratio_asked": 4.0, "passages": 64, "reader_shape": "r",
     "context_tokens": 11567, "tokens_per_s": 9000.4, "bare_share": 0.91, "plain_ms": 50.0, "compress_ms": 100.0},
    {"suite": "training", "test": "step", **CPU, "reader_shape": "r", "method": "icae", "objective": "kl", "batch": 8,
     "questions": 3, "cpu_ms": 700.0, "prompts": 24,
     "step_cost": 1.124, "step_ms": 512.0, "teacher_ms": 13.25, "tokens_per_s": 4000.0, "peak_bytes": 6e8},
    {"suite": "training", "test": "loss-memory", "objective": "lm", "target_tokens": 2048, "target_tokens_asked": 2048,
     "vocabulary": 128256, "extra_bytes": 7.9e8, "bound_bytes": 7.88e8, "whole_bytes": 3.15e9, **CPU},
    {"suite": "store", "state": "answer", **CPU, "reader_shape": "r", "method": "slabs", "passages": 64, "slots": 13.0,
     "read_ms": 1.5, "ttft_memory_ms": 90.0, "read_share_of_ttft": 0.0167, "read_gbps": 1.9, "copy_gbps": 8.0},
    *({"suite": "selection", "test": "speed", **CPU, "method": "llmlingua", "mode": mode, "model": model, "tokens": 800,
       "passages": 4, "seconds": 0.5, "speedup": speedup, "over_bare": 1.1, "reader": model}
      for mode, model, speedup in (("fast", "a", 9.0), ("fast", "a", 2.5), ("faithful", "b", 1.0))),
]  # fmt: skip


# -- tables ----------------------------------------------------------------------------------------------------------


def test_cells_are_formatted_bold_or_missing() -> None:
    given = [Column("a", "a", "{:.1f} %", 100, bold=lambda row: row["a"] > 0.5), Column("b", "b")]
    table = build(given, [{"a": 0.5}, {"a": 0.75, "b": "text"}], missing="–")
    assert table.lines == (("50.0 %", "–"), ("**75.0 %**", "text"))
    assert not build(given, [])


def test_the_table_of_lines_has_names_kinds_and_times() -> None:
    table = quality_tables.line_table(ROWS, "A table")
    assert [cells[0] for cells in table.lines] == [
        "full text", "no context", "soft 8x", "shuffled", "truncate", "extract", "soft 4x"
    ]  # fmt: skip
    assert table.kinds == ("fixed", "fixed", "method", "beside", "beside", "beside", "method")
    assert table.lines[2] == ("soft 8x", "7.2x", "40", "6.0 ms", "5.0 ms", "17.5", "35.0", "50 (40 to 60)")
    assert table.lines[1][1] == "–"
    out = io.StringIO()
    Console(file=out, width=120).print(rich_table(table))
    for text in ("A table", "full text", "soft 8x", "recovered share", "50 (40 to 60)"):
        assert text in out.getvalue()


def test_speed_tables_hold_the_newest_figures() -> None:
    tables = {table.title: table for table in speed_tables.speed_tables(SPEED)}
    assert len(tables) == 8
    first = tables["Time to the first token"].lines
    assert ("reader-small, CPU, 2 threads", "1,995 in 10", "full text", "2,000", "250 ms", "", "54 %", "") in first
    assert first[-1][2:] == ("130 slots of mean-pool (16x)", "194", "29 ms", "8.6x", "54 %", "1.0 reads")
    assert [line[2] for line in tables["Several prompts at a time"].lines] == ["1", "1", "4"]
    assert tables["The cost model against measurements"].lines[0][-2:] == ("15.0x", "8.6x")
    assert tables["Compressing passages of mixed lengths"].lines == (
        ("icae 4x", "64", "11,567", "9,000", "0.91", "0.50"),
    )
    step = ("icae", "KL, live teacher", "3", "1.12", "512 ms", "700 ms", "24", "13.2 ms", "4,000", "600 MB")
    assert tables["A training step"].lines == (step,)
    assert tables["Memory of the losses"].lines[0][3:] == ("790 MB", "788 MB", "3,150 MB")
    assert tables["Selecting tokens"].lines == (
        ("LLMLingua", "4 x 200", "a", "0.50 s", "2.50x as fast", "1.10"),
        ("LLMLingua, as published", "4 x 200", "b", "0.50 s", "1.00x as fast", "1.10"),
    )
    assert tables["Reading from the store"].lines[0][4] == "1.7 %"
    assert speed_tables.speed_tables([{"suite": "quality"}]) == []


def test_what_is_missing_is_named() -> None:
    found = " ".join(speed_tables.missing(SPEED))
    assert "llama-1b, llama-3b, llama-8b" in found
    assert "On the CPU" in found
    gpu = [account("full", device="NVIDIA H100", reader_shape=f"llama-{n}b") for n in (1, 3, 8)]
    assert speed_tables.missing([*gpu, account("full", reader_shape="llama-1b")]) == []


def test_tables_of_studies_hold_the_newest_rows() -> None:
    gate = {
        "test": "gate", "sending": "gate", "level": "0.2", "dataset": "qa_dev_squad + qa_dev_qamr", "n": 90, "share": 0.2,
        "method": "mean-pool", "ratio_asked": 4.0, "reader_tokens": 80.0, "f1": 0.2, "calibrated_by": "probability",
        "priced": True, "f1_minus_random": 0.01, "f1_minus_random_low": -0.004, "f1_minus_random_high": 0.02,
    }  # fmt: skip
    (line,) = quality_tables.gate_table([gate | {"f1": 0.9}, gate, gate | {"sending": "random"}]).lines
    assert line[:7] == (
        "SQuAD + QAMR (90)", "mean-pooled windows 4x", "probability per token", "0.2", "20 %", "80", "20.0"
    )  # fmt: skip
    assert line[7:] == ("+1.0 (-0.4 to +2.0)", "", "")
    stored = quality("mean-pool-int8", 0.2, 40, 8, store_precision="int8", stored_of="mean-pool", same_answers=0.9)
    assert quality_tables.precision_table([stored]).lines[0][1:3] == ("mean-pooled windows 8x", "int8")
    uniform = quality("mean-pool", 0.2, 40, 8, allocation="uniform")
    by_score = uniform | {"allocation": "score", "score": "bm25", "temperature": 1.0}
    assert [line[2] for line in quality_tables.allocation_table([uniform, by_score]).lines] == [
        "one ratio for all", "BM25, T = 1"
    ]  # fmt: skip


# -- pages -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_pages_and_the_picture_are_those_of_the_committed_rows() -> None:
    assert pages.main(["--check"]) == 0, "run python -m nutgraf.benchmarks.report"
    assert pages.main(["--wrong"]) == 2


@pytest.mark.slow
def test_the_quality_page_names_the_best_and_has_every_line() -> None:
    rows = pages.rows_of("smollm2")
    tuned = [r | {"method": "pisco", "reader_tuned": True} for r in rows if r["method"] == "icae"]
    alike = [r | {"method": "full-text", "reader_tuned": True} for r in rows if r["method"] == "full"]
    found, sets = pooled.pool([*rows, *tuned, *alike]), pooled.comparable([*rows, *tuned, *alike])
    page = pages.quality_page(found, sets)
    assert page.count("\n| ICAE |") == 2 + sum(key[0] == "icae" for lines in sets.values() for key in lines)
    assert "are compared with the full text of a reader tuned alike" in page
    budget = next(line for line in page.splitlines() if line.startswith("| 4x |"))
    assert budget.count("**") == 2
    assert "full text, tuned reader" in page
    assert "| passages | no context | full text |" in page
    without = [row for row in [*rows, *tuned] if row["dataset"] != "qa_dev_nq"]
    page = pages.quality_page(pooled.pool(without), pooled.comparable(without))
    assert "are not ranked" in page
    assert "Not measured: NQ, " in page


def test_one_number_per_method_is_that_of_the_nearest_ratio() -> None:
    numbers = pages.method_numbers(pooled.pool(pages.rows_of("smollm2")))
    assert numbers["icae"]["ratio"] == 4
    assert numbers["icae"]["ci_low"] < numbers["icae"]["recovered_share"] < numbers["icae"]["ci_high"]
    assert numbers["xrag"]["ratio"] > 100
    assert "truncate" not in numbers


@pytest.mark.slow
def test_the_picture_carries_its_rows_and_draws_no_controls() -> None:
    rows = pooled.pool(pages.rows_of("smollm2"))
    image = plots.trade_off(rows)
    assert image is not None
    assert image.startswith(b"\x89PNG")
    assert len(image) < 250_000
    assert plots.hash_in(image) == plots.rows_hash(rows)
    assert plots.rows_hash([row | {"ttft_ms": 1.0} for row in rows]) != plots.rows_hash(rows)
    assert plots.hash_in(b"no picture") is None
    assert plots.trade_off([]) is None
    names = [line["name"] for line in plots.drawn_series(rows)]
    assert len(names) == len(set(names))
    assert not any("another question" in name for name in names)


# -- the HTML report -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    examples = [
        html.Example("Who <b>signed</b> it?", ("Ann",), {"full text": "Ann", "soft 8x": "Bob"}, "passage & more"),
        html.Example("When?", ("1648",), {"full text": "in 1648", "soft 8x": ""}),
    ]
    path = html.write_report(tmp_path / "out" / "report.html", ROWS, examples=examples, notes=["A <note>."])
    page = path.read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 3
    assert not re.search(r"<script|https?://|src=\"(?!data:)|@import|url\(", page)
    assert "Who &lt;b&gt;signed&lt;/b&gt; it?" in page
    assert "A &lt;note&gt;." in page
    titles = [column.title for column in quality_tables.LINES if column.value != "bytes_per_passage"]  # no row has them
    for text in (*titles, "Answers side by side", "Notes", "How it was measured", "nutgraf bench quality toy.jsonl"):
        assert text in page
    assert page.count('class="right"') == 1
    assert list(tmp_path.glob("out/*")) == [path]


def test_notes_say_what_speaks_against() -> None:
    notes = html.honest_notes(ROWS)
    assert (
        "soft 8x (F1 35.0) is behind the best plain-text baseline with as many reader tokens, extract (F1 40.0)."
        in notes
    )
    assert any("another question" in note and "12.0" in note for note in notes)
    assert any("80 questions are few" in note for note in notes)
    assert any("slower than reading the full text" in note for note in notes)
    lead = html.summary(ROWS)
    assert "full text scores F1 60.0 and no context 10.0" in lead
    assert "Of what the passages bring in 190 tokens, soft 8x keeps 50 % in 40 tokens." in lead


def test_report_of_speed_rows_alone(tmp_path: Path) -> None:
    page = html.write_report(tmp_path / "r.html", [row for row in ROWS if row["suite"] == "speed"]).read_text("utf-8")
    assert "Time to first token" in page
    assert "<table>" not in page
    page = html.write_report(tmp_path / "account.html", SPEED).read_text("utf-8")
    assert page.count("<h3>") == 8
    assert "130 slots of mean-pool (16x)" in page
    with pytest.raises(ValueError, match="at least one"):
        html.write_report(tmp_path / "none.html", [])


@pytest.mark.slow
def test_datasets_stand_apart_and_newer_rows_replace(tmp_path: Path) -> None:
    other = [row | {"dataset": "other", "f1": 0.3} for row in ROWS if row["suite"] == "quality"]
    newer = [quality("full", 0.77, 190) | {"ratio": 1.0}]
    page = html.write_report(tmp_path / "r.html", [*ROWS, *other, *newer]).read_text("utf-8")
    assert page.count('class="set"') == 3  # toy, other, and the speed rows that name none
    assert page.count("<td>full text</td>") == 2
    assert "77.0" in page
    assert "60.0" not in page.split('class="set"')[1]


def test_lines_of_an_older_reader_and_of_other_questions_are_left_out(tmp_path: Path) -> None:
    old = [row | {"reader": "a", "questions": "q", "f1": 0.333} for row in ROWS if row["suite"] == "quality"]
    new = [row | {"reader": "b", "questions": "q"} for row in ROWS if row["method"] in ("full", "none")]
    few = [quality("full", 0.99, 190) | {"reader": "b", "questions": "few"}]
    few += [quality("soft", 0.88, 40, 8) | {"reader": "b", "half": "report"}]
    page = html.write_report(tmp_path / "r.html", [*old, *new, *few]).read_text("utf-8")
    assert "33.3" not in page
    assert "99.0" not in page
    assert "88.0" not in page
    assert "60.0" in page


def test_templates_escape_html_only() -> None:
    table = build([Column("a<b", "a")], [{"a": "x & y"}])
    context = {"title": "t", "lead": "", "sets": [], "examples": [], "notes": [], "origins": [], "costs": [table]}
    assert "x &amp; y" in render("report.html", **context)
    assert "x & y" in render("speed.md", tables=[table], missing=[])


# -- keys and values -------------------------------------------------------------------------------------------------


def _kept(dataset: str, method: str, scores: list[float], ratio: float | None = None, **more: Any) -> dict[str, Any]:
    row = {
        "suite": "quality",
        "dataset": dataset,
        "half": "report",
        "questions": dataset,
        "reader": "a",
        "method": method,
    }
    row |= {"f1_each": scores, "f1": sum(scores) / len(scores), "n": len(scores), "reader_tokens": 10.0, "skipped": 0}
    return row | ({} if ratio is None else {"ratio_asked": ratio, "ratio": ratio}) | {"bytes_per_passage": 800.0} | more


def test_the_page_of_keys_and_values_has_the_lead_over_the_best_other_that_compresses_once() -> None:
    rows = []
    for name in ("qa_dev_squad", "qa_dev_nq"):
        rows += [_kept(name, "full", [1.0] * 40), _kept(name, "none", [0.0] * 40)]
        rows += [_kept(name, "kv-match", [1.0, 1.0, 1.0, 0.0] * 10, 4.0, interface="kv")]
        rows += [_kept(name, "kv-match:score=random,repair=none", [0.0, 0.0, 0.0, 1.0] * 10, 4.0, interface="kv")]
        rows += [_kept(name, "llmlingua2", [0.0, 1.0, 0.0, 0.0] * 10, 4.0, interface="text")]
        rows += [_kept(name, "truncate", [1.0, 0.0, 1.0, 0.0] * 10, 4.0, interface="text", budget_of="llmlingua2")]
        rows += [_kept(name, "asked", [1.0] * 40, 4.0, interface="text", query_aware=True)]
    found = {row["method"]: row for row in kv_tables.once(rows)}
    assert set(found) == {"full", "none", "kv-match", "llmlingua2", "truncate"}
    ours = found["kv-match"]
    assert ours["lead_over"] == "truncate"
    assert ours["lead"] == pytest.approx(0.25)
    assert 0 < ours["lead_low"] < 0.25 < ours["lead_high"] < 0.5
    varied = {row["score"]: row for row in kv_tables.choices(rows)}
    assert varied["probes"]["repair"] == "bias+values"
    assert (varied["random"]["budget"], varied["random"]["repair"]) == ("global", "none")
    page = render(
        "kv.md",
        **kv_tables.page_tables([*rows, _kept("qa_dev_qamr", "full", [1.0]), _kept("qa_dev_qamr", "none", [0.0])]),
    )
    assert "80 questions. Not measured: Quoref, FairytaleQA, QAMR." in page
    assert "| 4x | the passage's first tokens | 25 (" in page
    assert "| random | global | none | 25 %" in page
    assert kv_tables.choices(rows[:7]) == []
    image = plots.by_bytes(kv_tables.once(rows))
    assert image is not None
    assert plots.hash_in(image) == plots.rows_hash(kv_tables.once(rows))
    assert plots.by_bytes([]) is None


# -- shorter text ----------------------------------------------------------------------------------------------------


def test_the_page_of_shorter_texts_parts_questions_and_counts_rescued_answers() -> None:
    rows = []
    for name in ("qa_dev_squad", "qa_dev_nq"):
        rows += [_kept(name, "full", [1.0] * 40), _kept(name, "none", [0.0] * 40)]
        rows += [_kept(name, "llmlingua2", [0.0, 1.0, 0.0, 0.0] * 10, 4.0, interface="text")]
        rows += [_kept(name, "exit-query", [1.0, 1.0, 1.0, 0.0] * 10, 8.0, interface="text", query_aware=True)]
        rows += [_kept(name, "extract", [1.0, 0.0] * 20, 8.0, interface="text", budget_of="exit-query")]
    ten = [_kept("qa_dev_nq_10", "full", [0.0, 1.0, 0.6, 0.0] * 10), _kept("qa_dev_nq_10", "none", [0.0] * 40)]
    ten += [
        _kept("qa_dev_nq_10", "exit:pooled=true", [1.0, 1.0, 0.4, 1.0] * 10, 4.0, interface="text", query_aware=True)
    ]
    tables = text_tables.page_tables([*rows, *(row | {"passages": 10} for row in ten)])
    assert tables["asked"].columns == ("what the reader reads", "8x")  # the ratios that have rows
    assert [line[0] for line in tables["asked"].lines] == ["EXIT", "sentences picked by BM25"]
    assert [line[0] for line in tables["once"].lines] == ["LLMLingua-2"]
    assert tables["once"].lines[0][1].startswith("25 % (")
    (several,) = tables["several"]
    line = several["table"].lines[-1]
    assert line[0] == "EXIT, for the question, one budget"
    assert line[3].startswith("+45.0 (+")
    assert line[4:] == ("20", "10")
    page = render("text.md", **tables)
    assert "mean over SQuAD and NQ, with its" in page
    assert "80 questions with one passage each" in page
    assert "### NQ with distractors, 10 passages, 40 questions" in page
    assert "Recovered share" not in render("text.md", **text_tables.page_tables(ten))
