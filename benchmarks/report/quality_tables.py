"""Tables and sentences about quality: the report's table of lines, and the pages of pooled and single sets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ..names import dataset_title, is_beside, kind_of, line_name, method_name, with_ratio
from ..quality.pooled import BUDGETS, FULL, NONE, ONE_SLOT, POOLED, Key, best, budget_of
from ..rows import Row, key_of, newest
from .table import Column, Table, build, columns, interval, milliseconds, render

SCORES = {"embedder": "the embedder's score", "bm25": "BM25", "gold": "the known right passage"}
SHORT = {
    "soft, compressed once": ("soft", False),
    "soft, for the question": ("soft", True),
    "text, compressed once": ("text", False),
    "text, for the question": ("text", True),
    "plain text": ("plain", None),
}


# -- the report and the terminal -------------------------------------------------------------------------------------


def _share_cell(row: Row) -> str | None:
    if "ci_low" in row and kind_of(row) != "fixed":
        return interval(row, "recovered_share", "ci_low", "ci_high", 100, "z.0f")
    return None if row.get("recovered_share") is None else f"{100 * row['recovered_share']:.0f}"


LINES = (
    Column("method", line_name),
    Column("compression ratio", lambda row: row.get("ratio") if row["method"] != "none" else None, "{:.1f}x"),
    Column("tokens the reader read", "reader_tokens", "{:.0f}"),
    Column("bytes per passage", "bytes_per_passage", "{:,.0f}"),
    milliseconds("TTFT", "ttft_ms", 100),
    milliseconds("decode time", "decode_ms_per_token", 100),
    *columns("{:.1f}", {"EM": "em", "F1": "f1"}, 100),
    Column("recovered share", _share_cell),
)


def is_line(row: Row) -> bool:
    """Whether a row is a plain line of the quality suite (those of its tests are shown elsewhere)."""
    return row.get("suite") == "quality" and "test" not in row


def line_table(rows: Sequence[Row], title: str = "", timed: Sequence[Row] | None = None) -> Table:
    """All lines of the quality suite, without empty columns.

    Times are the rows' own, or those of speed rows in `timed` (default: `rows`).
    """
    speeds = [row for row in (rows if timed is None else timed) if row.get("suite") == "speed"]

    def kind(row: Row) -> str:
        return "beside" if is_beside(row) else "fixed" if kind_of(row) == "fixed" else "method"

    lines = [row | _times(row, speeds) for row in rows if is_line(row)]
    given = [column for column in LINES if any(column.cell(line) for line in lines)]
    return build(given, lines, title=title, missing="–", kind=kind)


def _times(row: Row, speeds: Sequence[Row]) -> Row:
    """The times that a row lacks: those of the speed row with the same method, ratio, number of passages and reader."""
    same = ("method", "ratio_asked", "passages", "reader")
    speed = next((speed for speed in speeds if key_of(speed, same) == key_of(row, same)), {})
    return {key: speed[key] for key in ("ttft_ms", "decode_ms_per_token") if key in speed and key not in row}


# -- pages -----------------------------------------------------------------------------------------------------------


def _name(row: Row) -> str:
    return method_name(row["method"]) + " (reader tuned)" * bool(row.get("reader_tuned") and kind_of(row) == "soft")


def _ratio(row: Row) -> str | None:
    ratio = None if row["method"] == "none" else row.get("ratio")
    return None if ratio is None else f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x"


def share(row: Row) -> str | None:
    """Recovered share with its interval, None for fixed lines."""
    return None if kind_of(row) == "fixed" else _share(row)


def _share(row: Row) -> str | None:
    return interval(row, "recovered_share", "ci_low", "ci_high", 100, "z.0f", " %")


READS, F1 = Column("what the reader reads", _name), Column("F1", "f1", "{:.1f}", 100)
TTFT = Column("first token", "ttft_ms", "{:.0f} ms")
RATIO, SHARE = Column("ratio", _ratio), Column("recovered", share)
POOLED_COLUMNS = (READS, RATIO, F1, SHARE, TTFT, Column("faster", "ttft_speedup", "{:.1f}x"))
SET_COLUMNS = (
    READS,
    RATIO,
    *columns("{:,.0f}", {"tokens read": "reader_tokens", "bytes per passage": "bytes_per_passage"}),
    *columns("{:.1f}", {"EM": "em", "F1": "f1"}, 100),
    SHARE,
    *columns("{:.1f}", {"containment": "containment", "ROUGE-L": "rouge_l"}, 100),
    Column("perplexity", "answer_ppl", "{:,.1f}"),
    Column("KL", "kl_to_full", "{:.2f}"),
    TTFT,
)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Fixed lines, then per budget soft methods, text methods and plain text; controls last."""
    kinds = ("fixed", "soft", "text", "plain", "control")
    return sorted(rows, key=lambda row: (kind_of(row) == "control", budget_of(row) or 0, kinds.index(kind_of(row))))


