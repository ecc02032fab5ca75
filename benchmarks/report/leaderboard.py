"""The leaderboard's page and picture: all lines at each ratio, the best first; recovered share against bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...compressors.core.files import write_atomically
from ..names import FIXED, dataset_title, kind_of, method_name
from ..quality.pooled import FULL, NONE, comparable, pooled_rows, tellable
from ..rows import Row
from .plots import by_bytes
from .table import Column, build, interval, render

COLUMNS = (
    Column("method", lambda row: method_name(row["method"])),
    Column("interface", "interface"),
    Column("recovered share", lambda row: interval(row, "recovered_share", "ci_low", "ci_high", 100, "z.0f", " %")),
    Column("F1", "f1", "{:.1f}", 100),
    Column("compression ratio", "ratio", "{:.1f}x"),
    Column("bytes per passage", "bytes_per_passage", "{:,.0f}"),
    Column("training", lambda row: None if "train_seconds" not in row else f"{row['train_seconds'] / 60:.1f} min"),
    Column("steps", "train_steps", "{:,}"),
    Column("reader", lambda row: "tuned" if row.get("reader_tuned") else ""),
)


def pooled_lines(rows: Sequence[Row], half: str) -> list[Row]:
    """All lines over the question sets of a half, with facts about training.

    A set whose full text cannot be told from no context is left out, unless all are like that.
    """
    sets = tellable(rows, half) or comparable(rows, half)
    trained = {row["method"]: row for row in rows if "train_steps" in row}
    facts = ("train_steps", "train_seconds", "train_tokens", "recipe")
    return [
        row | {key: trained[row["method"]][key] for key in facts if key in trained.get(row["method"], {})}
        for row in pooled_rows(sets)
    ]


def write_leaderboard(folder: Path, rows: Sequence[Row], minutes: float | None, steps: int | None) -> list[Path]:
    """Writes ``leaderboard.md`` and, where recovered shares can be told, ``leaderboard-HALF.png``; the paths of both."""
    page, written = [], []
    budget = f"{minutes:g} minutes" if minutes is not None else f"{steps:,} optimiser steps"
    for half in ("report", "tune"):
        lines = pooled_lines(rows, half)
        if not lines:
            continue
        page.append(_half(lines, half))
        if picture := by_bytes(lines):
            written.append(folder / f"leaderboard-{half}.png")
            write_atomically(written[-1], picture)
            page.append(f"![Recovered share against bytes per passage]({written[-1].name})\n")
    told = (
        f"# Leaderboard\n\nEvery recipe was trained for {budget} on the same reader and data. Recovered share: "
        "(F1 - no context) / (full text - no context), mean over the question sets, with its 95 % bootstrap interval; absent "
        "where the full text cannot be told from no context. Choose on the tune half, report the other.\n\n"
    )
    write_atomically(folder / "leaderboard.md", (told + "\n".join(page)).encode())
    return [folder / "leaderboard.md", *written]


def _half(lines: Sequence[Row], half: str) -> str:
    fixed = {(row["method"], row.get("ratio_asked"), row.get("budget_of")): row for row in lines}
    full, none = fixed[FULL], fixed[NONE]
    names = ", ".join(map(dataset_title, full["datasets"]))
    scores = f"Full text {100 * full['f1']:.1f} F1, no context {100 * none['f1']:.1f}"
    text = f"## Half {half}\n\n{names}: {full['n']} questions. {scores}.\n"
    ratios = sorted({row["ratio_asked"] for row in lines if row.get("ratio_asked")})
    for ratio in [*ratios, None]:
        there = [row for row in lines if row.get("ratio_asked") == ratio and row["method"] not in FIXED]
        ranked = sorted(there, key=_rank)
        if ranked:
            title = "Ratio of its own" if ratio is None else f"{ratio:g}x"
            text += f"\n### {title}\n" + render("table_only.md", t=build(COLUMNS, ranked, kind=kind_of)) + "\n"
    return text


def _rank(row: Row) -> tuple[Any, ...]:
    return -row.get("recovered_share", 0.0), -row["f1"]
