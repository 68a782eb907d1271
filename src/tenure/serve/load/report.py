"""What a load run reports: its figures, how the server was warmed up, what the generator says of itself; and its files.

A folder holds `load.json` (this report) and the record's columns as .npy files, every request of it. Not here: the text that
people read (the command line's).
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tenure import __version__
from tenure.decide.verdicts import LatencyGoal
from tenure.errors import Conflict, CorruptData, NotFound
from tenure.serve.load.judge import Verdict, judge
from tenure.serve.load.plan import Kind, LoadPlan
from tenure.serve.load.records import OwnUse
from tenure.serve.load.runner import LoadRun, Target, Warmth
from tenure.serve.load.summary import Summary, summary
from tenure.serve.processes import write_json

REPORT_FILE = "load.json"
RECORD_FOLDER = "record"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """One run, told. Results of different kinds of load are never put in one column."""

    kind: Kind
    plan: LoadPlan
    summary: Summary
    verdict: Verdict
    """Whether the figures are the server's, and what they prove."""
    warmth: Warmth
    """Of the server, before the schedule began."""
    measured_from_s: float
    """Requests due before it are in the record and in no figure."""
    own: OwnUse
    peak_in_flight: int
    realtime: bool
    """Whether the generator's thread was in the kernel's real-time class."""
    reasons: dict[str, int]
    """Why requests failed, and how often."""
    stopped: str
    """Why the run ended before its time; empty where it did not."""
    started_at_s: float
    """UTC of the run's zero."""
    zero_s: float
    """The same moment by this machine's monotonic clock."""
    ended_s: float
    """When the last request had ended, from the run's zero."""
    versions: dict[str, str] = field(default_factory=dict)


def measure(plan: LoadPlan, *, folder: Path | None = None, goal: LatencyGoal | None = None) -> LoadReport:
    """Run a plan once, warm-up included, and return its report. folder: a new one, for the report and the record.

    Raises Unavailable, NotFound, SpecError, ModelFailed before the run; what happens during it is in the report.
    """
    new_folder(folder)
    target = Target(plan)
    warmth = target.warm_up()
    run = target.run(plan, folder / RECORD_FOLDER if folder is not None else None)
    found = report(run, warmth, goal)
    if folder is not None:
        write_json(folder / REPORT_FILE, msgspec.to_builtins(found))
    return found


def new_folder(folder: Path | None) -> None:
    """Refuse a folder that has something in it. Raises Conflict."""
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} is there already and not empty: name another folder for this run")


def report(run: LoadRun, warmth: Warmth, goal: LatencyGoal | None = None) -> LoadReport:
    """Return the report of a run."""
    return LoadReport(
        kind=run.plan.kind,
        plan=run.plan,
        summary=summary(run),
        verdict=judge(run.measured, timeout_s=run.plan.timeout_s, own=run.own, goal=goal),
        warmth=warmth,
        measured_from_s=run.measured_from_s,
        own=run.own,
        peak_in_flight=run.peak_in_flight,
        realtime=run.realtime,
        reasons=run.reasons,
        stopped=run.stopped,
        started_at_s=run.started_at_s,
        zero_s=run.zero_s,
        ended_s=run.ended_s,
        versions={"tenure": __version__, "python": platform.python_version(), "numpy": np.__version__},
    )


def read_report(folder: Path | str) -> LoadReport:
    """Return the report in a folder; its record is read by `columns.read_record`. Raises NotFound, CorruptData."""
    path = Path(folder) / REPORT_FILE
    try:
        content: Any = msgspec.json.decode(path.read_bytes())
        found: LoadReport = msgspec.convert(content, LoadReport)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptData(f"{path} is not the report of a load run: {error}") from error
    return found