def short_table(pooled: Sequence[Row]) -> Table:
    """Per budget, the best line of each kind; the highest of them in bold."""
    rows = []
    for budget in BUDGETS:
        found = {title: best(pooled, budget, *which) for title, which in SHORT.items()}
        if there := [row for row in found.values() if row is not None]:
            top = max(there, key=lambda row: row["recovered_share"])
            rows.append({"compression": budget} | {t: _choice(r, r is top) for t, r in found.items()})
    return build([Column("compression", "compression", "{}x"), *(Column(title, title) for title in SHORT)], rows)


def _choice(row: Row | None, top: bool) -> str | None:
    if row is None:
        return None
    value, rest = str(_share(row)).split(" (")
    speed = row.get("ttft_speedup")
    faster = "" if speed is None else f", {speed:.1f}x faster" if speed >= 1.05 else f", {speed:.1f}x as fast"
    return f"{_short_name(row)}: {f'**{value}**' if top else value} ({rest}{faster}"


def _short_name(row: Row) -> str:
    return method_name(row["method"]).removesuffix(", for the question")  # the column says it


def set_title(name: str, lines: dict[Key, Row]) -> str:
    """Title of a set, with its number of passages per question if there are several."""
    passages = lines[FULL].get("passages", 1)
    return dataset_title(name) + (f", {passages:.0f} passages" if passages > 1 and "," not in name else "")


def several_table(sets: dict[str, dict[Key, Row]]) -> Table:
    """Sets with several passages per question: the best line of each kind by F1."""

    def top(rows: Iterable[Row], kinds: tuple[str, ...], asked: bool) -> str | None:
        found = [r for r in rows if kind_of(r) in kinds and bool(r.get("query_aware")) == asked]
        row = max((r for r in found if not r.get("reader_tuned")), key=lambda r: r["f1"], default=None)
        if row is None:
            return None
        f1 = interval(row, "f1", "f1_ci_low", "f1_ci_high", 100, ".1f")
        return f"{f1}: {_short_name(row)}, {row['reader_tokens']:.0f} tokens"

    kinds: dict[str, tuple[tuple[str, ...], bool]] = {
        "compressed once": (("soft", "text"), False),
        "for the question": (("soft", "text"), True),
    }
    kinds["plain text"] = (("plain",), False)
    rows = [
        {"set": set_title(name, lines), "none": lines[NONE]["f1"], "full": lines[FULL]["f1"]}
        | {title: top(lines.values(), *which) for title, which in kinds.items()}
        for name, lines in sorted(sets.items(), key=lambda p: (p[0].split(", ")[0], p[1][FULL].get("passages", 1)))
        if lines[FULL].get("passages", 1) > 1
    ]
    shown = [Column("passages", "set"), *columns("{:.1f}", {"no context": "none", "full text": "full"}, 100)]
    return build([*shown, *columns("{}", {title: title for title in kinds})], rows)


def one_slot(squad: dict[Key, Row]) -> list[dict[str, Any]]:
    """What one slot per passage keeps on SQuAD: the best method, and the same slots of another question's passage."""
    found = []
    for asked in (False, True):
        if (row := best(list(squad.values()), ONE_SLOT, "soft", asked)) is not None:
            control = squad.get((f"{row['method']}-shuffled", row.get("ratio_asked"), None))
            kept = None if control is None else _share(control)
            found.append({"method": method_name(row["method"]), "share": _share(row), "asked": asked, "control": kept})
    return found


def about(pooled: Sequence[Row], measured: Collection[str]) -> dict[str, Any]:
    """What a page says of its figures: sets, questions, tuned methods, sets left out. `measured`: the sets with rows."""
    tuned = [row for row in pooled if row.get("reader_tuned") and kind_of(row) == "soft"]
    missing = [name for name in POOLED if name not in pooled[0]["datasets"]]
    return {
        "sets": [dataset_title(name) for name in pooled[0]["datasets"]],
        "n": pooled[0]["n"],
        "tuned": list(dict.fromkeys(method_name(row["method"]) for row in tuned)),
        "tuned_alike": all("against" in row for row in tuned),
        "lost": [dataset_title(name) for name in missing if name in measured],
        "absent": [dataset_title(name) for name in missing if name not in measured],
    }


# -- the README ------------------------------------------------------------------------------------------------------

