"""What the figures of a report are made of: points that cite the ledger row they come from. How they are drawn is in `plots`.

    {"id", "kind", "title", "alt", "x_label", "y_label", "scale", "series": [{"name", "points": [{"x", "y", "cite", …}]}]}

`x` is a number (kind ``lines``; then `cite_x` says where from) or a row's label; `error`, `low`, `high` are whiskers.
"""

from __future__ import annotations

from typing import Any

from tenure.experiments.report_cite import Cell

Figure = dict[str, Any]


def make_figure(name: str, kind: str, title: str, alt: str, *, series: list[dict[str, Any]], **more: Any) -> Figure:
    """Return a figure of those series that have points; `more` as `plots` reads it."""
    kept = [one for one in series if one["points"]]
    return {"id": f"figure-{name}", "kind": kind, "title": title, "alt": alt, "series": kept, **more}


def has_points(figure: Figure) -> bool:
    """Whether there is anything in it besides lines across."""
    return any(series["points"] for series in figure["series"] if series.get("style") != "level")


def make_point(x: object, cell: Cell, **more: Any) -> dict[str, Any]:
    """Return a point at x with a cell's value, standard error and citation."""
    return {"x": x, "y": cell["value"], "error": cell.get("error", 0.0), "cite": cell["cite"], **more}


def make_level(name: str, cell: Cell | None, role: str) -> list[dict[str, Any]]:
    """Return a line across at one cited value, as a series; none without the cell."""
    if cell is None:
        return []
    return [{"name": name, "role": role, "style": "level", "points": [{"x": "", "y": cell["value"], "cite": cell["cite"]}]}]
