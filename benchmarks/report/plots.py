"""All plots, with matplotlib: those of the HTML report as SVG text, the picture of the trade-off as a PNG.

The PNG carries a hash of the rows it shows, so that a test can compare it with the rows without comparing pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..names import FIXED, kind_of, method_name, with_ratio
from ..rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#1f2933", "#8a94a0", "#e6e9ed"
COLORS = ("#0f766e", "#c2410c", "#4338ca", "#be185d", "#0369a1", "#a16207", "#65a30d", "#7c3aed", "#b45309", "#334155")
GREYS = ("#64748b", "#94a3b8", "#475569", "#a8a29e", "#78716c")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p", "h")
KINDS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {  # heading, colors, look
    "soft": ("soft slots", COLORS, {}),
    "text": ("shorter text", COLORS[5:] + COLORS[:5], {"linestyle": "-.", "fillstyle": "left"}),
    "plain": (
        "plain text of the same budget",
        GREYS,
        {"linestyle": "--", "markerfacecolor": "white", "linewidth": 1.3},
    ),
}
KEYWORD = "nutgraf-rows"  # of the PNG's text that holds the hash


def require_matplotlib() -> None:
    """Raise ImportError with what to do if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Plots need matplotlib; run `pip install "nutgraf[bench]"`.') from error


# -- plots of the HTML report ----------------------------------------------------------------------------------------


def ttft_plot(rows: Sequence[Row]) -> str | None:
    """TTFT against context length: full text, stored passages (solid), passages compressed in the request (dotted)."""
    methods = _grouped([row for row in rows if row.get("suite") == "speed"])
    if not any(len(points) > 1 for points in methods.values()):
        return None
    figure, (axes,) = _figure()
    online = False
    for (name, points), color, marker in zip(methods.items(), (INK, *COLORS * 3), MARKERS * 3):
        points = sorted(points, key=lambda row: row["context_tokens"])
        x = [row["context_tokens"] for row in points]
        axes.plot(x, [r["ttft_ms"] for r in points], color=color, marker=marker, markersize=5, label=name)
        if all("ttft_online_ms" in row for row in points):
            axes.plot(x, [row["ttft_online_ms"] for row in points], color=color, linestyle=":", linewidth=1.3)
            online = True
    if online:
        axes.plot([], [], color=QUIET, linestyle=":", label="compressed within the request")
    axes.set_xlim(left=0)
    return _svg(figure, axes, "context length (reader tokens of the passages)", "time to first token, ms")


def position_plot(rows: Sequence[Row]) -> str | None:
    """F1 against the position of the gold passage among its distractors; None without such rows."""
    tested = sorted((row for row in rows if row.get("test") == "gold-position"), key=lambda row: row["position"])
    figure, (axes,) = _figure((5.6, 3.0))
    for (name, points), color, marker in zip(_grouped(tested).items(), (INK, *COLORS * 3), MARKERS * 3):
        x, y = [row["position"] + 1 for row in points], [100 * row["f1"] for row in points]
        axes.plot(x, y, color=color, marker=marker, markersize=5, label=name)
    return _svg(figure, axes, "position of the gold passage", "F1") if tested else None


def best_baselines(quality: Sequence[Row]) -> list[Row]:
    """For each method and ratio, the baseline of its budget with the highest F1."""
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in quality:
        if "budget_of" in row and "ratio" in row:
            groups.setdefault((row["budget_of"], row.get("ratio_asked")), []).append(row)
    return [max(group, key=lambda row: row["f1"]) for group in groups.values()]


# -- the picture of the trade-off ------------------------------------------------------------------------------------


def trade_off(rows: Sequence[Row], svg: bool = False) -> bytes | None:
    """PNG or SVG of the lines of a set or pooled: recovered share against compression ratio and time to first token.

    Soft methods are solid lines with filled marks, text methods dash-dotted with half-filled marks, plain text dashed with
    hollow marks. Bars are 95 % intervals. None without anything to draw. Raises ImportError if matplotlib is missing.
    """
    series = drawn_series(rows)
    if not series:
        return None
    figure, (left, right) = _figure((11.0, 6.4), 2)
    _by_ratio(left, series)
    _by_time(right, series, rows)
    for axes in (left, right):
        axes.axhline(100, color=INK, linewidth=1.2)
        axes.axhline(0, color=QUIET, linewidth=1.2)
    shares = [100 * row["recovered_share"] for line in series for row in line["rows"]]
    left.set_ylim(min(-12.0, min(shares) - 6), max(108.0, max(shares) + 8))
    left.set_ylabel("recovered share of the full text's gain, %")
    _kinds_legend(figure, left, series)
    if svg:
        return _svg_text(figure).encode()
    return _png(figure, rows)


