"""The README's Python runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

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
