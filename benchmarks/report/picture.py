"""The picture: quality against compression ratio, and against time to the first token, for all methods at once.

`python -m nutgraf.benchmarks.report.readme` draws it from the rows in `results/`. The image carries a hash of what it shows, so
that a test can tell whether it is that of the committed rows without comparing pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..names import kind_of, method_name
from ..rows import Row
from .plots import GRID, INK, QUIET, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEYWORD = "nutgraf-rows"  # of the PNG's text that holds the hash
SOFT = ("#0f766e", "#c2410c", "#4338ca", "#be185d", "#0369a1", "#65a30d", "#7c3aed", "#b45309", "#334155")
TEXT = ("#a16207", "#0891b2", "#9f1239", "#4d7c0f", "#6d28d9")
PLAIN = ("#64748b", "#94a3b8", "#475569", "#a8a29e", "#78716c")
FILLED, HOLLOW = ("o", "s", "D", "^", "v", "P", "X", "p", "h"), ("o", "s", "D", "^", "v")
HEADINGS = {"soft": "soft slots", "text": "shorter text", "plain": "plain text of the same budget"}
_SIZE, _DPI = (11.0, 6.4), 150


def drawable(rows: Sequence[Row]) -> bool:
    """Whether pooled rows hold anything that a picture could show."""
    return bool(_series(rows))


def draw(rows: Sequence[Row]) -> bytes | None:
    """A PNG of pooled rows (`pooled.pooled_rows`), or None where there is nothing to draw.

    Soft methods are solid lines with filled marks, text methods dash-dotted with half-filled ones, plain text of the same
    budget dashed with hollow ones. Bars are 95 % intervals.

    Raises ImportError if matplotlib is missing.
    """
    series = _series(rows)
    if not series:
        return None
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    style = {"font.family": "DejaVu Sans", "font.size": 11, "axes.edgecolor": QUIET, "axes.labelcolor": INK}
    with matplotlib.rc_context(style | {"xtick.color": INK, "ytick.color": INK}):  # type: ignore[arg-type]
        figure = NewFigure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        _by_ratio(left, series)
        _by_time(right, series, rows)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.axhline(100, color=INK, linewidth=1.2)
            axes.axhline(0, color=QUIET, linewidth=1.2)
        left.set_ylabel("recovered share of the full text's gain, %")
        left.set_ylim(*_limits(rows))
        _legend(figure, left, series)
        return _png(figure, rows_hash(rows))


def _legend(figure: Figure, axes: Axes, series: Sequence[dict[str, Any]]) -> None:
    """One column a kind, each under its heading."""
    from matplotlib.lines import Line2D

    drawn = dict(zip((line["name"] for line in series), axes.get_legend_handles_labels()[0]))
    blank = Line2D([], [], linestyle="none")
    columns = []
    for kind, heading in HEADINGS.items():
        names = [line["name"] for line in series if line["kind"] == kind]
        if names:
            columns.append([(heading, blank), *((name, drawn[name]) for name in names)])
    tallest = max(map(len, columns))
    cells = [cell for column in columns for cell in [*column, *[("", blank)] * (tallest - len(column))]]
    legend = figure.legend(
        [handle for _, handle in cells],
        [name for name, _ in cells],
        loc="outside lower center",
        ncols=len(columns),
        frameon=False,
        fontsize=10.5,
    )
    for text in legend.get_texts():
        if text.get_text() in HEADINGS.values():
            text.set_fontweight("bold")


def _png(figure: Figure, mark: str) -> bytes:
    """The figure as a PNG of few colours, which is small, with the hash among its text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    info = PngInfo()
    info.add_text(KEYWORD, mark)
    out = io.BytesIO()
    image.quantize(160, dither=Image.Dither.NONE).save(out, format="png", optimize=True, pnginfo=info)
    return out.getvalue()


def rows_hash(rows: Sequence[Row]) -> str:
    """Hash of what the picture shows of the rows."""
    shown = (
        "method",
        "ratio_asked",
        "budget_of",
        "ratio",
        "recovered_share",
        "ci_low",
        "ci_high",
        "ttft_ms",
        "datasets",
    )
    facts = [[row.get(key) for key in shown] for row in rows]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def hash_in(png: bytes) -> str | None:
    """The hash that a picture carries, None where it carries none."""
    start = png.find(KEYWORD.encode() + b"\0")
    if start < 0:
        return None
    start += len(KEYWORD) + 1
    return png[start : start + 16].decode("ascii", "replace")


