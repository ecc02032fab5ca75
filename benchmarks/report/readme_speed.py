"""The README's section on speed and cost, written from the committed rows.

`python -m nutgraf.benchmarks.report.readme_speed` puts it between its markers in README.md; `--check` only says whether
it stands there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..rows import RESULTS, Row, read_rows
from .readme import with_block
from .speed_tables import SpeedTable, missing, speed_tables

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- speed: begin (python -m nutgraf.benchmarks.report.readme_speed) -->", "<!-- speed: end -->"
FILES = ("speed.jsonl", "store.jsonl", "training_speed.jsonl", "selection.jsonl")


def section(rows: Iterable[Row]) -> str:
    """The tables in Markdown, and what is not measured yet."""
    rows = list(rows)
    parts = [_markdown(table) for table in speed_tables(rows)]
    if absent := missing(rows):
        parts.append("Not measured yet: " + " ".join(absent))
    return "\n\n".join(parts)


def _markdown(table: SpeedTable) -> str:
    rule = "|" + "---|" * len(table.columns)
    lines = ["| " + " | ".join(cells) + " |" for cells in (table.columns, *table.lines)]
    return "\n".join([f"**{table.title}.** {table.caption}", "", lines[0], rule, *lines[1:]])


def with_section(readme: str, rows: Iterable[Row]) -> str:
    """`readme` with the section of `rows` between its markers; ValueError if a marker is missing."""
    return with_block(readme, (BEGIN, END), section(rows))


def committed_rows() -> list[Row]:
    """The rows that the section is made from."""
    return read_rows([path for name in FILES if (path := RESULTS / name).exists()])


def main(arguments: Sequence[str]) -> int:
    """Write the section, or with `--check` compare; 1 if it differed."""
    if unknown := set(arguments) - {"--check"}:
        print(f"Unknown argument {min(unknown)!r}; there is only --check.", file=sys.stderr)
        return 2
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_section(old, committed_rows())
    if "--check" not in arguments:
        path.write_text(new, encoding="utf-8")
    return int(old != new and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
