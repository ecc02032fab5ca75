"""Tables: columns over rows, shown in the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from rich import box
from rich.table import Table as RichTable

from ..rows import Row

_STYLES = {"fixed": "bold", "method": "cyan", "beside": "dim"}
_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: bool(name and name.endswith(".html")),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Heading.
        value: Key of the row, or a function of the row. A missing key or None gives an empty cell, a string stays as it is.
        form: Format of a number, such as `{:.0f} ms`.
        scale: Factor that numbers are multiplied by; 100 for per cent.
        bold: Whether the cell of a row is bold (Markdown).
    """

    title: str
    value: str | Callable[[Row], Any]
    form: str = "{}"
    scale: float = 1.0
    bold: Callable[[Row], bool] | None = None

    def cell(self, row: Row, missing: str = "") -> str:
        """Text of the row's cell."""
        value = row.get(self.value) if isinstance(self.value, str) else self.value(row)
        if value is None or value == "":
            return missing
        text = value if isinstance(value, str) else self.form.format(value if self.scale == 1 else self.scale * value)
        return f"**{text}**" if self.bold is not None and self.bold(row) else text


@dataclass(frozen=True)
class Table:
    """A finished table; false without lines.

    Attributes:
        kinds: For each line `fixed`, `method` or `beside` (indented, belongs to the method above).
    """

    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    title: str = ""
    caption: str = ""

    def __bool__(self) -> bool:
        return bool(self.lines)


def build(
    given: Sequence[Column],
    rows: Iterable[Row],
    *,
    title: str = "",
    caption: str = "",
    missing: str = "",
    kind: Callable[[Row], str] = lambda row: "",
) -> Table:
    """One line per row. `missing` stands in empty cells."""
    rows = list(rows)
    lines = tuple(tuple(column.cell(row, missing) for column in given) for row in rows)
    return Table(tuple(column.title for column in given), lines, tuple(map(kind, rows)), title, caption)


def row_table(rows: Sequence[Row], keys: str, title: str = "") -> RichTable:
    """For the terminal: rows by some of their keys, those that no row has left out."""

    def shown(value: Any) -> str | None:
        if not isinstance(value, int | float):
            return value
        return f"{value:,.0f}" if abs(value) >= 1000 or isinstance(value, int) else f"{value:.4g}"

    kept = [key for key in keys.split() if any(key in row for row in rows)]
    given = [Column(key.replace("_", "\n", 1), lambda row, key=key: shown(row.get(key))) for key in kept]  # type: ignore[misc]
    return rich_table(build(given, rows, title=title))


def rich_table(table: Table) -> RichTable:
    """The table for the terminal."""
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "title_justify": "left", "header_style": "bold", "pad_edge": False}
    shown = RichTable(title=table.title or None, collapse_padding=True, **look)
    for number, name in enumerate(table.columns):
        shown.add_column(name, justify="right" if number else "left", no_wrap=number == 0, overflow="fold")
    for cells, kind in zip(table.lines, table.kinds):
        indent = "  " if kind == "beside" else ""
        shown.add_row(indent + cells[0], *cells[1:], style=_STYLES.get(kind))
    return shown


def render(template: str, **context: Any) -> str:
    """A page from its template in `templates/`."""
    return _TEMPLATES.get_template(template).render(**context)


def columns(form: str, keys: Mapping[str, str], scale: float = 1.0) -> list[Column]:
    """Columns of one format, from title to key."""
    return [Column(title, key, form, scale) for title, key in keys.items()]


def milliseconds(title: str, key: str, whole_from: float = 20) -> Column:
    """A column of times, with one decimal below `whole_from` ms."""

    def shown(row: Row) -> str | None:
        value = row.get(key)
        return None if value is None else f"{value:,.0f} ms" if value >= whole_from else f"{value:.1f} ms"

    return Column(title, shown)


def interval(row: Row, key: str, low: str, high: str, scale: float, form: str, unit: str = "") -> str | None:
    """A value with its interval, as `60 % (51 to 70)`; None if the row does not have it."""
    if key not in row:
        return None
    value, a, b = (format(scale * row[name], form) for name in (key, low, high))
    return f"{value}{unit} ({a} to {b})"