def _series(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each method's rows in order of ratio, with its look; of the plain lines those under the budgets of one method."""
    drawn = [
        row for row in rows if kind_of(row) in ("soft", "text", "plain") and "recovered_share" in row and "ratio" in row
    ]
    owner = _budget_owner(drawn)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in drawn:
        if row.get("budget_of") in (None, owner):
            groups.setdefault((kind_of(row), row["method"]), []).append(row)
    looks: dict[str, Iterator[tuple[str, str]]] = {
        "soft": zip(SOFT * 9, FILLED * 9),
        "text": zip(TEXT * 9, HOLLOW * 9),
        "plain": zip(PLAIN * 9, HOLLOW * 9),
    }
    out = []
    for kind in ("soft", "text", "plain"):
        for (of, method), points in groups.items():
            if of != kind:
                continue
            color, marker = next(looks[kind])
            look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 7, "linewidth": 1.8}
            if kind == "text":
                look |= {"linestyle": "-.", "fillstyle": "left"}
            if kind == "plain":
                look |= {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.3}
            name = method_name(method) + (" (reader tuned)" if points[0].get("reader_tuned") else "")
            ordered = sorted(points, key=lambda row: row["ratio"])
            out.append({"kind": kind, "name": name, "look": look, "rows": ordered})
    return out


def _budget_owner(rows: Sequence[Row]) -> str | None:
    """The method under whose budgets most plain lines stand."""
    owners = [row["budget_of"] for row in rows if row.get("budget_of")]
    return max(dict.fromkeys(owners), key=owners.count, default=None)


def _by_ratio(axes: Axes, series: Sequence[dict[str, Any]]) -> None:
    spread = 0.022  # octaves between neighbours, so that bars at one ratio stand side by side
    for place, line in enumerate(series):
        shift = 2 ** (spread * (place - (len(series) - 1) / 2))
        points = line["rows"]
        x = [row["ratio"] * shift for row in points]
        y = [100 * row["recovered_share"] for row in points]
        bars = (
            [max(100 * (row["recovered_share"] - row["ci_low"]), 0) for row in points],
            [max(100 * (row["ci_high"] - row["recovered_share"]), 0) for row in points],
        )
        axes.errorbar(x, y, bars, capsize=2, elinewidth=0.9, label=line["name"], **line["look"])
    ratios = [row["ratio"] for line in series for row in line["rows"]]
    low, high = math.ceil(math.log2(min(ratios)) - 0.3), math.floor(math.log2(max(ratios)) + 0.3)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ratios) / 1.4, max(ratios) * 1.4)
    ticks = [2.0**k for k in range(low, high + 1)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    for level, words, side, color, offset in (
        (100, "full text", 1, INK, (-4, 4)),
        (0, "no context", 0, QUIET, (4, -14)),
    ):
        axes.annotate(words, (side, level), offset, xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right" if side else "left", color=color)  # fmt: skip
    axes.set_xlabel("compression ratio: passage tokens per slot")


def _by_time(axes: Axes, series: Sequence[dict[str, Any]], rows: Sequence[Row]) -> None:
    for line in series:
        points = sorted((row for row in line["rows"] if "ttft_ms" in row), key=lambda row: row["ttft_ms"])
        if points:
            x, y = [row["ttft_ms"] for row in points], [100 * row["recovered_share"] for row in points]
            axes.plot(x, y, **line["look"])
    for name, words in (("full", "full text"), ("none", "no context")):
        row = next((row for row in rows if row["method"] == name and "ttft_ms" in row), None)
        if row is not None:
            level = 100.0 if name == "full" else 0.0
            axes.plot([row["ttft_ms"]], [level], "*", color=INK, markersize=13, zorder=5)
            left = name == "full"
            axes.annotate(words, (row["ttft_ms"], level), (-10 if left else 10, 8 if left else -15), textcoords="offset points",
                          ha="right" if left else "left", color=INK)  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("time to the first token, ms\n(compressing included where it needs the question)")


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    shares = [100 * row["recovered_share"] for row in rows if "recovered_share" in row and kind_of(row) != "control"]
    return min(-12.0, min(shares) - 6), max(108.0, max(shares) + 8)
