"""The README's table of results, written from the rows in `results/quality.jsonl`.

`python -m nutgraf.benchmarks.readme` puts it between the markers in README.md; `--check` only says whether it stands there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .rows import Row

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: begin (python -m nutgraf.benchmarks.readme) -->", "<!-- results: end -->"
DATASETS = {"qa_dev_squad": "SQuAD", "qa_dev_qamr": "QAMR"}
TRUNCATE, EXTRACT = "the passage's first tokens", "sentences picked by the question (BM25)"
# (method, ratio asked for, name in the table); a line that no row has is left out.
LINES: list[tuple[str, float | None, str]] = [
    ("full", None, "full text"),
    ("none", None, "no context"),
    ("mean-pool", 2.0, "mean-pooled windows"),
    ("llmlingua", 2.0, "LLMLingua"),
    ("longllmlingua-query", 2.0, "LongLLMLingua, for the question"),
    ("llmlingua2", 2.0, "LLMLingua-2"),
    ("selective-context", 2.0, "Selective Context"),
    ("truncate", 2.0, TRUNCATE),
    ("extract", 2.0, EXTRACT),
    ("mean-pool", 4.0, "mean-pooled windows"),
    ("icae", 4.0, "ICAE"),
    ("gist", 4.0, "gist tokens"),
    ("500x", 4.0, "500xCompressor"),
    ("autocompressor", 4.0, "AutoCompressor"),
    ("pisco", 4.0, "PISCO"),
    ("truncate", 4.0, TRUNCATE),
    ("extract", 4.0, EXTRACT),
    ("mean-pool", 8.0, "mean-pooled windows"),
    ("truncate", 8.0, TRUNCATE),
    ("extract", 8.0, EXTRACT),
    ("mean-pool", 16.0, "mean-pooled windows"),
    ("truncate", 16.0, TRUNCATE),
    ("extract", 16.0, EXTRACT),
    ("xrag", None, "xRAG, one slot"),
    ("mean-pool-shuffled", 4.0, "mean-pooled windows of another question's passage"),
    ("gist-shuffled", 4.0, "gist tokens of another question's passage"),
    ("xrag-shuffled", None, "xRAG's slot of another question's passage"),
]


def newest(rows: Iterable[Row]) -> dict[tuple[str, str, float | None], Row]:
    """The last row of each (dataset, method, ratio asked for), of the reader that the dataset was last read with."""
    rows = [row for row in rows if row["suite"] == "quality" and row.get("half") == "report"]
    reader = {row["dataset"]: row["reader"] for row in rows if row["method"] == "full"}
    rows = [row for row in rows if row["reader"] == reader.get(row["dataset"])]
    return {(row["dataset"], row["method"], row.get("ratio_asked")): row for row in rows}


def table(rows: Iterable[Row]) -> str:
    """The Markdown table."""
    found = newest(rows)
    titles = "".join(f" {name} tokens | {name} F1 | recovered (95 %) |" for name in DATASETS.values())
    out = [
        f"| what the reader reads | ratio | bytes a passage |{titles}",
        "|---|---|---|" + "---|---|---|" * len(DATASETS),
    ]
    for method, asked, name in LINES:
        cells = [found.get((dataset, method, asked)) for dataset in DATASETS]
        if any(cells):
            parts = [name, _ratios(method, asked, cells), _bytes(cells)]
            out.append("| " + " | ".join([*parts, *(text for row in cells for text in _cells(row))]) + " |")
    return "\n".join(out)


def _ratios(method: str, asked: float | None, rows: Sequence[Row | None]) -> str:
    if method in ("full", "none"):
        return "1x" if method == "full" else ""
    found = [float(row.get("ratio", asked or 1)) for row in rows if row]
    if asked is not None and all(abs(ratio / asked - 1) < 0.1 for ratio in found):
        return f"{asked:g}x"
    return " / ".join(f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x" for ratio in found)


def _bytes(rows: Sequence[Row | None]) -> str:
    sizes = [f"{row['bytes_per_passage']:,.0f}" for row in rows if row and "bytes_per_passage" in row]
    return " / ".join(sizes)


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    share = ""
    if "recovered_share" in row and row["method"] not in ("full", "none"):
        share = f"{100 * row['recovered_share']:.0f} % ({100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f})"
    return [f"{row['reader_tokens']:.0f}", f"{100 * row['f1']:.1f}", share]


def with_table(readme: str, rows: Iterable[Row]) -> str:
    """`readme` with the table of `rows` between its markers; ValueError if a marker is missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"The README needs one line {BEGIN!r} and, behind it, one line {END!r}.")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"


def read_rows(path: Path = ROOT / "benchmarks" / "results" / "quality.jsonl") -> list[Row]:
    """The rows of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def main(arguments: Sequence[str]) -> int:
    """Write the table, or with `--check` compare; 1 if it differed."""
    if unknown := set(arguments) - {"--check"}:
        print(f"Unknown argument {min(unknown)!r}; there is only --check.", file=sys.stderr)
        return 2
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_table(old, read_rows())
    if "--check" not in arguments:
        path.write_text(new, encoding="utf-8")
    return int(old != new and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
