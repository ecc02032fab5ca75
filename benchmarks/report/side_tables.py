"""Tables beside the trade-off: several passages a question, slots by retrieval score, the fidelity gate, sweeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..names import dataset_title, kind_of, method_name
from ..quality.pooled import FULL, NONE, Key
from ..rows import Row

SCORES = {"embedder": "the embedder's score", "bm25": "BM25", "gold": "knowing the right passage"}
ALLOCATION = (
    "As many slots a question as one ratio for all its passages gives, divided between the passages by score. Negative nats "
    "are good: the reference answer became likelier."
)
GATE = (
    "Passages that the gate sends as text, the others compressed; beside it, at equal reader tokens, passages drawn at random, "
    "the shortest passages, and slots alone at a lower ratio. Differences of F1 are paired by question, their intervals "
    "resample passages."
)
SWEEPS = (
    "Recipes trained with some settings varied, few steps, on the halves for choosing: F1, with the standard error. The full "
    "text and no context are the reader's own."
)


def several_passages(sets: dict[str, dict[Key, Row]]) -> str:
    """Sets with several passages a question: the best of each kind by F1. Maybe empty."""
    lines = []
    named = [(name, lines) for name, lines in sets.items() if ", " in name]
    for name, found in sorted(named, key=lambda pair: (pair[0].split(", ")[0], pair[1][FULL]["passages"])):
        rows = [row for row in found.values() if not row.get("reader_tuned")]
        cells = [dataset_title(name), *(f"{100 * found[key]['f1']:.1f}" for key in (NONE, FULL))]
        for asked in (False, True):
            cells.append(
                _best(r for r in rows if kind_of(r) in ("soft", "text") and r.get("query_aware", False) == asked)
            )
        cells.append(_best(r for r in rows if kind_of(r) == "plain"))
        lines.append(cells)
    return _table(
        ("passages", "no context", "all of the full text", "compressed once", "for the question", "plain text"), lines
    )


def _best(rows: Iterable[Row]) -> str:
    row = max(rows, key=lambda r: r["f1"], default=None)
    if row is None:
        return ""
    name = method_name(row["method"]).removesuffix(", for the question")
    return (
        f"{100 * row['f1']:.1f} ({100 * row['f1_ci_low']:.0f} to {100 * row['f1_ci_high']:.0f}): {name}, "
        f"{row['reader_tokens']:.0f} tokens"
    )


def allocation_table(rows: Sequence[Row]) -> str:
    """Each budget divided by score against the same budget at one ratio; the newest row of each line. Maybe empty."""
    keys = ("dataset", "method", "ratio_asked", "allocation", "score", "temperature")
    newest = _newest((row for row in rows if "allocation" in row), keys)
    lines = []
    for row in newest:
        by_score = row["allocation"] == "score"
        cells = [
            dataset_title(row["dataset"]),
            method_name(row["method"]) + (f" {row['ratio_asked']:g}x" if row.get("ratio_asked") else ""),
            f"{SCORES[row['score']]}, T = {row['temperature']:g}" if by_score else "one ratio for all",
            str(row["n"]),
            f"{100 * row['f1']:.1f}",
            _change(row, "f1_minus_uniform", 100, "+.1f"),
            _change(row, "nll_minus_uniform", 1, "+.2f"),
        ]
        lines.append(cells)
    columns = ("set", "budget of", "slots divided by", "questions", "F1", "against one ratio")
    return _table((*columns, "nats of the answer, against one ratio"), lines)


def gate_table(rows: Sequence[Row]) -> str:
    """Every sending of a gate beside random, shortest and slots alone, the newest row of each line. Maybe empty."""
    keys = ("dataset", "method", "ratio_asked", "calibrated_by", "priced", "level")
    newest = _newest((r for r in rows if r.get("test") == "gate" and r["sending"] == "gate" and "share" in r), keys)
    lines = []
    for row in newest:
        loss = "probability" if row.get("calibrated_by") == "probability" else "F1"
        cells = [
            " + ".join(map(dataset_title, row["dataset"].split(" + "))) + f" ({row['n']})",
            f"{method_name(row['method'])} {row['ratio_asked']:g}x",
            f"{loss}{' for each token' if row.get('priced') else ''}",
            str(row["level"]),
            f"{100 * row['share']:.0f} %",
            f"{row['reader_tokens']:.0f}",
            f"{100 * row['f1']:.1f}",
            *(_change(row, f"f1_minus_{other}", 100, "+.1f") for other in ("random", "shortest", "slots")),
        ]
        lines.append(cells)
    columns = ("sets", "compressor", "gate goes by", "level", "as text", "tokens read", "F1", "against random")
    return _table((*columns, "against the shortest", "against slots alone"), lines)


def sweep_table(rows: Sequence[Row]) -> str:
    """Every cell of every sweep, the newest row of each line. Maybe empty."""
    found = [row for row in rows if row.get("suite") == "sweep" and "f1" in row]
    newest = _newest(found, ("recipe", "cell", "dataset", "ratio_asked"))
    lines = []
    for row in newest:
        cells = [
            row["recipe"],
            ", ".join(f"`{key}={value}`" for key, value in row["settings"].items()),
            f"{dataset_title(row['dataset'])} ({row['n']})",
            f"{row['ratio_asked']:g}x" if row.get("ratio_asked") else "",
            str(row["steps"]),
            f"{100 * row['f1']:.1f} ± {100 * row['f1_se']:.1f}",
            f"{100 * row['f1_full']:.1f}",
            f"{100 * row['f1_none']:.1f}",
        ]
        lines.append(cells)
    return _table(("recipe", "settings", "set", "ratio", "steps", "F1", "full text", "no context"), lines)


def _newest(rows: Iterable[Row], keys: Sequence[str]) -> list[Row]:
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found[tuple(row.get(key) for key in keys)] = row
    return list(found.values())


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; nothing without lines."""
    rule = "|---" * len(columns) + "|"
    return (
        "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(cells)} |" for cells in lines)])
        if lines
        else ""
    )


def _change(row: Row, key: str, factor: float, form: str) -> str:
    if key not in row:
        return ""
    value, low, high = (factor * row[name] for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"
