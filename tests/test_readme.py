"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from nutgraf.benchmarks.report import readme
from nutgraf.benchmarks.report.studies import STUDIES

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


def test_results_and_picture_are_those_of_the_committed_rows():
    assert readme.main(["--check"]) == 0, "run python -m nutgraf.benchmarks.report.readme"


def test_markers_are_needed():
    with pytest.raises(ValueError, match="needs one line"):
        readme.with_block("no markers", STUDIES[0].markers, "text")
    for study in STUDIES:
        begin, end = study.markers
        text = f"a\n{begin}\nold\n{end}\nb\n"
        assert readme.with_block(text, study.markers, "new") == f"a\n{begin}\nnew\n{end}\nb\n"
