"""Tables of methods that make a shorter text, for one passage and for several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import metrics
from ..names import dataset_title, kind_of, method_name
from ..quality.pooled import FULL, NONE, Key, comparable, pool
from ..rows import Row, clean
from .kv_tables import by_ratio
from .quality_tables import SET_COLUMNS, in_order, set_title
from .table import Column, Table, build, interval

RATIOS = (2.0, 4.0, 8.0)
_RIGHT = 0.5  # an answer counts as right from this F1 on


def page_tables(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that the page of shorter texts shows."""
    pooled, sets = pool(rows), comparable(rows)
    shown = [row for row in pooled if kind_of(row) in ("text", "plain")]
    asked = [row for row in shown if row.get("query_aware") or row["method"].startswith("extract")]
    titles = {"what the reader reads": lambda row: method_name(row["method"]).removesuffix(", for the question")}
    return {
        "pooled": pooled,
        "names": [dataset_title(name) for name in pooled[0]["datasets"]] if pooled else [],
        "asked": by_ratio(asked, titles, RATIOS),
        "once": by_ratio([row for row in shown if row not in asked], titles, RATIOS),
        "several": [
            {"title": set_title(name, lines), "n": lines[FULL]["n"], "table": several_table(lines)}
            for name, lines in sets.items()
            if lines[FULL].get("passages", 1) > 1
        ],
        "sets": [
            {"title": set_title(name, lines), "n": lines[FULL]["n"]}
            | {"table": build(SET_COLUMNS, in_order(lines.values()))}
            for name, lines in sets.items()
        ],
    }


def several_table(lines: dict[Key, Row]) -> Table:
    """All lines of a set with several passages: F1, its change against the full text, answers rescued and damaged."""
    found = [row | against_full(row, lines[FULL]) for row in lines.values()]
    return build(
        [
            Column("what the reader reads", title),
            Column("tokens read", "reader_tokens", "{:,.0f}"),
            Column("F1", "f1", "{:.1f}", 100),
            Column("change", lambda row: interval(row, "change", "change_low", "change_high", 100, "+.1f")),
            Column("rescued", "rescued"),
            Column("damaged", "damaged"),
        ],
        in_order(found),
    )


def title(row: Row) -> str:
    """Name of a line; with ``pooled``, that its passages share a budget."""
    method = str(row["method"]).removesuffix(":pooled=true")
    asked = ", for the question" * bool(row.get("query_aware") and "-query" not in method)
    return method_name(method) + asked + ", one budget" * (method != row["method"])


def against_full(row: Row, full: Row) -> Row:
    """Change of F1 against the full text with its paired 95 % interval, and the answers that became right and wrong."""
    if row["method"] in (FULL[0], NONE[0]):
        return {}
    ours, theirs = (np.array(r["f1_each"], float) for r in (row, full))
    low, high = metrics.bootstrap_mean(ours - theirs)
    right, was = ours >= _RIGHT, theirs >= _RIGHT
    counts = {"rescued": int((right & ~was).sum()), "damaged": int((was & ~right).sum())}
    return clean({"change": float((ours - theirs).mean()), "change_low": low, "change_high": high} | counts)
