"""Recovered share pooled over question sets.

The pooled share is the mean of the sets' shares (F1 - none) / (full - none). Its interval resamples questions within each
set, the scores of a question under all three lines together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .. import metrics
from ..names import kind_of
from ..rows import Row, clean

POOLED = ("qa_dev_squad", "qa_dev_nq", "qa_dev_quoref", "qa_dev_fairytaleqa", "qa_dev_qamr")
BUDGETS = (2, 4, 8, 16, 32)
ONE_SLOT = 48  # from this ratio on, a passage of these sets has one slot

Key = tuple[str, float | None, str | None]
FULL: Key = ("full", None, None)
NONE: Key = ("none", None, None)


def comparable(rows: Sequence[Row], half: str = "report") -> dict[str, dict[Key, Row]]:
    """The newest rows of each question set, by (method, ratio asked for, budget of).

    Only rows with the F1 of each question count, on the questions and with the reader of the set's last full text, so that
    all lines of a set are paired.
    """
    rows = [
        row
        for row in rows
        if row.get("suite") == "quality" and "test" not in row and row.get("half") == half and "f1_each" in row
    ]
    last = {row["dataset"]: (row["questions"], row["reader"]) for row in rows if row["method"] == "full"}
    found: dict[str, dict[Key, Row]] = {}
    for row in rows:
        if "store_precision" not in row and (row["questions"], row["reader"]) == last.get(row["dataset"]):
            key = (row["method"], row.get("ratio_asked"), row.get("budget_of"))
            found.setdefault(row["dataset"], {})[key] = row
    return {name: lines for name, lines in found.items() if {FULL, NONE} <= set(lines)}


def pool(rows: Sequence[Row]) -> list[Row]:
    """Pooled rows of all lines that each `tellable` set of `POOLED` has."""
    sets = tellable(rows)
    return [clean(row) for row in pooled_rows({name: sets[name] for name in POOLED if name in sets})]


def tellable(rows: Sequence[Row], half: str = "report") -> dict[str, dict[Key, Row]]:
    """`comparable` without the sets whose full text cannot be told from no context."""
    return {
        name: lines
        for name, lines in comparable(rows, half).items()
        if "recovered_share" in pooled_row({name: lines}, FULL)
    }


def pooled_rows(sets: dict[str, dict[Key, Row]]) -> list[Row]:
    """A row for each line that every set has, in order of appearance."""
    if not sets:
        return []
    first, *others = sets.values()
    return [pooled_row(sets, key) for key in first if all(key in lines for lines in others)]


def pooled_row(sets: dict[str, dict[Key, Row]], key: Key, seed: int = 0) -> Row:
    """A line pooled over sets: `recovered_share` with `ci_low` and `ci_high`, mean F1 and TTFT, geometric mean ratio.

    A method that tunes the reader is compared with the full text of a reader tuned without compression, where every set has
    that line; `against` then names it. The TTFT is the line's relative to the full text it took turns with, times that of the
    full text's own row. The share is absent where the full text of a set cannot be told from no context.
    """
    rows = [lines[key] for lines in sets.values()]
    row: Row = {
        "suite": "pooled",
        "datasets": list(sets),
        "method": key[0],
        "ratio_asked": key[1],
        "budget_of": key[2],
        "n": sum(r["n"] for r in rows),
        "f1": sum(r["f1"] for r in rows) / len(rows),
    }
    for name in ("interface", "query_aware", "reader_tuned"):
        if name in rows[0]:
            row[name] = rows[0][name]
    if all(r.get("ratio", 0) > 0 for r in rows):
        row["ratio"] = math.exp(sum(math.log(r["ratio"]) for r in rows) / len(rows))
    row["reader_tokens"] = sum(r["reader_tokens"] for r in rows) / len(rows)
    if all("bytes_per_passage" in r for r in rows):
        row["bytes_per_passage"] = sum(r["bytes_per_passage"] for r in rows) / len(rows)
    if all("ttft_ms" in r and "ttft_ms" in lines[FULL] for r, lines in zip(rows, sets.values())):
        # each line was timed in turns with the full text, so the ratio of the two counts
        full = [lines[FULL]["ttft_ms"] for lines in sets.values()]
        times = [ms * r["ttft_ms"] / r["ttft_full_ms"] for ms, r in zip(full, rows)]
        row["ttft_ms"], row["ttft_full_ms"] = sum(times) / len(rows), sum(full) / len(rows)
        row["ttft_speedup"] = row["ttft_full_ms"] / row["ttft_ms"]
    reference, tuned = FULL, _tuned_full_text(sets)
    if row.get("reader_tuned") and tuned is not None and key != tuned:
        reference, row["against"] = tuned, tuned[0]
    scores = [
        tuple(np.array(lines[line]["f1_each"], float) for line in (key, NONE, reference)) for lines in sets.values()
    ]
    if (share := metrics.pooled_recovered_share(scores, seed=seed)) is not None:  # type: ignore[arg-type]
        row |= dict(zip(("recovered_share", "ci_low", "ci_high"), share))
    return row


def lead(sets: dict[str, dict[Key, Row]], key: Key, over: Key, seed: int = 0) -> Row:
    """Pooled share of a line less that of another, paired by question: `lead` with `lead_low` and `lead_high`."""
    scores = []
    for lines in sets.values():
        ours, theirs, none, full = (np.array(lines[line]["f1_each"], float) for line in (key, over, NONE, FULL))
        scores.append((ours - theirs + none, none, full))
    found = metrics.pooled_recovered_share(scores, seed=seed)
    return {} if found is None else dict(zip(("lead", "lead_low", "lead_high"), found)) | {"lead_over": over[0]}


def _tuned_full_text(sets: dict[str, dict[Key, Row]]) -> Key | None:
    """The line of full text read by a tuned reader, if every set has it."""
    first, *others = sets.values()
    return next(
        (
            key
            for key in first
            if key[0] != "full"
            and kind_of(first[key]) == "fixed"
            and first[key].get("reader_tuned")
            and all(key in lines for lines in others)
        ),
        None,
    )


def budget_of(row: Row) -> int | None:
    """Budget of a row: the nearest of `BUDGETS` to its ratio, or `ONE_SLOT`; None for fixed lines."""
    ratio = row.get("ratio_asked") or row.get("ratio")
    if kind_of(row) == "fixed" or not ratio:
        return None
    return ONE_SLOT if ratio >= ONE_SLOT else min(BUDGETS, key=lambda budget: abs(math.log(ratio / budget)))


def best(rows: Sequence[Row], budget: int, kind: str, for_the_question: bool | None = None) -> Row | None:
    """The row of one kind at one budget with the highest share; of methods that need the question, or of the others.

    Methods that tune the reader count only if they are compared with a reader tuned alike (`against`).
    """
    there = [
        row
        for row in rows
        if kind_of(row) == kind
        and for_the_question in (None, row.get("query_aware", False))
        and budget_of(row) == budget
        and "recovered_share" in row
        and ("against" in row or not row.get("reader_tuned"))
    ]
    return max(there, key=lambda row: row["recovered_share"], default=None)
