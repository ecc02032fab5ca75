"""The README is short, its Python runs, its links exist and its numbers are those of the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
POOLED, PAIRS = RESULTS / "smollm2_pooled.jsonl", RESULTS / "kv_match_pooled.jsonl"


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
    """The recovered share and its interval as the README prints them, by line and ratio; of the rows beside kv-match if any."""
    rows = [json.loads(line) for file in (POOLED, PAIRS) for line in file.read_text().splitlines()]
    return {(row["method"], row.get("ratio_asked")): printed(row) for row in rows}


def printed(row: dict) -> str:
    share, low, high = (round(100 * row[key]) for key in ("recovered_share", "ci_low", "ci_high"))
    return f"{share} % ({low} to {high})"


def test_every_method_is_listed():
    named = re.findall(r"^  \[.*?\]\(docs/methods/(.*?)\.md\),?$", README.read_text(), re.M)
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} - {"index", "full-text"}
    assert sorted(named) == sorted(pages)


def test_the_front_table_leads_with_kv_match_and_has_the_numbers_of_the_rows():
    kept = README.read_text().partition("<!-- kept -->")[2].partition("<!-- /kept -->")[0]
    assert list(re.findall(r"\*\*(.*?)\*\*", kept)) == ["kv-match"]
    rows = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    of_pairs = {row["ratio_asked"]: printed(row) for row in rows if row["method"] == "kv-match"}
    (line,) = re.findall(r"^\| \*\*kv-match.*$", kept, re.M)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == [
        of_pairs.get(ratio, "") for ratio in (2.0, 4.0, 8.0, 16.0)
    ]


def test_the_time_to_the_first_token_is_that_of_the_newest_row():
    rows = [json.loads(line) for line in (RESULTS / "speed.jsonl").read_text().splitlines()]
    row = [row for row in rows if row["method"] == "kv-match" and row["passages"] == 10 and round(row["ratio"]) == 4][
        -1
    ]
    told = f"{row['context_tokens']:,} tokens in all, at 4x give the first token in {row['ttft_ms']:,.0f} ms instead of"
    assert f"{told} {row['ttft_full_ms']:,.0f} ms" in " ".join(README.read_text().split())


def test_limits_have_the_numbers_of_the_rows(shares):
    told = " ".join(README.read_text().split())
    assert f"keep {shares['mean-pool', 2.0]} at 2x" in told
    rows = map(json.loads, (RESULTS / "kv_joined.jsonl").read_text().splitlines())
    joined = [row for row in rows if row["method"] == "kv-match" and row["ratio_asked"] == 4]
    assert f"Five passages that were compressed each on its own keep {printed(joined[-1])} at 4x" in told
    assert f"[{joined[-1]['n']} questions]" in told
