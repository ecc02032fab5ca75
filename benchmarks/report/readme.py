"""What the README and the pages of results show of the measured rows, and the pictures, made by one command.

`python -m nutgraf.benchmarks.report.readme` reads the rows of each study (`studies.py`) and writes the block between its
markers in README.md, its page, pooled rows and picture; `--check` only says whether they are those of the rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..quality.pooled import comparable, pool
from ..rows import PACKAGE, Row, read_rows
from . import picture
from .results_page import readme_block, results_page
from .studies import STUDIES, Study

README = PACKAGE / "README.md"


def with_block(readme: str, markers: tuple[str, str], text: str) -> str:
    """`readme` with `text` between the two markers; ValueError if one is missing."""
    begin, end = markers
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"The README needs one line {begin!r} and, behind it, one line {end!r}.")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"


def written(study: Study, readme: str, rows: Sequence[Row]) -> dict[Path, str]:
    """The text files that the rows of a study make, by path; `readme` with its block among them.

    Raises ValueError if the rows hold no set of `pooled.POOLED` with all fixed lines, or the README lacks a marker.
    """
    pooled, sets = pool(rows), comparable(rows)
    if not pooled:
        raise ValueError(f"{study.rows.name} holds nothing to pool yet; run the command that makes it first.")
    others = read_rows([path for path in study.others if path.is_file()])
    return {
        README: with_block(readme, study.markers, readme_block(study, pooled, sets)),
        study.page: results_page(pooled, sets, others),
        study.pooled: "".join(json.dumps(row) + "\n" for row in pooled),
    }


def main(arguments: Sequence[str]) -> int:
    """Write everything, or with `--check` compare; 1 if something differed."""
    if unknown := set(arguments) - {"--check"}:
        print(f"Unknown argument {min(unknown)!r}; there is only --check.", file=sys.stderr)
        return 2
    stale: list[Path] = []
    for study in (study for study in STUDIES if study.rows.is_file()):
        rows = read_rows(study.rows)
        pooled = pool(rows)
        files = written(study, README.read_text(encoding="utf-8"), rows)
        if "--check" in arguments:
            stale += [
                path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
            ]
            shown = picture.hash_in(study.picture.read_bytes()) if study.picture.is_file() else None
            if shown != (picture.rows_hash(pooled) if picture.drawable(pooled) else None):
                stale.append(study.picture)
            continue
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        image = picture.draw(pooled)
        if image is None:
            study.picture.unlink(missing_ok=True)
        else:
            study.picture.write_bytes(image)
    for path in stale:
        print(f"{path.relative_to(PACKAGE)} is not that of the rows.", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
