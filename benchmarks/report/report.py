"""The report: one HTML file that needs nothing beside it, made from results rows.

Plots are embedded, there are no scripts, and what is read from rows or documents is escaped. The notes are worked out from
the figures, so that a method that loses to plain truncation says so in its own report.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ...compressors.core.files import write_atomically
from ..metrics import exact_match
from ..quality.pooled import pool
from ..rows import Row, by_dataset, latest, paired
from .picture import draw
from .plots import best_baselines, position_plot, quality_plot, ttft_plot
from .report_style import STYLE
from .speed_tables import SpeedTable, speed_tables
from .table import COLUMNS, FIXED, kind_of, name_of, table_lines


@dataclass(frozen=True)
class Example:
    """Answers to one question side by side.

    Attributes:
        question: as it was asked.
        references: the right answers.
        answers: by the name of the line (`full text`, `xrag`, ...), in the order of the columns.
        passage: the passage that tells the answer, for the reader of the report.
    """

    question: str
    references: tuple[str, ...]
    answers: Mapping[str, str]
    passage: str = ""


def write_report(
    path: str | Path,
    rows: Sequence[Row],
    *,
    title: str = "Compressed passages: what was won and what was lost",
    examples: Sequence[Example] = (),
    notes: Iterable[str] = (),
) -> Path:
    """Write the report, atomically, and return its path.

    Args:
        rows: results rows; quality rows make the table, speed rows the times, reading rows and the account's sections of
            their own.
        examples: answers side by side.
        notes: further notes, put in front of those that follow from the figures.

    Raises:
        ValueError: if no row is given.
        ImportError: if matplotlib is missing.
    """
    groups = by_dataset(latest(paired(rows)))
    costs = speed_tables(rows)
    if not groups and not costs:
        raise ValueError("A report needs at least one results row of the suites quality or speed, got none.")
    path = Path(path)
    everything = [row for group in groups.values() for row in group]
    lead = (
        summary(everything)
        if len(groups) == 1
        else f"{len(everything)} measurements on {len(groups)} sets of questions."
        if groups
        else "What reading compressed passages costs."
    )
    overview = _overview(rows) if len(groups) > 1 else ""
    sections = [_dataset(name, group, everything) for name, group in groups.items()] if len(groups) > 1 else []
    sections = [
        overview,
        *sections,
        *((_plots(everything), _table(everything, everything)) if len(groups) == 1 else ()),
        _answers(examples),
        _costs(costs),
        *((_reading(everything),) if len(groups) == 1 else ()),
        _list("Notes", [*notes, *(honest_notes(everything) if len(groups) == 1 else ())]),
        _list("How it was measured", _origins(everything)),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n' + "\n".join(filter(None, sections)) + "\n</main></body></html>\n"
    )
    write_atomically(path, page.encode("utf-8", "replace"))
    path.chmod(0o644)
    return path


def summary(rows: Sequence[Row]) -> str:
    """Two sentences: the fixed lines, and what each method, at its first ratio, reads and keeps of the gap between them."""
    quality = {name_of(row): row for row in rows if row.get("suite") == "quality" and "test" not in row}
    full, none = quality.get(FIXED["full"]), quality.get(FIXED["none"])
    if full is None or none is None:
        return f"{len(rows)} measurements."
    shown = {
        row["method"]: (name, f"{row['reader_tokens']:.0f} tokens", f"{100 * row['recovered_share']:.0f} %")
        for name, row in reversed(quality.items())
        if kind_of(row) == "method" and "recovered_share" in row
    }
    first = f"Over {full['n']} questions the full text scores F1 {100 * full['f1']:.1f} and no context {100 * none['f1']:.1f}."
    if not shown:
        return first
    kept = "; ".join(f"{name} keeps {share} in {tokens}" for name, tokens, share in reversed(shown.values()))
    return f"{first} Of what the passages bring in {full['reader_tokens']:.0f} tokens, {kept}."


def honest_notes(rows: Sequence[Row]) -> list[str]:
    """What the figures themselves say against the methods, in sentences."""
    quality = [row for row in rows if row.get("suite") == "quality" and "test" not in row]
    notes = []
    beaten = {(row["budget_of"], row.get("ratio_asked")): row for row in best_baselines(quality)}
    for row in quality:
        best = beaten.get((row["method"], row.get("ratio_asked")))
        if best is not None and kind_of(row) == "method":
            gap = row["f1"] - best["f1"]
            verb = "is level with" if abs(gap) < 0.0005 else "is ahead of" if gap > 0 else "is behind"
            notes.append(
                f"{name_of(row)} (F1 {100 * row['f1']:.1f}) {verb} the best plain-text baseline with as many reader tokens, "
                f"{name_of(best)} (F1 {100 * best['f1']:.1f})."
            )
    for row in quality:
        if str(row["method"]).endswith("-shuffled"):
            notes.append(
                f"With the compressed passages of another question, {str(row['method']).removesuffix('-shuffled')} scores "
                f"F1 {100 * row['f1']:.1f}: that much comes from the reader's knowledge and habits."
            )
    if any(row["n"] < 200 for row in quality):
        fewest = min(row["n"] for row in quality)
        notes.append(
            f"{fewest} questions are few: the intervals (95 %, bootstrap) are wide, and differences within them are noise."
        )
    if skipped := max((row.get("skipped", 0) for row in quality), default=0):
        notes.append(f"{skipped} questions whose full text has no room in the reader were left out of every line.")
    slower = [row for row in rows if row.get("suite") == "speed" and row.get("ttft_online_speedup", 2) < 1]
    if slower:
        names = ", ".join(sorted({name_of(row) for row in slower}))
        notes.append(
            f"Compressed within the request, {names} can be slower than reading the full text; stored, it is paid once."
        )
    return notes


def _overview(rows: Sequence[Row]) -> str:
    """The picture of all methods over all sets, where the rows keep each question's score."""
    image = draw(pool(rows))
    if image is None:
        return ""
    data = base64.b64encode(image).decode()
    return (
        '<section><figure><h2>All methods, all sets</h2><img alt="Recovered share by ratio and by TTFT" '
        f'src="data:image/png;base64,{data}"></figure></section>'
    )


