"""Counts what becomes of one model's calls, in plain numbers: per batch where it can, never per request twice."""

from __future__ import annotations

import time

from tenure.errors import TenureError, Unavailable
from tenure.serve import batchwire as wire
from tenure.serve.faults import InputRefused, Overloaded
from tenure.serve.plane import Durations, ModelStatistics

_MAX_EXACT_ROWS = 256
_NEWEST = 0.1
"""Weight of the newest run in the mean time per row."""


class Tally:
    """One model's statistics, and what a row costs lately."""

    def __init__(self) -> None:
        self.statistics = ModelStatistics()
        self.unit_s = 0.0
        """Mean time of the instance per unit of the queue, lately: a row, or a call that runs by itself. 0: none has run."""

    def ended(self, outcome: str) -> None:
        """Count one call by how it ended."""
        outcomes = self.statistics.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def failed(self, error: TenureError, after_s: float) -> None:
        """Count a call that ends with an error."""
        self.ended(outcome(error))
        self.statistics.fail.add(after_s)

    def answered(self, calls: int, rows: int, total_s: float) -> None:
        """Count calls that got their answers, `total_s` from submit to answer together."""
        if calls:
            found = self.statistics
            found.success.count += calls
            found.success.total_s += total_s
            found.inference_count += rows
            found.last_inference_at_s = time.time()
            found.outcomes["ok"] = found.outcomes.get("ok", 0) + calls

    def ran(self, report: wire.Done, rows: int, units: int) -> None:
        """Count what was run for one message. Above 256 rows only powers of two are kept apart: clients choose how many."""
        found = self.statistics
        found.execution_count += report.runs
        times = (report.input_s, report.infer_s, report.output_s)
        each = rows // max(report.runs, 1)
        kept = each if each <= _MAX_EXACT_ROWS else 1 << each.bit_length() - 1
        batch = found.batches.get(kept)
        if batch is None:
            batch = found.batches[kept] = (Durations(), Durations(), Durations())
        totals = (found.compute_input, found.compute_infer, found.compute_output)
        for total, part, seconds in zip(totals, batch, times, strict=True):
            total.count += report.runs
            total.total_s += seconds
            part.count += report.runs
            part.total_s += seconds
        unit_s = sum(times) / max(units, 1)
        self.unit_s = self.unit_s + _NEWEST * (unit_s - self.unit_s) if self.unit_s else unit_s


def outcome(error: TenureError) -> str:
    """Return the word that an error is counted under."""
    kinds = ((InputRefused, "refused"), (Overloaded, "overloaded"), (Unavailable, "timed_out"))
    return next((name for kind, name in kinds if isinstance(error, kind)), "failed")
