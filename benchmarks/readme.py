"""What the README and RESULTS.md show of the measured rows, and the picture, made by one command.

`python -m nutgraf.benchmarks.readme` reads `results/tradeoff.jsonl`, `allocation.jsonl`, `gate.jsonl` and `sweeps.jsonl` and
writes the block between the markers in README.md, RESULTS.md, `results/pooled.jsonl` and `results/tradeoff.png`; `--check` only
says whether they are those of the rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import picture
from .pooled import comparable, pool
from .results_page import readme_block, results_page
from .rows import PACKAGE, RESULTS, Row, read_rows

BEGIN, END = "<!-- results: begin (python -m nutgraf.benchmarks.readme) -->", "<!-- results: end -->"
ROWS, PICTURE, POOLED_ROWS = RESULTS / "tradeoff.jsonl", RESULTS / "tradeoff.png", RESULTS / "pooled.jsonl"
OTHER_ROWS = tuple(RESULTS / name for name in ("allocation.jsonl", "gate.jsonl", "sweeps.jsonl"))
PAGE, README = PACKAGE / "benchmarks" / "RESULTS.md", PACKAGE / "README.md"


def with_block(readme: str, text: str) -> str:
    """`readme` with `text` between its markers; ValueError if a marker is missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"The README needs one line {BEGIN!r} and, behind it, one line {END!r}.")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def written(rows: Sequence[Row]) -> dict[Path, str]:
    """The text files that the rows make, by path.

    Raises ValueError if the rows hold no set of `pooled.POOLED` with all fixed lines, or the README lacks a marker.
    """
    pooled, sets = pool(rows), comparable(rows)
    if not pooled:
        raise ValueError(f"{ROWS.name} holds nothing to pool yet; run benchmarks/tradeoff.sh first.")
    return {
        README: with_block(
            README.read_text(encoding="utf-8"), readme_block(pooled, sets, PICTURE.relative_to(PACKAGE).as_posix())
        ),
        PAGE: results_page(pooled, sets, read_rows([path for path in OTHER_ROWS if path.is_file()])),
        POOLED_ROWS: "".join(json.dumps(row) + "\n" for row in pooled),
    }


def main(arguments: Sequence[str]) -> int:
    """Write everything, or with `--check` compare; 1 if something differed."""
    if unknown := set(arguments) - {"--check"}:
        print(f"Unknown argument {min(unknown)!r}; there is only --check.", file=sys.stderr)
        return 2
    if "--check" in arguments and not ROWS.is_file():
        return 0  # nothing that could be stale
    rows = read_rows(ROWS)
    files = written(rows)
    pooled = pool(rows)
    if "--check" in arguments:
        stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
        if not PICTURE.is_file() or picture.hash_in(PICTURE.read_bytes()) != picture.rows_hash(pooled):
            stale.append(PICTURE)
        for path in stale:
            print(f"{path.relative_to(PACKAGE)} is not that of the rows.", file=sys.stderr)
        return int(bool(stale))
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    if (image := picture.draw(pooled)) is not None:
        PICTURE.write_bytes(image)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