FRONT = {
    "kv-match": "**kv-match**: keys and values, no training",
    "truncate": "the passage's first tokens",
    "llmlingua2": "LLMLingua-2: shorter text",
    "mean-pool": "mean-pool: soft tokens, trained for 96 minutes, reader tuned",
    "llmlingua2-query": "LLMLingua-2, compressed again for each question",
}


def front(pairs: Sequence[Row], others: Sequence[Row]) -> str:
    """The README's table of what is kept, with its questions: of the rows beside kv-match's, else of `others`."""
    lines: list[Row] = []
    measured: dict[str, list[str]] = {}
    for method, name in FRONT.items():
        rows = [row for row in pairs if row["method"] == method] or [row for row in others if row["method"] == method]
        by_ratio = {row["ratio_asked"]: row for row in rows if "ratio_asked" in row}
        if by_ratio:
            lines.append({"name": name} | {f"{ratio:g}x": _share(row) for ratio, row in by_ratio.items()})
            words = f"{rows[0]['n']} questions on {', '.join(map(dataset_title, rows[0]['datasets']))}"
            measured.setdefault(words, []).append(name.partition(":")[0].replace("*", ""))
    table = build(
        [Column("", "name"), *(Column(f"{ratio:g}x", f"{ratio:g}x") for ratio in BUDGETS if ratio < 32)], lines
    )
    said = [f"{words}: {'; '.join(names)}" for words, names in measured.items()]
    return f"{render('table_only.md', t=table)}\n{'. '.join(said)}. One passage each.\n"


# -- studies ---------------------------------------------------------------------------------------------------------


def _change(title: str, key: str, scale: float, form: str) -> Column:
    return Column(title, lambda row: interval(row, key, f"{key}_low", f"{key}_high", scale, form))


SET = Column("set", lambda row: dataset_title(row["dataset"]))
METHOD = Column("compressor", lambda row: with_ratio(row, method_name(row["method"])))


def gate_table(rows: Iterable[Row]) -> Table:
    """What the fidelity gate sends as text, vs. random passages, the shortest passages and slots alone."""

    def loss(row: Row) -> str:
        by = "probability" if row.get("calibrated_by") == "probability" else "F1"
        return by + (" per token" if row.get("priced") else "")

    found = (r for r in rows if r.get("test") == "gate" and r["sending"] == "gate" and "share" in r)
    shown = (
        Column("sets (questions)", lambda row: f"{dataset_title(row['dataset'])} ({row['n']})"),
        METHOD,
        Column("gate goes by", loss),
        Column("level", "level"),
        Column("as text", "share", "{:.0f} %", 100),
        Column("tokens read", "reader_tokens", "{:.0f}"),
        F1,
        *(
            _change(f"vs. {words}", f"f1_minus_{key}", 100, "+.1f")
            for key, words in (("random", "random"), ("shortest", "the shortest"), ("slots", "slots alone"))
        ),
    )
    return build(shown, newest(found, ("dataset", "method", "ratio_asked", "calibrated_by", "priced", "level")))


def allocation_table(rows: Iterable[Row]) -> Table:
    """Slots by retrieval score vs. one ratio for all passages, at the same budget."""

    def how(row: Row) -> str:
        by_score = row["allocation"] == "score"
        return f"{SCORES[row['score']]}, T = {row['temperature']:g}" if by_score else "one ratio for all"

    shown = (
        SET,
        METHOD,
        Column("slots by", how),
        Column("questions", "n"),
        F1,
        _change("F1 vs. one ratio", "f1_minus_uniform", 100, "+.1f"),
        _change("nats of the answer vs. one ratio", "nll_minus_uniform", 1, "+.2f"),
    )
    keys = ("dataset", "method", "ratio_asked", "allocation", "score", "temperature")
    return build(shown, newest((row for row in rows if "allocation" in row), keys))


def precision_table(rows: Iterable[Row]) -> Table:
    """Slots as a store gives them back vs. as they were made."""

    def change(row: Row) -> str | None:
        return interval(row, "f1_change", "f1_change_ci_low", "f1_change_ci_high", 100, "+.1f")

    shown = (
        SET,
        Column("compressor", lambda row: with_ratio(row, method_name(row["stored_of"]))),
        Column("stored as", "store_precision"),
        Column("bytes per passage", "bytes_per_passage", "{:,.0f}"),
        F1,
        Column("F1 vs. slots as made", change),
        Column("same answers", "same_answers", "{:.0f} %", 100),
    )
    keys = ("dataset", "stored_of", "ratio_asked", "store_precision")
    return build(shown, newest((row for row in rows if "store_precision" in row), keys))
