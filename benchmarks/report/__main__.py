"""Write the pages of results from the committed rows: `python -m nutgraf.benchmarks.report`.

With `--check` nothing is written; the exit status is 1 if a page is not that of the rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..audit.page import audit_table
from ..names import dataset_title, kind_of, method_name
from ..quality.pooled import FULL, NONE, Key, comparable, pool
from ..rows import PACKAGE, RESULTS, Row, newest, read_rows
from . import kv_tables as kv
from . import quality_tables as quality
from . import text_tables as text
from .plots import by_bytes, hash_in, rows_hash, trade_off
from .speed_tables import missing, speed_tables
from .table import build, render

PAGES, README = PACKAGE / "docs" / "results", PACKAGE / "README.md"
PICTURE = PAGES / "quality.png"
KV_PICTURE = PAGES / "kv.png"
PRETRAINED, KEPT_PAIRS, SHORTER = "smollm2", "kv_match", "text_methods"  # results files of the pretrained reader
RATIO = 4.0  # of the one number per method


def rows_of(*names: str) -> list[Row]:
    """The committed rows of results files."""
    return read_rows([path for name in names if (path := RESULTS / f"{name}.jsonl").is_file()])


def pages() -> dict[Path, str]:
    """Every text file that follows from the rows, by path."""
    rows = rows_of(PRETRAINED)
    pooled, sets, pairs = pool(rows), comparable(rows), kv.page_tables(rows_of(KEPT_PAIRS))
    shorter = text.page_tables(rows_of(SHORTER))
    return {
        PAGES / "text.md": render("text.md", **shorter),
        RESULTS / f"{SHORTER}_pooled.jsonl": "".join(json.dumps(row) + "\n" for row in shorter["pooled"]),
        PAGES / "kv.md": render("kv.md", **pairs),
        RESULTS / f"{KEPT_PAIRS}_pooled.jsonl": "".join(json.dumps(row) + "\n" for row in pairs["pooled"]),
        PAGES / "quality.md": quality_page(pooled, sets),
        PAGES / "speed.md": speed_page(rows_of("speed", "store", "training_speed", "selection")),
        PAGES / "studies.md": studies_page(),
        PAGES / "audit.md": audit_page(rows_of("audit")),
        PAGES / "methods.json": json.dumps(method_numbers(pooled), indent=2) + "\n",
        RESULTS / f"{PRETRAINED}_pooled.jsonl": "".join(json.dumps(row) + "\n" for row in pooled),
        README: readme(README.read_text(encoding="utf-8"), quality.front(pairs["pooled"], pooled)),
    }


def readme(text: str, kept: str) -> str:
    """The README with its table of what is kept. Raises ValueError if the marks of its place are gone."""
    before, start, rest = text.partition("<!-- kept -->\n")
    _, end, after = rest.partition("<!-- /kept -->\n")
    if not (start and end):
        raise ValueError("README.md needs the lines <!-- kept --> and <!-- /kept --> around the table of what is kept.")
    return f"{before}{start}{kept}{end}{after}"


def quality_page(pooled: Sequence[Row], sets: dict[str, dict[Key, Row]]) -> str:
    """The page about answers of the pretrained reader."""
    return render(
        "quality.md",
        about=quality.about(pooled, sets),
        one_slot=quality.one_slot(sets.get("qa_dev_squad", {})),
        short=quality.short_table(pooled),
        pooled=build(quality.POOLED_COLUMNS, quality.in_order(pooled)),
        several=quality.several_table(sets),
        sets=[
            {"title": quality.set_title(name, lines), "full": lines[FULL], "none": lines[NONE]}
            | {"table": build(quality.SET_COLUMNS, quality.in_order(lines.values()))}
            for name, lines in sets.items()
        ],
    )


def speed_page(rows: Sequence[Row]) -> str:
    """The page about speed and cost."""
    return render("speed.md", tables=speed_tables(rows), missing=missing(rows))


def studies_page() -> str:
    """The page about gate, allocation and store precision."""
    return render(
        "studies.md",
        gate=quality.gate_table(rows_of("gate")),
        allocation=quality.allocation_table(rows_of("allocation")),
        precision=quality.precision_table(rows_of("store_precision")),
    )


def audit_page(rows: Sequence[Row]) -> str:
    """The page about what a copied store gives away: a table per set of passages or questions."""
    sets: dict[tuple[str, int, str], list[Row]] = {}
    for row in newest(rows, ("dataset", "n", "attacked", "method", "ratio_asked", "defence", "attacker")):
        sets.setdefault((row["dataset"], row["n"], row.get("attacked", "passages")), []).append(row)
    titles = {key: f"{dataset_title(key[0])}, {key[1]} {key[2]}" for key in sets}
    return render("audit.md", tables=[audit_table(found, titles[key]) for key, found in sets.items()])


def method_numbers(pooled: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For each method its recovered share at 4x or, if it has no such row, at the nearest ratio."""
    found: dict[str, Row] = {}
    for row in pooled:
        if kind_of(row) in ("soft", "text") and "recovered_share" in row:
            ratio = row.get("ratio_asked") or row["ratio"]
            if row["method"] not in found or abs(ratio - RATIO) < abs(found[row["method"]]["ratio"] - RATIO):
                found[row["method"]] = row | {"ratio": ratio}
    keys = ("interface", "query_aware", "ratio", "recovered_share", "ci_low", "ci_high", "n")
    return {
        method: {"title": method_name(method), "sets": [dataset_title(name) for name in row["datasets"]]}
        | {key: row[key] for key in keys if key in row}
        for method, row in found.items()
    }


def main(arguments: Sequence[str]) -> int:
    """Write everything, or with `--check` compare; 1 if something differs."""
    if unknown := set(arguments) - {"--check"}:
        print(f"Unknown argument {min(unknown)!r}; the only one is --check.", file=sys.stderr)
        return 2
    files = pages()
    pictures = {PICTURE: (trade_off, pool(rows_of(PRETRAINED))), KV_PICTURE: (by_bytes, kv.once(rows_of(KEPT_PAIRS)))}
    if "--check" not in arguments:
        PAGES.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        for path, (draw, drawn) in pictures.items():
            path.write_bytes(draw(drawn) or b"")
        return 0
    stale = [path for path, text in files.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path, (_, drawn) in pictures.items():
        if not path.is_file() or hash_in(path.read_bytes()) != rows_hash(drawn):
            stale.append(path)
    for path in stale:
        print(f"{path.relative_to(PACKAGE)} is not that of the rows.", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
