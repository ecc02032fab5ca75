"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nutgraf.benchmarks import readme

README = Path(__file__).parents[1] / "README.md"


def test_readme_python_runs_as_printed(capsys):
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    first = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(first) <= 10
    exec(compile("\n".join(blocks), str(README), "exec"), {})
    printed = capsys.readouterr().out.strip().splitlines()
    assert len(printed) >= 2


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in target:
            assert (README.parent / target).exists(), target


def test_the_results_table_is_that_of_the_committed_rows():
    assert readme.main(["--check"]) == 0, "run python -m nutgraf.benchmarks.readme"


def test_the_table_takes_the_newest_rows_of_the_newest_reader():
    row = {"suite": "quality", "half": "report", "dataset": "qa_dev_squad", "reader_tokens": 9.6, "reader": "old"}
    rows = [
        {**row, "method": "icae", "ratio_asked": 4.0, "f1": 0.9},
        {**row, "method": "full", "f1": 0.2, "reader": "new"},
        {**row, "method": "gist", "ratio_asked": 4.0, "f1": 0.1, "reader": "new"},
        {**row, "method": "gist", "ratio_asked": 4.0, "f1": 0.15, "reader": "new", "bytes_per_passage": 2560.0}
        | {"recovered_share": 0.5, "ci_low": 0.25, "ci_high": 0.75},
    ]
    lines = readme.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| full text | 1x |  | 10 | 20.0 |")
    assert lines[3].startswith("| gist tokens | 4x | 2,560 | 10 | 15.0 | 50 % (25 to 75) |")
    with pytest.raises(ValueError, match="needs one line"):
        readme.with_table("no markers", rows)
