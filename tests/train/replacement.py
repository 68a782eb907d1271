"""How long work that one suffices for lies idle after whose turn it is, or who claimed it, died at any operation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tenure.train import tree

from .explorer import PERIOD_S, ROOT, Process, Run, Schedule
from .floats import Floats
from .memory_files import MemoryFiles

POLL_S = 0.02
OPERATION_S = 0.00002
MAX_PERIODS = 1 + 2.2 * POLL_S / PERIOD_S
"""An observer sees a claim one pause after it is made, and its lapse another one late; a tenth for operations."""


@dataclass(slots=True)
class _Deaths:
    """Kills the one who is to add a slice of round 1, at any operation until it is published; then whoever claimed it."""

    kills: int
    died_s: float = -1.0
    name: str = ""
    _seen: int = 0
    _claimed_by: dict[str, int] = field(default_factory=dict)
    _slices: set[str] = field(default_factory=set)

    def __call__(self, run: Run, process: Process) -> str:
        if not self.kills:
            return ""
        for published in run.publications[self._seen :]:
            if published.name.startswith("claims/sum-00000001"):
                self._claimed_by[published.name.split("/")[1].split(".")[0]] = published.worker
            if published.name.startswith("sums/00000001"):
                self._slices.add(published.name.replace("s/", "-"))
        self._seen = len(run.publications)
        name = self._falls_to(run, process)
        if not name or name in self._slices or (self.name and name != self.name) or run.rng.random() < 0.7:
            return ""
        self.kills -= 1
        self.died_s, self.name = run.now_s, name
        return "before"

    def _falls_to(self, run: Run, process: Process) -> str:
        """Return the slice that is due and that this process is to add, or nothing."""
        files = MemoryFiles(run.disk)
        nodes = [name for name in files.names(Path(f"{ROOT}/nodes")) if name.startswith("00000001")]
        if tree.cover({(int(n[9:13]), int(n[14:])) for n in nodes}, run.schedule.shards) is None:
            return ""
        slices = 1 if run.schedule.exchange == "central" else run.schedule.workers
        for number in range(slices):
            name = f"sum-00000001-{slices:04d}-{number:04d}"
            turn = process.worker if slices > 1 and number == process.worker else -1
            if process.worker == self._claimed_by.get(name, turn):
                return name
        return ""


def idle_periods(seed: int) -> float | None:
    """Return claim periods from the last death to the takeover, in one run; None when nobody died in time.

    Three workers, so that a dead claimer of a dead worker's slice has somebody to replace it as well.
    """
    rng = Random(f"replacement {seed}")
    exchange = rng.choice(("sharded", "central"))
    deaths = _Deaths(kills=rng.choice((1, 2)))
    schedule = Schedule(seed=seed, workers=3, exchange=exchange, policy=rng.choice(("walk", "pct")))
    run = Run(schedule, Floats(), on_point=deaths, restart_s=(3 * PERIOD_S,), sleep_s=POLL_S, operation_s=OPERATION_S)
    run.go()
    if deaths.died_s < 0:
        return None
    wanted = f"claims/{deaths.name}."
    taken = (p.at_s for p in run.publications if p.name.startswith(wanted) and p.at_s > deaths.died_s)
    return (next(taken) - deaths.died_s) / PERIOD_S
