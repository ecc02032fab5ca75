"""Tables of keys and values kept without training, beside other methods that compress a passage once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..names import dataset_title, kind_of, method_name
from ..quality.pooled import FULL, NONE, POOLED, Key, comparable, lead, pooled_row, tellable
from ..rows import Row, clean
from .quality_tables import set_title, share
from .table import Column, Table, build, interval

OURS = "kv-match"
CHOICES = ("qa_dev_squad", "qa_dev_nq")  # sets on which every score, budget and repair was measured
RATIOS = (1.0, 2.0, 4.0, 8.0, 16.0)
DEFAULTS = {"score": "probes", "budget": "global", "repair": "bias+values"}

Sets = dict[str, dict[Key, Row]]


def once(rows: Sequence[Row]) -> list[Row]:
    """Pooled rows of the methods that compress a passage once, with the lead of ours over the best other of each ratio."""
    found = tellable(rows)
    sets = {name: found[name] for name in POOLED if any(key[0] == OURS for key in found.get(name, ()))}
    if not sets:
        return []
    first, *others = sets.values()
    keys = [key for key in first if ":" not in key[0] and all(key in lines for lines in others)]
    pooled = {key: clean(pooled_row(sets, key)) for key in keys if not first[key].get("query_aware")}
    for key, row in pooled.items():
        rivals = [k for k, r in pooled.items() if k[1] == key[1] and k[0] != OURS and "recovered_share" in r]
        if key[0] == OURS and rivals and "recovered_share" in row:
            row |= clean(lead(sets, key, max(rivals, key=lambda k: pooled[k]["recovered_share"])))
    return list(pooled.values())


def choices(rows: Sequence[Row]) -> list[Row]:
    """Pooled rows of every score, budget and repair; none if the default alone was measured."""
    found = tellable(rows)
    if not set(CHOICES) <= found.keys():
        return []
    sets = {name: found[name] for name in CHOICES}
    first, second = sets.values()
    keys = [key for key in first if key in second and key[0].partition(":")[0] == OURS]
    if {key[0] for key in keys} == {OURS}:
        return []
    return [
        clean(pooled_row(sets, key))
        | DEFAULTS
        | dict(part.split("=") for part in key[0].partition(":")[2].split(",") if part)
        for key in keys
    ]


def by_ratio(rows: Sequence[Row], titles: dict[str, Any], ratios: Sequence[float] = RATIOS) -> Table:
    """One line per method, one column per ratio that has rows. `titles`: columns before, from heading to key or function."""
    lines: dict[str, Row] = {}
    for row in rows:
        lines.setdefault(row["method"], dict(row))[f"at {row['ratio_asked']:g}"] = share(row)
    columns = [Column(f"{r:g}x", f"at {r:g}") for r in ratios if any(f"at {r:g}" in line for line in lines.values())]
    return build([*(Column(title, value) for title, value in titles.items()), *columns], lines.values())


def leads(pooled: Sequence[Row]) -> Table:
    """How far ours is ahead of the best other method at each ratio."""
    rows = [row for row in pooled if "lead" in row]
    return build(
        [
            Column("ratio", "ratio_asked", "{:g}x"),
            Column("best other", lambda row: method_name(row["lead_over"])),
            Column("KV matching is ahead by", lambda row: interval(row, "lead", "lead_low", "lead_high", 100, ".0f")),
        ],
        rows,
    )


def set_table(rows: Sequence[Row]) -> Table:
    """Ours on each set, with the full text's and no context's F1."""
    lines = []
    for name, found in comparable(rows).items():
        if name not in POOLED or not any(key[0] == OURS for key in found):
            continue
        line: Row = {"set": set_title(name, found), "full": found[FULL]["f1"], "none": found[NONE]["f1"]}
        line |= {"n": found[FULL]["n"], "skipped": found[FULL].get("skipped", 0)}
        line |= {f"at {ratio:g}": share(found[OURS, ratio, None]) for ratio in RATIOS if (OURS, ratio, None) in found}
        lines.append(line)
    return build(
        [
            Column("set", "set"),
            Column("questions", "n"),
            Column("too long", "skipped"),
            Column("F1 of full text", "full", "{:.1f}", 100),
            Column("of no context", "none", "{:.1f}", 100),
            *(Column(f"{ratio:g}x", f"at {ratio:g}") for ratio in RATIOS),
        ],
        lines,
    )


def byte_table(pooled: Sequence[Row]) -> Table:
    """Mean bytes of a passage, by method and ratio."""
    lines: dict[str, Row] = {}
    for row in pooled:
        if row["method"] != "none" and "bytes_per_passage" in row:
            title = "full text" if row["method"] == "full" else method_name(row["method"])
            line = lines.setdefault(row["method"], {"title": title})
            line[f"at {row.get('ratio_asked') or 1:g}"] = row["bytes_per_passage"]
    columns = [Column(f"{ratio:g}x", f"at {ratio:g}", "{:,.0f}") for ratio in RATIOS]
    return build([Column("what is stored", "title"), *columns], lines.values())


def page_tables(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that the page of keys and values shows."""
    pooled, varied = once(rows), choices(rows)
    compressed = [row for row in pooled if kind_of(row) != "fixed"]
    order = {value: i for i, value in enumerate(("global", "per-layer", "uniform", "none", "bias", "bias+values"))}
    varied.sort(key=lambda row: (row["score"] != "probes", row["score"], order[row["budget"]], order[row["repair"]]))
    return {
        "pooled": pooled,
        "absent": [dataset_title(name) for name in POOLED if pooled and name not in pooled[0]["datasets"]],
        "once": by_ratio(compressed, {"method": lambda row: method_name(row["method"])}),
        "leads": leads(pooled),
        "sets": set_table(rows),
        "bytes": byte_table(pooled),
        "choices": by_ratio(varied, {"score": "score", "budget": "budget", "repair": "repair"}, RATIOS[1:]),
        "n": varied[0]["n"] if varied else 0,
    }
