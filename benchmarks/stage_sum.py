"""Whether an experiment's own account of where time, CPU and memory went is complete, and what keeping it costs.

World: `tenure bench serve` on this machine, real leases that go before all else on it (`--undisturbed`): MobileNetV2
(`vision/models`, ONNX, its batch made free of size) and 64 images of `vision/images`; simple, microservice and distributed
(over loopback where no namespace can be made), sync and async, every transport, batch 1 and 8, from files and from memory; 3
repeats of at least 0.6 s (--quick: no shm, batch 1, 2 repeats of 0.3 s).
Stages: of each cell (one setting in one repeat), the sum of its seven stages per request (load data, prepare data, send,
recognise, fetch, print the log, other) ÷ `wall_s`, the places for requests in flight × wall time ÷ requests. No stage is
computed as a remainder of the wall time, which is read from two clocks of its own.
CPU and memory: the parties' exact CPU (application, server, recogniser) and memory, summed over the processes of each node of
the experiment, ÷ the growth of its lease's own cgroup counters (v1 cpuacct.usage or v2 cpu.stat; rss + shmem) read at the
same moments: CPU over all cells together, memory at the end of each cell, median. Kernel memory is in no process's account
and is left out on both sides. Null (`why` says so) where leases have no cgroup.
Probes: the CPU time of the meter's thread ÷ the wall time of the cells it watched (its first and last readings lie outside of
their clocks), plus the timers of a request (a loop of as many reads of the clock as a request makes, timed) ÷ the mean
request. Beside it, reported with its interval and never judged: the rate of cells with all probes on ÷ that of bare cells
right beside them, in random order, 10 pairs of each of three settings (--quick: 3 of one).
Bars, all must hold: every setting's stages within 2 % of its wall time (mean over its cells); CPU and memory within 3 %;
probes under 1 %. `value` is the worst setting's distance from 1.
Control: the same account with one stage left out (recognise everywhere; prepare data, from files) must miss 2 % in every
setting.
Left out: whether a stage is named well (`send` over gRPC is encoding only), GPU memory of single processes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import Control, Options, Result, judge
from benchmarks.serving_experiment import experiment
from tenure.experiments.sweep import Setting, in_flight, order
from tenure.experiments.sweep_nodes import Asked, Nodes, standing
from tenure.experiments.sweep_parties import CellUse, PartyMeter
from tenure.meter import cgroups
from tenure.meter.process import ProcessSampler, shared_memory_bytes
from tenure.sweeps import Sweep

NAME = "stage_sum"
BAR = "stages sum to wall time within 2 %, CPU and memory to the cgroup's within 3 %, probes < 1 %"
STAGE_BAR, PARTY_BAR, PROBE_BAR = 0.02, 0.03, 0.01
CLOCKS = 14
"""Reads of a clock that a request makes at most: of the wall, and of its thread's CPU."""


def run(options: Options) -> Result:
    """Measure; see the module's docstring."""
    full = Sweep(batches=(1, 8), repeats=3, cell_s=0.6, twins=False, undisturbed=True, normalise="signed")
    quick = replace(full, transports=("http", "grpc"), batches=(1,), repeats=2, cell_s=0.3)
    sweep = quick if options.quick else full
    with experiment(options, sweep) as made, _Counting() as meter, standing(made.bench, made.settings, meter) as nodes:
        meter.groups = [cgroups.own_paths(pid) for pid in nodes.pids]
        asked = []
        for place, (repeat, setting) in enumerate(order(made.settings, sweep, options.seed)):
            asked.append(_cell(nodes, sweep, setting, repeat, place))
            meter.note_memory()
        paired = _bare_pairs(nodes, sweep, made.settings, options)
        enforced = all(_counter(group) for group in meter.groups)
    by_setting: dict[Setting, list[Asked]] = {}
    for each in asked:
        by_setting.setdefault(each.setting, []).append(each)
    sums = {setting.describe(): _share(cells) for setting, cells in by_setting.items()}
    worst = max(abs(share - 1) for share in sums.values())
    cpu, memory = meter.cpu_ratio(), statistics.median(meter.memory_ratios) if meter.memory_ratios else None
    meter_share = meter.overhead_s / meter.watched_s
    timer_share = _clocks_s() / statistics.fmean(each.cell.wall_s * each.cell.places / each.cell.requests for each in asked)
    probes = meter_share + timer_share
    left = {setting.describe(): _share(cells, without=_left_out(setting)) for setting, cells in by_setting.items()}
    control = Control(
        name="a stage left out",
        value=max(left.values()),
        failed=all(abs(share - 1) > STAGE_BAR for share in left.values()),
        how=f"its sum is {max(left.values()):.3f} of the wall time at most",
    )
    details = {
        "settings": len(sums),
        "cells": len(asked),
        "cpu_of_parties_over_cgroup": cpu,
        "memory_of_processes_over_cgroup": memory,
        "probe_share": probes,
        "meter_share": meter_share,
        "timer_share": timer_share,
        "rate_with_probes_over_bare": paired,
        "worst_setting": max(sums, key=lambda name: abs(sums[name] - 1)),
    }
    if not enforced or cpu is None or memory is None:
        why = "leases have no cgroup here, so the parties' CPU and memory have nothing to be compared with"
        return Result(value=worst, spread=None, unit="distance from 1", holds=None, why=why, control=control, details=details)
    bars = (worst <= STAGE_BAR, abs(cpu - 1) <= PARTY_BAR, abs(memory - 1) <= PARTY_BAR, probes < PROBE_BAR)
    holds, why = judge(all(bars), control)
    return Result(value=worst, spread=None, unit="distance from 1", holds=holds, why=why, control=control, details=details)


