"""Figures drawn as SVG for one HTML page: no script, no outside reference, the same bytes for the same data.

A figure is plain data (see `report_points`); values are in base units, and `scale` divides them for the axis. Text
stays text, so that it can be searched, read aloud and printed sharply. What is shown is decided elsewhere.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INK, SOFT, GRID = "#1f2933", "#5b6770", "#e3e7eb"
PALETTE = ("#2a5d9f", "#d9822b", "#3a8f6b", "#9b4f96", "#b33a3a", "#7a6a53", "#4aa3c7", "#c2a83e", "#6f7d8c", "#274156")
ROLES = {
    "chosen": "#2a5d9f",
    "costs more": "#a9bdd6",
    "breaks a constraint": "#e2b9a5",
    "goal": "#b33a3a",
    "envelope": "#b33a3a",
}
"""Colours with a meaning, by series name."""
_HATCHES = ("", "///", "...", "xx", "\\\\", "--", "++", "oo", "**", "||")
"""Told apart in black and white too."""

Figure = Mapping[str, Any]


def draw(figure: Figure) -> str:
    """Return one figure as an inline SVG element with title, description and ids of its own.

    Raises KeyError for a figure kind that is not known.
    """
    import matplotlib as mpl  # heavy: only where something is drawn

    mpl.use("Agg")
    from matplotlib.figure import Figure as Canvas

    painter = _PAINTERS[figure["kind"]]
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": str(figure["id"]),
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 9.0,
        "hatch.linewidth": 0.5,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
    }
    with mpl.rc_context(settings):
        canvas = Canvas(figsize=(7.4, _height(figure)), layout="constrained")
        axes = canvas.subplots()
        painter(axes, figure)
        _dress(axes, figure)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), figure)


def _height(figure: Figure) -> float:
    """Return inches: as many rows as there are, so that labels never overlap."""
    if figure["kind"] in ("hbars", "spans", "ratios"):
        rows = len(_categories(figure))
        bars = len(figure["series"]) if figure["kind"] == "hbars" and not figure.get("stacked") else 1
        return min(14.0, 1.3 + rows * (0.14 + 0.13 * max(1, bars)))
    return 3.4


def _dress(axes: Any, figure: Figure) -> None:
    from matplotlib.ticker import NullLocator

    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    along = "x" if figure["kind"] in ("hbars", "spans", "ratios") else "y"
    axes.grid(axis="both" if figure["kind"] == "lines" else along, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0 if along == "x" else 3)
    axes.set_xlabel(figure.get("x_label", ""))
    axes.set_ylabel(figure.get("y_label", ""))
    if figure.get("log"):
        axes.set_xscale("log") if along == "x" else axes.set_yscale("log")
        axis = axes.xaxis if along == "x" else axes.yaxis
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")  # the default needs mathtext, which names may not use
        axis.set_minor_formatter("")
    elif figure.get("from_zero", True) and figure["kind"] in ("lines", "bars"):
        axes.set_ylim(bottom=0)
    if ticks := figure.get("x_ticks"):  # few levels, each about a multiple of the one before
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    if figure.get("whole"):
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = axes.get_legend_handles_labels()
    if labels and (len(labels) > 1 or figure["kind"] == "lines"):
        names = [_short(text, 34) for text in labels]
        columns = min(len(names), 3 if max(len(text) for text in names) <= 26 else 2)
        axes.figure.legend(handles, names, frameon=False, loc="outside upper center", ncols=columns)


def _categories(figure: Figure) -> list[str]:
    """Return the rows of a figure: as it orders them, else in order of first appearance. Levels across have none."""
    if "rows" in figure:
        return [str(row) for row in figure["rows"]]
    return list(
        dict.fromkeys(
            str(point["x"]) for series in figure["series"] if series.get("style") != "level" for point in series["points"]
        )
    )


def _colour(series: Mapping[str, Any], index: int) -> str:
    return ROLES.get(series.get("role", series["name"]), PALETTE[series.get("tone", index) % len(PALETTE)])


def _scaled(point: Mapping[str, Any], figure: Figure) -> float:
    return float((point["y"] - figure.get("origin", 0.0)) / figure.get("scale", 1.0))


def _reach(point: Mapping[str, Any], figure: Figure) -> tuple[float, float]:
    """Return how far the whisker goes below and above the value: an interval if it has one, else the standard error."""
    scale = figure.get("scale", 1.0)
    if "low" in point:
        return (point["y"] - point["low"]) / scale, (point["high"] - point["y"]) / scale
    error = (point.get("error") or 0.0) / scale
    return error, error


def _lines(axes: Any, figure: Figure) -> None:
    """Draw curves; a series may have a band (`low`, `high`), be points only, or be one level across."""
    for index, series in enumerate(figure["series"]):
        points, colour = series["points"], _colour(series, index)
        ys = [_scaled(point, figure) for point in points]
        if series.get("style") == "level":
            axes.axhline(ys[0], color=colour, linewidth=1.2, linestyle="--", label=series["name"])
            continue
        xs = [point["x"] - figure.get("x_origin", 0.0) for point in points]
        if series.get("style") == "points":
            reach = list(zip(*(_reach(point, figure) for point in points), strict=True))
            axes.errorbar(
                xs, ys, yerr=reach, fmt="o" if index % 2 else "s", markersize=6, color=colour, capsize=3, label=series["name"]
            )
            continue
        width = max(1.4, 4.4 - index)  # equal curves lie on each other: the later ones are thinner, so all are seen
        marker = "o" if len(xs) < 30 else None
        axes.plot(xs, ys, color=colour, linewidth=width, alpha=0.85, marker=marker, markersize=2 + width, label=series["name"])
        if whiskers := None if any("low" in point for point in points) else _whiskers(series, figure):
            axes.errorbar(xs, ys, yerr=whiskers, fmt="none", ecolor=colour, capsize=3, linewidth=1.2)
        if any("low" in point for point in points):
            lows, highs = zip(*(_reach(point, figure) for point in points), strict=True)
            axes.fill_between(
                xs,
                [y - low for y, low in zip(ys, lows, strict=True)],
                [y + high for y, high in zip(ys, highs, strict=True)],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )


def _bars(axes: Any, figure: Figure) -> None:
    """Draw groups of bars side by side, one group per x, with whiskers; a `level` series is a line across."""
    names = list(
        dict.fromkeys(str(p["x"]) for series in figure["series"] if series.get("style") != "level" for p in series["points"])
    )
    grouped = [series for series in figure["series"] if series.get("style") != "level"]
    width = 0.8 / max(1, len(grouped))
    for index, series in enumerate(grouped):
        at = [names.index(str(point["x"])) + (index - (len(grouped) - 1) / 2) * width for point in series["points"]]
        ys = [_scaled(point, figure) for point in series["points"]]
        axes.bar(
            at,
            ys,
            width * 0.92,
            yerr=_whiskers(series, figure),
            color=_colour(series, index),
            ecolor=INK,
            error_kw={"linewidth": 0.9, "capsize": 2},
            hatch=_HATCHES[index % len(_HATCHES)] if len(grouped) > 1 else "",
            edgecolor="white",
            linewidth=0.6,
            label=series["name"],
        )
    axes.set_xticks(range(len(names)), [_short(name, 28) for name in names])
    _levels_across(axes.axhline, figure)


def _levels_across(draw_line: Callable[..., Any], figure: Figure) -> None:
    for series in figure["series"]:
        if series.get("style") == "level":
            level = _scaled(series["points"][0], figure)
            draw_line(level, color=_colour(series, 0), linewidth=1.2, linestyle="--", label=series["name"])


def _whiskers(series: Mapping[str, Any], figure: Figure) -> list[tuple[float, ...]] | None:
    if figure.get("bare"):
        return None
    reach = [_reach(point, figure) for point in series["points"]]
    return list(zip(*reach, strict=True)) if any(low or high for low, high in reach) else None


def _hbars(axes: Any, figure: Figure) -> None:
    """Draw bars to the right, one row per x; several series side by side, or on top of each other when `stacked`."""
    names = _categories(figure)
    bars = [series for series in figure["series"] if series.get("style") != "level"]
    stacked = bool(figure.get("stacked"))
    height = 0.75 if stacked else 0.8 / max(1, len(bars))
    reached = dict.fromkeys(names, 0.0)
    for index, series in enumerate(bars):
        points = series["points"]
        shift = 0.0 if stacked else (index - (len(bars) - 1) / 2) * height
        ys = [_scaled(point, figure) for point in points]
        axes.barh(
            [names.index(str(point["x"])) + shift for point in points],
            ys,
            height * 0.92,
            left=[reached[str(point["x"])] for point in points] if stacked else None,
            xerr=_whiskers(series, figure),
            color=_colour(series, index) + ("70" if series.get("pale") else ""),
            ecolor=INK,
            error_kw={"linewidth": 0.9, "capsize": 2},
            edgecolor="white",
            linewidth=0.6,
            hatch=_HATCHES[index % len(_HATCHES)] if len(bars) > 1 and not series.get("role") else "",
            label=series["name"],
        )
        if stacked:
            for point, y in zip(points, ys, strict=True):
                reached[str(point["x"])] += y
    _levels_across(axes.axvline, figure)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _spans(axes: Any, figure: Figure) -> None:
    """Draw one row per x with a bar from `y` to `end`."""
    names = _categories(figure)
    origin = figure.get("origin", 0.0)
    for index, series in enumerate(figure["series"]):
        axes.barh(
            [names.index(str(point["x"])) for point in series["points"]],
            [max(point["end"] - point["y"], 1e-3) for point in series["points"]],
            0.7,
            left=[point["y"] - origin for point in series["points"]],
            color=_colour(series, index),
            edgecolor="white",
            linewidth=0.6,
            label=series["name"],
        )
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _ratios(axes: Any, figure: Figure) -> None:
    """Draw observed over predicted, one row per x, with the predicted interval.

    Shaded is a miss of at most 25 % of the observed value, as `recommend.observe` counts it: ratios from 1/1.25 to 1/0.75.
    """
    names = _categories(figure)
    axes.axvspan(1 / 1.25, 1 / 0.75, color="#e8f1ec", label="miss of at most 25 %")
    axes.axvline(1.0, color=SOFT, linewidth=1.0)
    points = [point for series in figure["series"] for point in series["points"] if point["predicted"]]
    rows = [names.index(str(point["x"])) for point in points]
    lows = [point["low"] / point["predicted"] for point in points]
    highs = [point["high"] / point["predicted"] for point in points]
    axes.hlines(rows, lows, highs, color="#a9bdd6", linewidth=5.0, label="predicted interval")
    seen = [point["y"] / point["predicted"] for point in points]
    axes.plot(seen, rows, "o", color=PALETTE[0], markersize=6, label="observed")
    top = max([1.6, *[value * 1.05 for value in (*highs, *seen) if math.isfinite(value)]])
    axes.set_xlim(0.0, min(top, 5.0))
    axes.set_yticks(range(len(names)), [_short(name, 60) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)


def _short(text: str, limit: int = 44) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


_PAINTERS: Mapping[str, Callable[[Any, Figure], None]] = {
    "lines": _lines,
    "bars": _bars,
    "hbars": _hbars,
    "spans": _spans,
    "ratios": _ratios,
}
KINDS: Sequence[str] = tuple(_PAINTERS)


def _inline(svg: str, figure: Figure) -> str:
    """Return matplotlib's file as an element that can stand in a page beside others: own ids, no metadata, no doctype."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    name = re.sub(r"[^a-z0-9-]", "-", str(figure["id"]).lower())
    body = re.sub(r'\bid="', f'id="{name}--', body)
    body = body.replace("url(#", f"url(#{name}--").replace('href="#', f'href="#{name}--')
    body = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", body, count=1)
    body = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", body, count=1)
    title, alt = html.escape(str(figure["title"])), html.escape(str(figure["alt"]))
    opening = f'<svg role="img" aria-labelledby="{name}--t {name}--d" '
    head, rest = body.split(">", 1)
    words = f'<title id="{name}--t">{title}</title><desc id="{name}--d">{alt}</desc>'
    return opening + head.removeprefix("<svg ") + ">" + words + rest
