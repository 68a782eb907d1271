"""A server and a clock that exist only in numbers, for the load generator's loop: a run of minutes takes a moment."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tenure.serve.load.columns import Columns, write_record
from tenure.serve.load.loop import Loop
from tenure.serve.load.plan import LoadPlan
from tenure.serve.load.records import Outcome, OwnUse
from tenure.serve.load.runner import LoadRun, Warmth

TICK_S = 1e-7
"""That each look at the clock takes."""


class Virtual:
    """A wire, a clock and a wait in one. `answer(index, now_s)`: when the request ends, from the run's zero; None: never."""

    def __init__(self, answer: Callable[[int, float], float | None], *, stalls: list[tuple[float, float]] = ()) -> None:
        self._answer, self._stalls = answer, list(stalls)
        self.now_s = 0.0
        self._ends: list[tuple[float, int]] = []
        self.sent: list[int] = []
        self.given_up: list[int] = []
        self.failing: Callable[[int], str] = lambda index: ""

    def clock(self) -> float:
        self.now_s += TICK_S
        return self.now_s

    def wait(self, _read, _write, _error, timeout_s: float) -> None:
        until_s = self.now_s + timeout_s
        if self._ends:
            until_s = max(self.now_s, min(until_s, self._ends[0][0] + self.loop.zero_s))
        for start_s, length_s in self._stalls:
            if self.now_s < start_s <= until_s:  # the generator's machine does something else
                until_s = start_s + length_s
                self._stalls.remove((start_s, length_s))
                break
        self.now_s = until_s
        while self._ends and self._ends[0][0] <= self.now_s - self.loop.zero_s:
            _, index = heapq.heappop(self._ends)
            if index not in self.given_up:
                self.loop.finish(index, Outcome.OK)

    def open(self, loop: Loop) -> None:
        self.loop = loop

    def try_send(self, index: int, request: object) -> bool:
        self.sent.append(index)
        if reason := self.failing(index):
            self.loop.fail(index, reason)
            return True
        end_s = self._answer(index, self.now_s - self.loop.zero_s)
        if end_s is not None:
            heapq.heappush(self._ends, (end_s, index))
        return True

    def give_up(self, index: int) -> None:
        self.given_up.append(index)

    def close(self) -> None:
        pass


def virtual_loop(wire: Virtual, capacity: int, *, timeout_s: float = 10.0, max_in_flight: int = 10_000, **more) -> tuple:
    columns = Columns(capacity)
    loop = Loop(
        wire,
        columns,
        [b""],
        [0],
        timeout_s=timeout_s,
        max_in_flight=max_in_flight,
        clock=wire.clock,
        wait=wire.wait,
        **more,
    )
    wire.open(loop)
    return loop, columns


def run_open(wire: Virtual, due_s, **options):
    """Run a schedule against a virtual server; return the loop and its record."""
    loop, columns = virtual_loop(wire, len(due_s), **options)
    columns.begin(len(due_s))
    np.asarray(columns.due)[:] = due_s
    try:
        loop.run_open(len(due_s))
    finally:
        loop.close()
    return loop, columns.record(len(due_s))


class VirtualTarget:
    """See `search.Runs`: a server that answers one request after the other, `per_s` of them a second."""

    def __init__(self, per_s: float) -> None:
        self._takes_s = 1 / per_s
        self.plans: list[LoadPlan] = []

    def warm_up(self) -> Warmth:
        return Warmth(requests=16, seconds=0.1, settled=True)

    def run(self, plan: LoadPlan, folder: Path | None = None) -> LoadRun:
        self.plans.append(plan)
        free_s = 0.0

        def answer(index: int, now_s: float) -> float:
            nonlocal free_s
            free_s = max(free_s, now_s) + self._takes_s
            return free_s

        wire = Virtual(answer)
        if plan.clients:
            loop, columns = virtual_loop(wire, 100_000, timeout_s=plan.timeout_s)
            loop.run_closed(plan.clients, plan.seconds)
            record = columns.record(loop.count)
        else:
            loop, record = run_open(wire, plan.due_s(), timeout_s=plan.timeout_s)
        if folder is not None:
            write_record(folder, record)
        return LoadRun(
            plan=plan,
            record=record,
            measured_from_s=plan.measured_from_s(),
            own=OwnUse(wall_s=plan.seconds, cpu_s=0.0),
            peak_in_flight=loop.peak_in_flight,
            realtime=False,
            reasons={},
            stopped="",
            zero_s=0.0,
            started_at_s=0.0,
            ended_s=float(record.ended_s.max()),
        )
