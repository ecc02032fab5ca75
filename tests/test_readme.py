"""The README is short, its Python runs, its links exist and its numbers are those of the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
POOLED = ROOT / "benchmarks" / "results" / "smollm2_pooled.jsonl"
SHARE = re.compile(r"\d+ % \(\d+ to \d+\)")
# What the README says is kept: page of the method -> lines of the pooled rows, with the ratio asked for.
KEPT = {
    "icae": [("icae", 4.0)],
    "xrag": [("xrag", None)],
    "salient-pool": [("salient-pool-query", 4.0)],
    "llmlingua2": [("llmlingua2", 4.0), ("llmlingua2-query", 4.0)],
    "llmlingua": [("llmlingua", 4.0)],
    "longllmlingua": [("longllmlingua-query", 4.0)],
    "selective-context": [("selective-context", 4.0)],
}


def test_it_is_at_most_9_kb():
    assert len(README.read_bytes()) <= 9 * 1024


@pytest.mark.slow
def test_python_runs_as_printed(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 10
    exec(compile("\n".join(blocks), str(README), "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"\d+ tokens became \d+ slots", printed[0])
    assert len(printed) == 3


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text()):
        if "://" not in target:
            assert (README.parent / target).exists(), target


@pytest.fixture(scope="module")
def shares() -> dict[tuple[str, float | None], str]:
    """The recovered share and its interval as the README prints them, by line and ratio."""
    rows = [json.loads(line) for line in POOLED.read_text().splitlines()]
    return {(row["method"], row.get("ratio_asked")): printed(row) for row in rows}


def printed(row: dict) -> str:
    share, low, high = (round(100 * row[key]) for key in ("recovered_share", "ci_low", "ci_high"))
    return f"{share} % ({low} to {high})"


def test_method_table_has_the_numbers_of_the_rows(shares):
    lines = re.findall(r"^\| \[.*?\]\(docs/methods/(.*?)\.md\).*$", README.read_text(), re.M)
    assert set(KEPT) <= set(lines)
    for page in lines:
        (row,) = re.findall(rf"^\| .*docs/methods/{page}\.md.*$", README.read_text(), re.M)
        assert SHARE.findall(row) == [shares[line] for line in KEPT.get(page, [])], page


def test_baselines_and_limits_have_the_numbers_of_the_rows(shares):
    text = " ".join(README.read_text().split())
    assert f"the passage's first tokens keep {shares['truncate', 4.0]} and sentences" in text
    assert f"BM25 {shares['extract', 4.0]}" in text
    assert f"keeps {shares['icae', 2.0]} at 2x" in text
