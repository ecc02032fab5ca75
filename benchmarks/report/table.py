"""The one table of a benchmark: the same lines in the terminal and in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from ..rows import Row

COLUMNS = (
    "method",
    "compression ratio",
    "tokens the reader read",
    "TTFT",
    "decode time",
    "EM",
    "F1",
    "recovered share",
)
EM_DASH = "–"
FIXED = {"full": "full text", "none": "no context"}


@dataclass(frozen=True)
class TableLine:
    """A line of the table.

    Attributes:
        cells: as many strings as `COLUMNS`.
        kind: `fixed`, `method`, or `beside` for controls and baselines that belong to the method above.
        row: the results row behind it.
    """

    cells: tuple[str, ...]
    kind: str
    row: Row


def table_lines(rows: Sequence[Row], timed: Sequence[Row] | None = None) -> list[TableLine]:
    """The lines of all plain quality rows (those of the reading tests stand elsewhere).

    Times come from the rows themselves, else from speed rows among `timed` (default: among `rows`).
    """
    speeds = [row for row in (rows if timed is None else timed) if row.get("suite") == "speed"]
    quality = [row for row in rows if row.get("suite") == "quality" and "test" not in row]
    return [_line(row | _times(row, speeds)) for row in quality]


def terminal_table(rows: Sequence[Row], title: str = "", timed: Sequence[Row] | None = None) -> Table:
    """The table for `rich`. Arguments as for `table_lines`."""
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "header_style": "bold"}
    table = Table(title=title or None, collapse_padding=True, pad_edge=False, **look)
    for number, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
    for line in table_lines(rows, timed):
        style = {"fixed": "bold", "method": "cyan", "beside": "dim"}[line.kind]
        cells = [("  " if line.kind == "beside" else "") + line.cells[0], *line.cells[1:]]
        table.add_row(*cells, style=style)
    return table


def name_of(row: Row) -> str:
    """What a line is called: the fixed lines in words, methods with the ratio asked for."""
    method = str(row["method"])
    if method in FIXED:
        return FIXED[method]
    if method.endswith("-shuffled"):
        return "shuffled"
    if "store_precision" in row:
        return f"stored as {row['store_precision']}"
    if "budget_of" in row:
        return method.replace("-", " ")
    return f"{method} {row['ratio_asked']:g}x" if row.get("ratio_asked") else method


def kind_of(row: Row) -> str:
    """`fixed`, `method` or `beside` (see `TableLine`)."""
    if row["method"] in FIXED:
        return "fixed"
    beside = "budget_of" in row or "store_precision" in row or str(row["method"]).endswith("-shuffled")
    return "beside" if beside else "method"


def _line(row: Row) -> TableLine:
    share = _number(_percent(row.get("recovered_share")), ".0f")
    if "ci_low" in row and kind_of(row) != "fixed":
        share += f" ({100 * row['ci_low']:.0f} to {100 * row['ci_high']:.0f})"
    cells = (
        name_of(row),
        _number(row.get("ratio"), ".1f", "x") if row["method"] != "none" else EM_DASH,
        _number(row.get("reader_tokens"), ".0f"),
        _milliseconds(row.get("ttft_ms")),
        _milliseconds(row.get("decode_ms_per_token")),
        _number(_percent(row.get("em")), ".1f"),
        _number(_percent(row.get("f1")), ".1f"),
        share,
    )
    return TableLine(cells, kind_of(row), row)


def _times(row: Row, speeds: Sequence[Row]) -> Row:
    """TTFT and decode time of the speed row with the same method, ratio and number of passages."""
    if "ttft_ms" in row:
        return {}
    same = ("method", "ratio_asked", "passages", "reader")
    for speed in speeds:
        if all(speed.get(key) == row.get(key) for key in same):
            return {key: speed[key] for key in ("ttft_ms", "decode_ms_per_token") if key in speed}
    return {}


def _number(value: float | None, form: str, unit: str = "") -> str:
    return EM_DASH if value is None else f"{value:{form}}{unit}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _milliseconds(value: float | None) -> str:
    return _number(value, ".0f" if value is not None and value >= 100 else ".1f", " ms")
