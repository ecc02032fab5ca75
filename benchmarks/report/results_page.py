"""Results in Markdown: the README's short table of what to use, and RESULTS.md with every line.

Both are made from rows alone, so that no figure or verdict in them can outlive its measurement.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..names import dataset_title, kind_of, method_name
from ..quality.pooled import AIMS, BUDGETS, FULL, NONE, ONE_SLOT, POOLED, Key, best, budget_of
from ..rows import PACKAGE, Row
from .side_tables import ALLOCATION, GATE, SWEEPS, allocation_table, gate_table, several_passages, sweep_table
from .studies import Study

SEVERAL = (
    "**Several passages a question**, one of which has the answer: F1 of the full text, of no context, and of the best line of "
    "each kind with its interval. Where the full text scores little more than no context, the reader is lost in prompts of "
    "that length, and whatever leaves less to read wins."
)
COLUMNS = (("soft", False), ("soft", True), ("text", False), ("text", True), ("plain", None))  # kind, for the question


def short_table(pooled: Sequence[Row]) -> str:
    """What to use at each budget: the best soft and text methods, made once or for each question, and the best plain text.

    The highest of them is in bold.
    """
    out = [
        "| compression | soft, compressed once | soft, for the question | aim | text, compressed once | text, for the question "
        "| aim | plain text |",
        "|---" * 8 + "|",
    ]
    for budget in BUDGETS:
        found = {column: best(pooled, budget, *column) for column in COLUMNS}
        if any(found.values()):
            top = max((row for row in found.values() if row), key=lambda row: row["recovered_share"])
            once, asked, text, asked_text, plain = (_choice(row, row is top) for row in found.values())
            aims = {kind: _percent(AIMS.get((budget, kind))) for kind in ("soft", "text")}
            cells = (f"{budget}x", once, asked, aims["soft"], text, asked_text, aims["text"], plain)
            out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def readme_block(study: Study, pooled: Sequence[Row], sets: dict[str, dict[Key, Row]]) -> str:
    """All that the README says of quality with one reader: the picture, what to use at each budget, and how to read it."""
    several = several_passages(sets)
    picture = study.picture.relative_to(PACKAGE).as_posix()
    compared = any(kind_of(row) != "fixed" for row in pooled)
    parts = (
        study.intro,
        the_reader(sets),
        short_table(pooled) if compared else "",
        one_slot(sets.get("qa_dev_squad", {})),
        f"![Recovered share by compression ratio and by time to the first token]({picture})" if compared else "",
        about(pooled, sets),
        SEVERAL if several else "",
        several,
        *study.notes,
    )
    return "\n\n".join(part for part in parts if part)


def the_reader(sets: dict[str, dict[Key, Row]]) -> str:
    """A sentence on what the reader answers from the whole text, set by set."""
    said = []
    for name, lines in sets.items():
        full, none = lines[FULL], lines[NONE]
        count = full.get("passages", 1)
        passages = f", {count:.0f} passages" if count > 1 and "," not in name else ""
        said.append(f"{dataset_title(name)}{passages} {100 * full['f1']:.1f} ({100 * none['f1']:.1f})")
    return f"F1 of the reader from the full text, and without any: {'; '.join(said)}."


def one_slot(squad: dict[Key, Row]) -> str:
    """A sentence on one slot a passage, on SQuAD alone, beside the same slots of other questions' passages; maybe empty."""
    said = []
    for asked, when in ((False, "compressed once"), (True, "for the question")):
        row = best(list(squad.values()), ONE_SLOT, "soft", asked)
        if row is None:
            continue
        text = f"{_share(row)} {when} ({method_name(row['method'])})"
        control = squad.get((f"{row['method']}-shuffled", row.get("ratio_asked"), None))
        if control is not None and "recovered_share" in control:
            text += f", slots of another question's passage {_share(control)}"
        said.append(text)
    aim = _percent(AIMS[ONE_SLOT, "soft"])
    return f"One slot a passage keeps on SQuAD {'; '.join(said)}. The aim is {aim}." if said else ""


def about(pooled: Sequence[Row], measured: Collection[str]) -> str:
    """What the figures are of: sets, questions, intervals, and what stands outside the contest.

    Args:
        measured: the sets that there are rows of.
    """
    names = [dataset_title(name) for name in pooled[0]["datasets"]]
    sets = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    text = (
        f"Recovered share: (F1 - no context) / (full text - no context), mean over {sets} ({pooled[0]['n']} questions, one "
        "passage each, of the halves that took no part in any choice), with its 95 % bootstrap interval. Faster: time to the "
        "first token against the full text, what can be made before the question in memory."
    )
    tuned = [row for row in pooled if row.get("reader_tuned") and kind_of(row) == "soft"]
    methods = ", ".join(dict.fromkeys(method_name(row["method"]) for row in tuned))
    if tuned and all("against" in row for row in tuned):
        text += (
            f" Methods that also tune the reader ({methods}) are held against the full text of a reader tuned alike."
        )
    elif tuned:
        text += f" Methods that also tune the reader ({methods}) do not compete here, as what tuning gains is no compression."
    missing = [name for name in POOLED if name not in pooled[0]["datasets"]]
    if lost := [dataset_title(name) for name in missing if name in measured]:
        text += f" Left out: {', '.join(lost)}, where the full text cannot be told from no context."
    if absent := [dataset_title(name) for name in missing if name not in measured]:
        text += f" Not measured: {', '.join(absent)}."
    return text


