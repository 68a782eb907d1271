"""Retention: which of what is old is to go, and what went. When and how is in `broker.retention`."""

from __future__ import annotations

from dataclasses import dataclass

DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectGarbage:
    """Remove what is old. The defaults are what a broker does by itself. Nothing of a live run or lease ever goes."""

    older_than_s: float = 30 * DAY_S
    """Since the last thing that happened in a run: then its stores, worker folders and logs go."""
    forget_after_s: float = 365 * DAY_S
    """Then the whole run goes: report, artefacts, leases, exits, recommendations. Its trials stay."""
    keep_runs: int = 20
    """The newest runs, of which nothing goes but old events and usage points."""
    events_older_than_s: float = 90 * DAY_S
    """Events and usage points."""
    trials_older_than_s: float | None = None
    """None keeps them all: recommendations rest on them."""
    dry_run: bool = False
    """Only say what would go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freed:
    """What went, or would go, of one kind."""

    kind: str
    count: int = 0
    size_bytes: int = 0
    names: tuple[str, ...] = ()
    """Of runs or nodes."""