def _cell(nodes: Nodes, sweep: Sweep, setting: Setting, repeat: int, place: int, *, probes: bool = True) -> Asked:
    flying = in_flight(sweep, setting)
    return nodes.run(setting, repeat=repeat, order=place, seconds=sweep.cell_s, in_flight=flying, probes=probes)


def _left_out(setting: Setting) -> str:
    """Return the stage that the control forgets."""
    return "prepare_data_s" if setting.data == "files" else "recognise_s"


def _share(cells: list[Asked], without: str = "") -> float:
    """Return the sum of the stages over what they must sum to, mean over cells."""
    return statistics.fmean(
        sum(seconds for name, seconds in each.cell.stages.items() if name != without) / (each.cell.places * each.cell.wall_s)
        for each in cells
    )


def _bare_pairs(nodes: Nodes, sweep: Sweep, settings: tuple[Setting, ...], options: Options) -> dict[str, Mapping[str, float]]:
    """Return the rate with all probes over that of bare cells beside them, with its standard error, of synchronous settings."""
    chance = random.Random(options.seed)
    found: dict[str, Mapping[str, float]] = {}
    wanted = [
        each for each in settings if each.interaction == "sync" and each.data == "memory" and each.batch == 1 and not each.far
    ]
    for setting in wanted[: 1 if options.quick else 3]:
        ratios = []
        for repeat in range(3 if options.quick else 10):
            rates = {}
            for probes in chance.sample((True, False), 2):
                cell = _cell(nodes, sweep, setting, repeat, -1, probes=probes).cell
                rates[probes] = cell.images / cell.wall_s
            ratios.append(rates[True] / rates[False])
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        found[setting.describe()] = {"ratio": statistics.fmean(ratios), "standard_error": error}
    return found


def _clocks_s() -> float:
    """Return the seconds that a request's timers take."""
    began_s = time.perf_counter()
    for _ in range(10_000):
        time.perf_counter()
        time.thread_time()
    return (time.perf_counter() - began_s) / 20_000 * CLOCKS


class _Counting(PartyMeter):
    """The meter, which also reads the leases' own counters at the same moments."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[dict[str, Path]] = []
        self.memory_ratios: list[float] = []
        self._parties_s = self._cgroups_s = self._before_s = 0.0

    def begin(self, parties: Mapping[str, tuple[int, ...]]) -> None:
        super().begin(parties)
        self._before_s = sum(map(_counter, self.groups))

    def end(self) -> CellUse:
        after_s = sum(map(_counter, self.groups))
        use = super().end()
        if use.parties:
            self._cgroups_s += after_s - self._before_s
            self._parties_s += sum(use.parties[name].cpu_s for name in ("app", "server") if name in use.parties)
        return use

    def note_memory(self) -> None:
        """Compare the memory of every process of each lease with its group's counters."""
        for group in self.groups:
            if "memory" in group or "unified" in group:
                folder = group.get("memory") or group["unified"]
                pids = [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
                counted = _table(folder / "memory.stat")
                whole = counted.get("total_rss", counted.get("anon", 0)) + counted.get("total_shmem", counted.get("shmem", 0))
                if pids and whole:
                    self.memory_ratios.append(sum(map(_memory_bytes, pids)) / whole)

    def cpu_ratio(self) -> float | None:
        """Return the parties' CPU over the groups', all cells together."""
        return self._parties_s / self._cgroups_s if self._cgroups_s else None


def _counter(group: Mapping[str, Path]) -> float:
    """Return a group's CPU seconds; 0 without one."""
    if "cpuacct" in group:
        return int((group["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
    return _table(group["unified"] / "cpu.stat").get("usage_usec", 0) / 1e6 if "unified" in group else 0.0


def _table(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}


def _memory_bytes(pid: int) -> float:
    """Return a process's anonymous memory and its part of what it shares."""
    sampler = ProcessSampler(pid)
    usage = sampler.sample()
    sampler.close()
    mapped, own = shared_memory_bytes(pid)
    return usage.memory_bytes - mapped + own if usage else 0.0
