"""How much of the full text's gain is kept, pooled over question sets, from the rows of single sets.

A set's recovered share is (F1 - none) / (full - none); the pooled share is the mean over sets, so that large sets do not
count for more. Its interval resamples the questions within each set, a question's scores under all three lines together.
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
ONE_SLOT = 48  # from this ratio on a passage of these sets has one slot, or one a shard
# What is aimed at, by budget and kind; `ONE_SLOT` on SQuAD alone.
AIMS: dict[tuple[int, str], float] = {
    (2, "soft"): 0.95,
    (4, "soft"): 0.92,
    (8, "soft"): 0.85,
    (16, "soft"): 0.70,
    (2, "text"): 0.92,
    (4, "text"): 0.80,
    (ONE_SLOT, "soft"): 0.15,
}

Key = tuple[str, float | None, str | None]
FULL: Key = ("full", None, None)
NONE: Key = ("none", None, None)


def comparable(rows: Sequence[Row], half: str = "report") -> dict[str, dict[Key, Row]]:
    """For each question set its newest rows, by (method, ratio asked for, whose budget).

    Only rows that keep the F1 of each question count, and of these only those of the questions and the reader that the set's
    full text was last read with, so that all lines of a set are paired.
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
    """The pooled rows of all lines that each of the `POOLED` sets has; sets that are not `tellable` are left out."""
    sets = tellable(rows)
    return [clean(row) for row in pooled_rows({name: sets[name] for name in POOLED if name in sets})]


def tellable(rows: Sequence[Row], half: str = "report") -> dict[str, dict[Key, Row]]:
    """`comparable` without the sets whose full text cannot be told from no context: a share of nothing is no share."""
    return {
        name: lines
        for name, lines in comparable(rows, half).items()
        if "recovered_share" in pooled_row({name: lines}, FULL)
    }


def pooled_rows(sets: dict[str, dict[Key, Row]]) -> list[Row]:
    """One row for each line that every set has, the fixed ones first, then in order of appearance."""
    if not sets:
        return []
    first, *others = sets.values()
    return [pooled_row(sets, key) for key in first if all(key in lines for lines in others)]


def pooled_row(sets: dict[str, dict[Key, Row]], key: Key, seed: int = 0) -> Row:
    """A line pooled over sets: `recovered_share` with `ci_low` and `ci_high`, mean `f1`, geometric mean `ratio`, mean TTFT.

    The full text of a method that tunes the reader is that of a reader tuned without compression (`full-text`), where every
    set has that line; `against` then names it. The mean TTFT is the line's in relation to the full text's that it took turns
    with, times that of the full text's own row. The share is absent where the full text of a set brings nothing that can be
    told from chance.
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
    if all("ttft_ms" in r and "ttft_ms" in lines[FULL] for r, lines in zip(rows, sets.values())):
        # Each line was timed in turns with the full text, at the machine's pace of that minute: that relation is what counts.
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


def _tuned_full_text(sets: dict[str, dict[Key, Row]]) -> Key | None:
    """The line of full text read by a tuned reader that every set has."""
    first, *others = sets.values()
    return next((key for key in first if key[0] == "full-text" and all(key in lines for lines in others)), None)


def budget_of(row: Row) -> int | None:
    """The column of a pooled or quality row: 2, 4, 8, 16 or 32, the nearest to its ratio; `ONE_SLOT`; None for fixed lines."""
    ratio = row.get("ratio_asked") or row.get("ratio")
    if kind_of(row) == "fixed" or not ratio:
        return None
    return ONE_SLOT if ratio >= ONE_SLOT else min(BUDGETS, key=lambda budget: abs(math.log(ratio / budget)))


def best(rows: Sequence[Row], budget: int, kind: str, for_the_question: bool | None = None) -> Row | None:
    """Of the rows of one kind at one budget the one of highest share; of methods that need the question, or of the others.

    Methods that tune the reader compete only if they were held against a reader tuned alike (`against`): what is gained by
    tuning is no compression.
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