def results_page(pooled: Sequence[Row], sets: dict[str, dict[Key, Row]], others: Sequence[Row] = ()) -> str:
    """RESULTS.md: every line, pooled and set by set, and the rows of other tests (`others`)."""
    parts = [
        "# Results",
        "Written by `python -m nutgraf.benchmarks.report.readme` from [results/](results); [README.md](README.md) defines "
        "the columns and has the commands. Shares and F1 in per cent, intervals 95 %. Set by set, all shares are against the "
        "full text of the reader as it is.",
    ]
    if pooled:
        parts += ["## All sets", about(pooled, sets), _pooled_table(pooled)]
    for name, lines in sets.items():
        full = lines[FULL]
        skipped = f", {full['skipped']} too long for the reader left out" if full.get("skipped") else ""
        parts += [f"## {dataset_title(name)}", f"{full['n']} questions{skipped}.", _set_table(list(lines.values()))]
    for title, text, table in (
        ("Slots by retrieval score", ALLOCATION, allocation_table(others)),
        ("The fidelity gate", GATE, gate_table(others)),
        ("Sweeps", SWEEPS, sweep_table(others)),
    ):
        parts += [f"## {title}", text, table] if table else []
    return "\n\n".join(parts) + "\n"


def _pooled_table(rows: Sequence[Row]) -> str:
    out = ["| what the reader reads | ratio | F1 | recovered | first token | faster |", "|---|---|---|---|---|---|"]
    for row in _in_order(rows):
        cells = [
            _name(row),
            _ratio(row),
            f"{100 * row['f1']:.1f}",
            "" if kind_of(row) == "fixed" else _share(row),
            _form(row, "ttft_ms", ".0f", " ms"),
            _form(row, "ttft_speedup", ".1f", "x"),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def _set_table(rows: Sequence[Row]) -> str:
    names = ("what the reader reads", "ratio", "tokens read", "bytes a passage", "EM", "F1", "recovered", "containment")
    head = (*names, "ROUGE-L", "perplexity", "KL", "first token")
    out = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in _in_order(rows):
        cells = [
            _name(row),
            _ratio(row),
            f"{row['reader_tokens']:.0f}",
            _form(row, "bytes_per_passage", ",.0f"),
            f"{100 * row['em']:.1f}",
            f"{100 * row['f1']:.1f}",
            "" if kind_of(row) == "fixed" else _share(row),
            f"{100 * row['containment']:.1f}",
            f"{100 * row['rouge_l']:.1f}",
            _form(row, "answer_ppl", ",.1f"),
            _form(row, "kl_to_full", ".2f"),
            _form(row, "ttft_ms", ".0f", " ms"),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Fixed lines, then budget by budget soft methods, text methods, plain text; controls at the end."""
    kinds = ("fixed", "soft", "text", "plain", "control")

    def place(row: Row) -> tuple[bool, int, int]:
        return kind_of(row) == "control", budget_of(row) or 0, kinds.index(kind_of(row))

    return sorted(rows, key=place)


def _name(row: Row) -> str:
    name = method_name(row["method"])
    return f"{name} (reader tuned)" if row.get("reader_tuned") and kind_of(row) == "soft" else name


def _choice(row: Row | None, top: bool) -> str:
    if row is None:
        return ""
    share = f"**{_percent(row['recovered_share'])}**" if top else _percent(row["recovered_share"])
    speed = row.get("ttft_speedup")
    faster = "" if speed is None else f", {speed:.1f}x faster" if speed >= 1.05 else f", {speed:.1f} times as fast"
    name = method_name(row["method"]).removesuffix(", for the question")  # the column says it
    return f"{name}: {share} ({100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f}){faster}"


def _share(row: Row) -> str:
    if "recovered_share" not in row:
        return ""
    return f"{_percent(row['recovered_share'])} ({100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f})"


def _ratio(row: Row) -> str:
    if row["method"] == "none" or "ratio" not in row:
        return ""
    return f"{row['ratio']:.0f}x" if row["ratio"] >= 10 else f"{row['ratio']:.2g}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _form(row: Row, key: str, form: str, unit: str = "") -> str:
    return f"{row[key]:{form}}{unit}" if key in row else ""
