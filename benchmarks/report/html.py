"""The report: one self-contained HTML file of results rows, without scripts.

The notes follow from the figures, so that a method that loses to plain truncation says so in its own report.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...compressors.core.files import write_atomically
from ..metrics import exact_match
from ..names import FIXED, is_beside, kind_of, line_name
from ..quality.pooled import pool
from ..rows import Row, by_dataset, latest, paired
from .plots import best_baselines, position_plot, trade_off, ttft_plot
from .quality_tables import is_line, line_table
from .speed_tables import speed_tables
from .table import render


@dataclass(frozen=True)
class Example:
    """Answers to one question side by side, by the names of the lines, with the passage that holds the answer."""

    question: str
    references: tuple[str, ...]
    answers: Mapping[str, str]
    passage: str = ""


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    *,
    title: str = "Compressed passages: what is gained and what is lost",
    lead: str = "",
    examples: Sequence[Example] = (),
    notes: Iterable[str] = (),
) -> Path:
    """Write the report atomically and return its path; the newest row of each line counts.

    `lead` is the sentence below the title, by default one that follows from the rows.

    Raises:
        ValueError: If there is no row to show.
        ImportError: If matplotlib is missing.
    """
    groups = by_dataset(latest(paired(rows)))
    costs = speed_tables(rows)
    if not groups and not costs:
        raise ValueError("A report needs at least one results row of the suites quality or speed, got none.")
    everything = [row for group in groups.values() for row in group]
    single = len(groups) == 1
    overview = trade_off(pool(rows)) if len(groups) > 1 else None
    path = Path(path)
    page = render(
        "report.html",
        title=title,
        lead=lead or (summary(everything) if single else ""),
        count=len(everything),
        overview=None if overview is None else base64.b64encode(overview).decode(),
        sets=[_set(name, group, everything) for name, group in groups.items()],
        single=single,
        examples=examples,
        exact_match=exact_match,
        costs=costs,
        notes=dict.fromkeys([*notes, *(honest_notes(everything) if single else ())]),
        origins=_origins(everything),
    )
    write_atomically(path, page.encode("utf-8", "replace"))
    path.chmod(0o644)
    return path


def _set(name: str, rows: Sequence[Row], everything: Sequence[Row]) -> dict[str, Any]:
    picture = trade_off([row for row in latest(rows) if is_line(row)], svg=True)
    plots = {
        "Quality against compression ratio and time": None if picture is None else picture.decode(),
        "Time to first token against context length": ttft_plot(rows),
        "Position of the gold passage": position_plot(rows),
    }
    return {
        "name": name,
        "summary": summary(rows),
        "plots": {t: base64.b64encode(svg.encode()).decode() for t, svg in plots.items() if svg is not None},
        "table": line_table(rows, timed=everything),
        "swaps": [row | {"name": line_name(row)} for row in rows if row.get("test") == "answer-swap"],
        "notes": honest_notes(rows),
    }


def summary(rows: Sequence[Row]) -> str:
    """F1 of the fixed lines, and how much of the gap between them each method keeps at its first ratio."""
    quality = {line_name(row): row for row in rows if is_line(row)}
    full, none = quality.get(FIXED["full"]), quality.get(FIXED["none"])
    if full is None or none is None:
        return f"{len(rows)} measurements."
    first = f"Over {full['n']} questions the full text scores F1 {100 * full['f1']:.1f} and no context {100 * none['f1']:.1f}."
    shown: dict[str, str] = {}
    for name, row in quality.items():
        if kind_of(row) != "fixed" and not is_beside(row) and "recovered_share" in row:
            kept = f"{name} keeps {100 * row['recovered_share']:.0f} % in {row['reader_tokens']:.0f} tokens"
            shown.setdefault(row["method"], kept)
    if not shown:
        return first
    return f"{first} Of what the passages bring in {full['reader_tokens']:.0f} tokens, {'; '.join(shown.values())}."


def honest_notes(rows: Sequence[Row]) -> list[str]:
    """What the figures say against the methods, in sentences."""
    quality = [row for row in rows if is_line(row)]
    baselines = {(row["budget_of"], row.get("ratio_asked")): row for row in best_baselines(quality)}
    notes = []
    for row in quality:
        best = baselines.get((row["method"], row.get("ratio_asked")))
        if best is not None and not is_beside(row) and kind_of(row) != "fixed":
            gap = row["f1"] - best["f1"]
            verb = "is level with" if abs(gap) < 0.0005 else "is ahead of" if gap > 0 else "is behind"
            notes.append(
                f"{line_name(row)} (F1 {100 * row['f1']:.1f}) {verb} the best plain-text baseline with as many reader tokens, "
                f"{line_name(best)} (F1 {100 * best['f1']:.1f})."
            )
    notes += [
        f"With the compressed passages of another question, {str(row['method']).removesuffix('-shuffled')} scores "
        f"F1 {100 * row['f1']:.1f}: that much comes from the reader's own knowledge."
        for row in quality
        if kind_of(row) == "control"
    ]
    if (fewest := min((row["n"] for row in quality), default=200)) < 200:
        notes.append(f"{fewest} questions are few: differences within the 95 % bootstrap intervals are noise.")
    if skipped := max((row.get("skipped", 0) for row in quality), default=0):
        notes.append(f"{skipped} questions are left out of every line: their full text does not fit into the reader.")
    slower = {line_name(row) for row in rows if row.get("suite") == "speed" and row.get("ttft_online_speedup", 2) < 1}
    if slower:
        names = ", ".join(sorted(slower))
        notes.append(f"Compressed within the request, {names} can be slower than reading the full text.")
    return notes


def _origins(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        facts = [str(row[key]) for key in ("device", "dtype", "date") if key in row]
        facts += [f"{key} {row[key]}" for key in ("dataset", "commit", "seed") if row.get(key) not in (None, "")]
        if "command" in row:
            found.setdefault(f"{row['command']} ({', '.join(facts)})", []).append(str(row.get("suite", "")))
    return [f"{', '.join(dict.fromkeys(suites))}: {origin}" for origin, suites in found.items()]
