"""Speed and cost in tables: from made-up rows, in the report, and in the README as the committed rows have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nutgraf.benchmarks.report import readme_speed, report, speed_tables

CPU = {"device": "cpu (x86_64, 2 cores)", "dtype": "float32", "threads": 2, "reader": "a"}


def account(method: str, tokens: int = 2000, **more: Any) -> dict[str, Any]:
    full = method == "full"
    row = {
        "suite": "speed", "test": "account", "reader_shape": "reader-small", **CPU, "method": method, "batch": 1,
        "interface": "text" if full else "embeds", "context_asked": tokens, "context_tokens": tokens - 5, "passages": 10,
        "reader_tokens": tokens if full else 194, "ttft_ms": 250.4 if full else 29.0, "roofline_share": 0.54, "ratio": 15.7,
        "ttft_speedup": 1.0 if full else 8.63, "requests_per_s": 4.0, "decode_ms_per_token": 5.5,
    }  # fmt: skip
    return row | ({} if full else {"slots": 130, "ratio_asked": 16.0, "break_even_reads": 0.97}) | more


ROWS = [
    account("full", ttft_ms=999.0),
    account("full"),
    account("mean-pool"),
    account("mean-pool", batch=4, requests_per_s=7.0),
    account("mean-pool", reader="an older reader", ttft_ms=1.0) | {"reader_shape": "other"},
    {"suite": "speed", "test": "compress", **CPU, "method": "icae", "ratio_asked": 4.0, "passages": 64, "reader_shape": "r",
     "context_tokens": 11567, "tokens_per_s": 9000.4, "bare_share": 0.91, "plain_ms": 50.0, "compress_ms": 100.0},
    {"suite": "training", "test": "step", **CPU, "reader_shape": "r", "method": "icae", "objective": "kl", "batch": 8,
     "step_cost": 1.124, "step_ms": 512.0, "teacher_ms": 13.25, "tokens_per_s": 4000.0, "peak_bytes": 6e8},
    {"suite": "training", "test": "loss-memory", "objective": "lm", "target_tokens": 2048, "target_tokens_asked": 2048,
     "vocabulary": 128256, "extra_bytes": 7.9e8, "bound_bytes": 7.88e8, "whole_bytes": 3.15e9, **CPU},
    {"suite": "store", "state": "answer", **CPU, "reader_shape": "r", "method": "slabs", "passages": 64, "slots": 13.0,
     "read_ms": 1.5, "ttft_memory_ms": 90.0, "read_share_of_ttft": 0.0167, "read_gbps": 1.9, "copy_gbps": 8.0},
    *({"suite": "selection", "test": "speed", **CPU, "method": "llmlingua", "mode": mode, "model": model, "tokens": 800,
       "passages": 4, "seconds": 0.5, "speedup": speedup, "over_bare": 1.1, "reader": model}
      for mode, model, speedup in (("fast", "a", 9.0), ("fast", "a", 2.5), ("faithful", "b", 1.0))),
]  # fmt: skip


def test_tables_hold_the_newest_figures() -> None:
    tables = {table.title: table for table in speed_tables.speed_tables(ROWS)}
    assert len(tables) == 7
    first = tables["Time to the first token"].lines
    assert ("reader-small, CPU, 2 threads", "1,995 in 10", "full text", "2,000", "250 ms", "", "54 %", "") in first
    assert first[-1][2:] == ("130 slots of mean-pool (16x)", "194", "29 ms", "8.6x", "54 %", "1.0 reads")
    assert [line[2] for line in tables["Several prompts at a time"].lines] == ["1", "1", "4"]
    assert tables["Compressing passages of mixed lengths"].lines == (
        ("icae 4x", "64", "11,567", "9,000", "0.91", "0.50"),
    )
    step = ("icae", "KL, teacher beside it", "1.12", "512 ms", "13.2 ms", "4,000", "600 MB")
    assert tables["A training step"].lines == (step,)
    assert tables["Memory of the losses"].lines[0][3:] == ("790 MB", "788 MB", "3,150 MB")
    assert tables["Selecting tokens"].lines == (
        ("LLMLingua", "4 x 200", "a", "0.50 s", "2.50x as fast", "1.10"),
        ("LLMLingua, as published", "4 x 200", "b", "0.50 s", "1.00x as fast", "1.10"),
    )
    assert tables["Reading from the store"].lines[0][4] == "1.7 %"
    assert all(len(line) == len(table.columns) for table in tables.values() for line in table.lines)
    assert speed_tables.speed_tables([{"suite": "quality"}]) == []


def test_what_is_missing_is_named() -> None:
    found = " ".join(speed_tables.missing(ROWS))
    assert "llama-1b, llama-3b, llama-8b" in found
    assert "On the CPU" in found
    gpu = [account("full", device="NVIDIA H100", reader_shape=f"llama-{n}b") for n in (1, 3, 8)]
    assert speed_tables.missing([*gpu, account("full", reader_shape="llama-1b")]) == []


def test_the_report_has_the_account_alone_or_beside_answers(tmp_path: Path) -> None:
    page = report.write_report(tmp_path / "report.html", ROWS).read_text()
    assert page.count("<h3>") == 7
    assert "130 slots of mean-pool (16x)" in page
    with pytest.raises(ValueError, match="at least one"):
        report.write_report(tmp_path / "none.html", [])


def test_the_section_goes_between_its_markers() -> None:
    text = f"a\n{readme_speed.BEGIN}\nold\n{readme_speed.END}\nb\n"
    found = readme_speed.with_section(text, ROWS)
    assert found.startswith(f"a\n{readme_speed.BEGIN}\n**Time to the first token.**")
    assert found.endswith(f"Not measured yet: {' '.join(speed_tables.missing(ROWS))}\n{readme_speed.END}\nb\n")
    assert readme_speed.with_section(found, ROWS) == found
    with pytest.raises(ValueError, match="needs one line"):
        readme_speed.with_section("no markers", ROWS)