def _dataset(name: str, rows: Sequence[Row], everything: Sequence[Row]) -> str:
    """The part of one dataset in a report of several."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in honest_notes(rows))
    parts = [
        f'<section class="set"><h2>{escape(name)}</h2><p class="lead">{escape(summary(rows))}</p></section>',
        _plots(rows),
        _table(rows, everything),
        _reading(rows),
        f"<section><ul>{notes}</ul></section>" if notes else "",
    ]
    return "\n".join(filter(None, parts))


def _table(rows: Sequence[Row], everything: Sequence[Row]) -> str:
    lines = table_lines(rows, everything)
    if not lines:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    body = "\n".join(
        f'<tr class="{line.kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in line.cells) + "</tr>"
        for line in lines
    )
    return (
        f'<section><div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
        '<p class="caption">Ratio: passage tokens per slot. TTFT: from request to first token, stored passages loaded. '
        "Decode time: each token after it. "
        "EM, F1 and recovered share in per cent; the share is (F1 &minus; no context) / (full text &minus; no context), with "
        "its 95 % interval. Indented lines: the control (another question's compressed passages) and the text baselines that "
        "may read as many tokens as the method above."
        "</p></section>"
    )


def _costs(tables: Sequence[SpeedTable]) -> str:
    """The account: one section, a table each."""
    parts = []
    for table in tables:
        head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in table.lines
        )
        parts.append(
            f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody>'
            f'</table></div><p class="caption">{escape(table.caption)}</p>'
        )
    return f"<section><h2>Speed and cost</h2>{''.join(parts)}</section>" if parts else ""


def _plots(rows: Sequence[Row]) -> str:
    figures = [
        _figure(quality_plot(rows), "Quality against compression ratio", "F1 against compression ratio"),
        _figure(ttft_plot(rows), "Time to first token against context length", "TTFT against context length"),
    ]
    return f'<section class="plots">{"".join(figures)}</section>' if any(figures) else ""


def _figure(svg: str | None, title: str, alt: str) -> str:
    if svg is None:
        return ""
    data = base64.b64encode(svg.encode()).decode()
    return f'<figure><h2>{title}</h2><img alt="{alt}" src="data:image/svg+xml;base64,{data}"></figure>'


def _answers(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    names = list(examples[0].answers)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("question", "right answer", *names))
    lines = []
    for example in examples:
        cells = [
            f'<td class="{"right" if exact_match(answer, example.references) else "wrong"}">{escape(answer) or "&nbsp;"}</td>'
            for answer in (example.answers.get(name, "") for name in names)
        ]
        passage = f"<details><summary>passage</summary>{escape(example.passage)}</details>" if example.passage else ""
        lines.append(
            f"<tr><td>{escape(example.question)}{passage}</td><td>{escape(example.references[0])}</td>{''.join(cells)}</tr>"
        )
    return (
        f'<section><h2>Answers side by side</h2><div class="scroll"><table class="answers"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        '<p class="caption">A tick marks an exact match with a right answer.</p></section>'
    )


def _reading(rows: Sequence[Row]) -> str:
    swaps = [row for row in rows if row.get("test") == "answer-swap"]
    plot = _figure(
        position_plot(rows), "The gold passage among distractors", "F1 against the place of the gold passage"
    )
    sentences = [
        f"<p>{escape(name_of(row))}: with the answer in the passages replaced by another of like kind ({row['n']} questions), "
        f"{100 * row['em']:.0f} % of the answers are exactly the new one and {100 * row['em_old']:.0f} % still the old one"
        + (
            f"; of the {row['n_right']} answered rightly before, {100 * row['follows']:.0f} % follow"
            if "follows" in row
            else ""
        )
        + ".</p>"
        for row in swaps
    ]
    return f"<section>{plot}{''.join(sentences)}</section>" if plot or sentences else ""


def _list(title: str, items: Iterable[str]) -> str:
    entries = "".join(f"<li>{escape(item)}</li>" for item in dict.fromkeys(items))
    return f"<section><h2>{title}</h2><ul>{entries}</ul></section>" if entries else ""


def _origins(rows: Sequence[Row]) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in rows:
        facts = [str(row[key]) for key in ("device", "dtype", "date") if key in row]
        facts += [f"{key} {row[key]}" for key in ("dataset", "commit", "seed") if row.get(key) not in (None, "")]
        if "command" in row:
            found.setdefault(f"{row['command']} ({', '.join(facts)})", []).append(str(row.get("suite", "")))
    return [f"{', '.join(dict.fromkeys(suites))}: {origin}" for origin, suites in found.items()]