def by_bytes(rows: Sequence[Row]) -> bytes | None:
    """PNG of pooled lines: recovered share against bytes per passage. None without anything to draw."""
    series = drawn_series([row for row in rows if "bytes_per_passage" in row])
    if not series:
        return None
    figure, (axes,) = _figure((8.2, 5.0))
    for line in series:
        x = [row["bytes_per_passage"] for row in line["rows"]]
        y, low, high = ([100 * r[key] for r in line["rows"]] for key in ("recovered_share", "ci_low", "ci_high"))
        bars = [[max(a - b, 0.0) for a, b in zip(y, low)], [max(b - a, 0.0) for a, b in zip(y, high)]]
        axes.errorbar(x, y, bars, capsize=2, elinewidth=0.9, label=line["name"], **line["look"])
        for row, at, share in zip(line["rows"], x, y):
            left = line["kind"] == "plain"  # lies close to the shorter texts
            ratio = row.get("ratio_asked") or row["ratio"]  # none is asked of a method with a ratio of its own
            axes.annotate(f"{ratio:.3g}x", (at, share), (-8 if left else 8, -3), textcoords="offset points",
                          ha="right" if left else "left", fontsize=8.5, color=line["look"]["color"])  # fmt: skip
    full = next((row.get("bytes_per_passage") for row in rows if row["method"] == "full"), None)
    if full is not None:
        axes.plot(full, 100, "*", color=INK, markersize=13, zorder=5)
        axes.annotate("full text", (full, 100), (-4, 9), textcoords="offset points", ha="right", color=INK)
    axes.axhline(100, color=INK, linewidth=1.2)
    axes.axhline(0, color=QUIET, linewidth=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda size, _: _size(size))
    axes.minorticks_off()
    axes.set_xlabel("size of a stored passage")
    axes.set_ylabel("recovered share of the full text's gain, %")
    axes.legend(frameon=False, fontsize=9.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return _png(figure, rows)


def _size(size: float) -> str:
    unit, words = next((pair for pair in ((1e6, "MB"), (1e3, "kB")) if size >= pair[0]), (1, "B"))
    return f"{size / unit:g} {words}"


def _png(figure: Figure, rows: Sequence[Row]) -> bytes:
    out = io.BytesIO()
    metadata = {KEYWORD: rows_hash(rows), "Software": None}
    figure.savefig(out, format="png", dpi=150, metadata=metadata, pil_kwargs={"optimize": True})
    return out.getvalue()


def rows_hash(rows: Sequence[Row]) -> str:
    """Hash of what the picture shows of the rows."""
    shown = [
        "method",
        "ratio_asked",
        "budget_of",
        "ratio",
        "recovered_share",
        "ci_low",
        "ci_high",
        "ttft_ms",
        "datasets",
    ]
    shown += ["bytes_per_passage"] * any("bytes_per_passage" in row for row in rows)
    return hashlib.sha256(json.dumps([[row.get(key) for key in shown] for row in rows]).encode()).hexdigest()[:16]


def hash_in(png: bytes) -> str | None:
    """The hash in a picture, None without one."""
    _, found, rest = png.partition(KEYWORD.encode() + b"\0")
    return rest[:16].decode("ascii", "replace") if found else None


def drawn_series(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each method's rows by ratio, with its look. Plain lines are those under the budgets of one method."""
    drawn = [r for r in rows if kind_of(r) in KINDS and not {"recovered_share", "ratio", "ci_low"} - {*r}]
    owners = Counter(row["budget_of"] for row in drawn if row.get("budget_of")).most_common(1)
    kept = [row for row in drawn if row.get("budget_of") in (None, *(owner for owner, _ in owners))]
    out = []
    for kind, (_, colors, look) in KINDS.items():
        groups: dict[str, list[Row]] = {}
        for row in kept:
            if kind_of(row) == kind:
                groups.setdefault(row["method"], []).append(row)
        for (method, points), color, marker in zip(groups.items(), colors * 9, MARKERS * 9):
            name = method_name(method) + (" (reader tuned)" if points[0].get("reader_tuned") else "")
            style = {"color": color, "marker": marker, "markersize": 7, "linewidth": 1.8} | look
            points = sorted(points, key=lambda row: row["ratio"])
            out.append({"kind": kind, "name": name, "look": style, "rows": points})
    return out


def _by_ratio(axes: Axes, series: Sequence[dict[str, Any]]) -> None:
    spread = 0.022  # octaves between neighbours, so that bars at one ratio stand side by side
    for place, line in enumerate(series):
        shift = 2 ** (spread * (place - (len(series) - 1) / 2))
        x = [row["ratio"] * shift for row in line["rows"]]
        y, low, high = ([100 * r[key] for r in line["rows"]] for key in ("recovered_share", "ci_low", "ci_high"))
        bars = [[max(a - b, 0.0) for a, b in zip(y, low)], [max(b - a, 0.0) for a, b in zip(y, high)]]
        axes.errorbar(x, y, bars, capsize=2, elinewidth=0.9, label=line["name"], **line["look"])
    _ratio_axis(axes, [row["ratio"] for line in series for row in line["rows"]])
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
        axes.plot([r["ttft_ms"] for r in points], [100 * r["recovered_share"] for r in points], **line["look"])
    for row in rows:
        if row["method"] in FIXED and "ttft_ms" in row:
            full = row["method"] == "full"
            point = (row["ttft_ms"], 100.0 if full else 0.0)
            axes.plot(*([value] for value in point), "*", color=INK, markersize=13, zorder=5)
            axes.annotate(FIXED[row["method"]], point, (-10 if full else 10, 8 if full else -15), color=INK,
                          textcoords="offset points", ha="right" if full else "left")  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_xlabel("time to the first token, ms\n(includes compressing where it needs the question)")


def _kinds_legend(figure: Figure, axes: Axes, series: Sequence[dict[str, Any]]) -> None:
    """One column per kind, each under its heading."""
    from matplotlib.lines import Line2D

    drawn = dict(zip((line["name"] for line in series), axes.get_legend_handles_labels()[0]))
    blank: Any = Line2D([], [], linestyle="none")
    columns = []
    for kind, (heading, _, _) in KINDS.items():
        if names := [line["name"] for line in series if line["kind"] == kind]:
            columns.append([(heading, blank), *((name, drawn[name]) for name in names)])
    tallest = max(map(len, columns))
    cells = [cell for column in columns for cell in [*column, *[("", blank)] * (tallest - len(column))]]
    legend = figure.legend([handle for _, handle in cells], [name for name, _ in cells], loc="outside lower center",
                           ncols=len(columns), frameon=False, fontsize=10.5)  # fmt: skip
    for text in legend.get_texts():
        if text.get_text() in {heading for heading, _, _ in KINDS.values()}:
            text.set_fontweight("bold")


# -- parts -----------------------------------------------------------------------------------------------------------


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by method and ratio asked for; the full text first."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["method"] != "full"):
        found.setdefault(with_ratio(row, FIXED.get(row["method"])), []).append(row)
    return found


def _figure(size: tuple[float, float] = (5.6, 3.6), panels: int = 1) -> tuple[Figure, list[Axes]]:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    style = {"font.family": "DejaVu Sans", "font.size": 10, "svg.fonttype": "path", "axes.edgecolor": QUIET}
    style |= {"axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = NewFigure(figsize=size, layout="constrained")
        found = list(figure.subplots(1, panels, sharey=True, squeeze=False)[0])
        for axes in found:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
    return figure, found


def _ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    """A logarithmic axis with powers of two around all ratios."""
    low, high = math.floor(math.log2(min(ratios) / 1.15)), math.ceil(math.log2(max(ratios) * 1.15))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**low, 2.0**high)
    axes.set_xticks([2.0**k for k in range(low, high + 1)], [f"{2.0**k:g}x" for k in range(low, high + 1)])


def _svg(figure: Figure, axes: Axes, x: str, y: str) -> str:
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    columns = 2 if len(axes.get_legend_handles_labels()[0]) > 3 else 1
    axes.legend(frameon=False, fontsize=9, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return _svg_text(figure)


def _svg_text(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True, bbox_inches="tight")
    return out.getvalue()[out.getvalue().index("<svg") :]
