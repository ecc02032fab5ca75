"""The report's plots, as SVG text: quality against compression ratio, TTFT against context length, gold positions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..rows import Row
from .table import kind_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, QUIET, GRID = "#1f2933", "#8a94a0", "#e6e9ed"
SERIES = ("#0f766e", "#c2410c", "#4338ca", "#a16207", "#be185d", "#0369a1")
MARKERS = ("o", "s", "D", "^", "v", "P")


def quality_plot(rows: Sequence[Row]) -> str | None:
    """F1 against the measured compression ratio, with intervals, between the lines of full text and no context.

    Baselines under the same budget are open grey marks, the best of them at each budget. None without such rows.
    """
    quality = [row for row in rows if row.get("suite") == "quality" and "test" not in row]
    methods = _by_method([row for row in quality if kind_of(row) == "method"])
    if not methods:
        return None
    figure, axes = _figure()
    for name, color, style, height in (("full", INK, "-", 4), ("none", QUIET, "--", 4)):
        level = next((100 * row["f1"] for row in quality if row["method"] == name), None)
        if level is not None:
            axes.axhline(level, color=color, linestyle=style, linewidth=1.2)
            label = "full text" if name == "full" else "no context"
            axes.annotate(label, (1, level), xycoords=("axes fraction", "data"), xytext=(-4, height), color=color,
                          textcoords="offset points", ha="right", va="bottom", fontsize=9)  # fmt: skip
    baselines = best_baselines(quality)
    if baselines:
        x, y = zip(*sorted((row["ratio"], 100 * row["f1"]) for row in baselines))
        axes.plot(
            x, y, "o", color=QUIET, markerfacecolor="white", markersize=6, label="best text baseline, same budget"
        )
    for (name, points), color, marker in zip(methods.items(), SERIES * 3, MARKERS * 3):
        points = sorted(points, key=lambda row: row["ratio"])
        ratios = [row["ratio"] for row in points]
        scores = [100 * row["f1"] for row in points]
        low = [max(100 * (row["f1"] - row.get("f1_ci_low", row["f1"])), 0.0) for row in points]
        high = [max(100 * (row.get("f1_ci_high", row["f1"]) - row["f1"]), 0.0) for row in points]
        axes.errorbar(
            ratios, scores, (low, high), color=color, marker=marker, markersize=6, capsize=2, linewidth=1.6, label=name
        )
    _ratio_axis(axes, [row["ratio"] for row in [*baselines, *(row for points in methods.values() for row in points)]])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("compression ratio (passage tokens / slots)")
    axes.set_ylabel("F1")
    _legend(axes)
    return _svg(figure)


def ttft_plot(rows: Sequence[Row]) -> str | None:
    """TTFT against the tokens of the context: full text, stored passages (solid), compressed on the way (dashed)."""
    methods = _by_method([row for row in rows if row.get("suite") == "speed"], with_ratio=True)
    if not any(len(points) > 1 for points in methods.values()):
        return None
    figure, axes = _figure()
    colors = iter(SERIES * 3)
    marks = iter(MARKERS * 3)
    dashed = False
    for name, points in methods.items():
        points = sorted(points, key=lambda row: row["context_tokens"])
        color = INK if name == "full" else next(colors)
        x = [row["context_tokens"] for row in points]
        label = "full text" if name == "full" else name
        marker = "o" if name == "full" else next(marks)
        axes.plot(x, [row["ttft_ms"] for row in points], color=color, marker=marker, markersize=5, label=label)
        if all("ttft_online_ms" in row for row in points):
            axes.plot(x, [row["ttft_online_ms"] for row in points], color=color, linestyle=":", linewidth=1.3)
            dashed = True
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("context length (reader tokens of the passages)")
    axes.set_ylabel("time to first token, ms")
    if dashed:
        axes.plot([], [], color=QUIET, linestyle=":", label="compressed within the request")
    _legend(axes)
    return _svg(figure)


def position_plot(rows: Sequence[Row]) -> str | None:
    """F1 against the place of the gold passage among its distractors; None without such rows."""
    tested = [row for row in rows if row.get("test") == "gold-position"]
    if not tested:
        return None
    figure, axes = _figure(height=3.0)
    for (name, points), color, marker in zip(
        _by_method(tested, with_ratio=True).items(), (INK, *SERIES * 3), MARKERS * 3
    ):
        points = sorted(points, key=lambda row: row["position"])
        label = "full text" if name == "full" else name
        places, scores = [row["position"] + 1 for row in points], [100 * row["f1"] for row in points]
        axes.plot(places, scores, color=color, marker=marker, markersize=5, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("place of the gold passage")
    axes.set_ylabel("F1")
    _legend(axes)
    return _svg(figure)


def best_baselines(quality: Sequence[Row]) -> list[Row]:
    """Of the baselines under one method's budget at one ratio, the one with the highest F1; for each method and ratio."""
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in quality:
        if "budget_of" in row and "ratio" in row:
            groups.setdefault((row["budget_of"], row.get("ratio_asked")), []).append(row)
    return [max(group, key=lambda row: row["f1"]) for group in groups.values()]


def _by_method(rows: Sequence[Row], with_ratio: bool = False) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = str(row["method"])
        if with_ratio and row.get("ratio_asked"):
            name += f" {row['ratio_asked']:g}x"
        found.setdefault(name, []).append(row)
    return found


def require_matplotlib() -> None:
    """Raises ImportError with what to do if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('Plots need matplotlib; run `pip install "nutgraf[bench]"`.') from error


def _figure(height: float = 3.6) -> tuple[Figure, Axes]:
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    style = {
        "font.family": "sans-serif",
        "font.size": 10,
        "svg.fonttype": "path",
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = NewFigure(figsize=(5.6, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, axes


def _ratio_axis(axes: Axes, ratios: Sequence[float]) -> None:
    """Powers of two around all ratios."""
    low, high = math.floor(math.log2(min(ratios) / 1.15)), math.ceil(math.log2(max(ratios) * 1.15))
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**low, 2.0**high)
    ticks = [2.0**k for k in range(low, high + 1)]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])


def _legend(axes: Axes) -> None:
    columns = 2 if len(axes.get_legend_handles_labels()[0]) > 3 else 1
    axes.legend(frameon=False, fontsize=9, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True, bbox_inches="tight")
    text = out.getvalue()
    return text[text.index("<svg") :]
