"""Policies tried on a trace: one run per policy and seed, kept in a folder so that a broken replay goes on where it was.

    trace, nodes ──► run per (policy, seed) ──► cells/POLICY-SEED.json ──► report.html, report.json

With time (`simulator`): jobs come when the trace says, wait, run, renew or give way, end. Placement alone (`replay_fill`): jobs
come one by one and stay. A finished run is not made again as long as trace, nodes, settings and code are what they were.
Not here: what a run counts (`replay_figures`), the page (`replay_report`).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tenure
from tenure import decide
from tenure.decide.queueing import ORDERS
from tenure.decide.rules import RULES
from tenure.errors import Conflict, SpecError
from tenure.experiments.replay_figures import MAX_POINTS, of_outcome
from tenure.experiments.replay_fill import fill_fleet
from tenure.experiments.replay_trace import LoadedTrace
from tenure.experiments.simulator import Policy, simulate
from tenure.nodes import Node

if TYPE_CHECKING:
    from tenure.experiments.context import Display

MAX_SEEDS = 1_000
LEFT_OUT = 0.1
"""Share of the jobs that every seed after 0 leaves out, so that the spread says what a few jobs more or less would change."""
_BEFORE = "cells"
Tell = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Tried:
    """One policy to try."""

    label: str
    """As the user wrote it."""
    order: str
    placement: str

    def means(self, *, fill: bool) -> str:
        """Say it in words. fill: nobody waits, so the order plays no part."""
        node = RULES[self.placement].means
        return node if fill else f"queue: {ORDERS[self.order].means}; node: {node}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What is to be replayed."""

    trace: LoadedTrace
    fleet: tuple[Node, ...]
    fleet_name: str = "fleet"
    policies: tuple[Tried, ...]
    seeds: int = 1
    fill_percent: float | None = None
    """Placement alone, until so much of the fleet has been asked for; None: with time."""
    slot_s: float = 3600.0
    restart_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MAX_SEEDS:
            raise SpecError(f"--seeds must lie between 1 and {MAX_SEEDS}; found {self.seeds}")
        if self.slot_s <= 0:
            raise SpecError(f"--slot must be above 0; found {self.slot_s:g} s")
        if self.fill_percent is None and not self.trace.timed:
            raise SpecError(
                f"{self.trace.name} does not say when jobs came and how long they took. Compare placements alone: --fill 130"
            )
        if not self.fleet:
            raise SpecError("there is no node to replay on; list some in a file and name it with --nodes")

    def settings(self) -> dict[str, Any]:
        """Return what changes a run besides trace and nodes."""
        return {"fill_percent": self.fill_percent, "slot_s": self.slot_s, "restart_s": self.restart_s}


def parse_policies(names: Sequence[str], *, fill: bool) -> tuple[Tried, ...]:
    """Return the policies by name, each once. Raises SpecError that lists the names there are."""
    found: dict[str, Tried] = {}
    for name in (text.strip() for text in names):
        order, _, placement = name.partition("+")
        if not placement:
            order, placement = (order, "tenure") if order in ORDERS else ("fifo", order)
        if order not in ORDERS or placement not in RULES:
            raise SpecError(
                f"no policy is called {name!r}. Orders of the queue: {', '.join(ORDERS)}. Placements: {', '.join(RULES)}. "
                "Both together: ORDER+PLACEMENT"
            )
        if fill and name not in RULES:
            raise SpecError(f"with --fill nobody waits, so only a placement can be tried: {', '.join(RULES)}; found {name!r}")
        found[name] = Tried(name, order, placement)
    return tuple(found.values())


def run_replay(replay: Replay, folder: Path, *, resume: bool, display: Display) -> dict[str, list[dict[str, Any]]]:
    """Make the runs that the folder does not hold; return the results by policy, in the order of seeds.

    Raises Conflict when the folder holds runs and `resume` is not asked for.
    """
    cells = folder / _BEFORE
    if not resume and any(cells.glob("*.json")):
        raise Conflict(f"{folder} holds finished runs of a replay. Go on with them (--resume), or name another folder (--out)")
    cells.mkdir(parents=True, exist_ok=True)
    key = _key(replay)
    stale: set[str] = set()
    results: dict[str, list[dict[str, Any]]] = {}
    total, done = len(replay.policies) * replay.seeds, 0
    try:
        for seed in range(replay.seeds):
            for tried in replay.policies:
                path = cells / f"{_file_name(tried.label)}-{seed}.json"
                found, changed = _kept(path, key)
                stale |= changed
                step = f"{tried.label}, seed {seed}"
                if found is None:
                    display.stage_started("replay", step, f"run {done + 1} of {total}")
                    _write(path, {"key": key, "result": _run(replay, tried, seed, _teller(display, done, total))})
                    found = json.loads(path.read_text(encoding="utf-8"))["result"]  # as when it is read again
                    display.step_done("replay", step, found["line"])
                done += 1
                results.setdefault(tried.label, []).append(found)
    except KeyboardInterrupt:
        display.warn(f"{done} of {total} runs are done and kept in {folder}; the same command with --resume goes on")
        raise
    if stale:
        display.warn(f"{' and '.join(sorted(stale))} changed since runs in {folder} were made; those were made again")
    return results


def _run(replay: Replay, tried: Tried, seed: int, tell: Tell) -> dict[str, Any]:
    if replay.fill_percent is not None:
        return fill_fleet(replay.trace, replay.fleet, RULES[tried.placement], replay.fill_percent, seed=seed, tell=tell)
    jobs = replay.trace.jobs
    if seed:
        rng = random.Random(seed)
        jobs = tuple(job for job in jobs if rng.random() >= LEFT_OUT) or jobs
    policy = Policy(order=tried.order, placement=tried.placement, slot_s=replay.slot_s, restart_s=replay.restart_s)

    def progress(now_s: float, finished: int, count: int) -> None:
        tell(f"{finished:,} of {count:,} jobs have ended, day {now_s / 86400:.1f}", finished / count)

    span_s = jobs[-1].submit_s + max(job.duration_s for job in jobs)
    each_s = min(replay.slot_s, span_s / MAX_POINTS)
    return of_outcome(simulate(jobs, replay.fleet, policy, seed=seed, sample_each_s=each_s, progress=progress))


def _teller(display: Display, done: int, total: int) -> Tell:
    return lambda text, share: display.progress(f"{text}; run {done + 1} of {total}", share)


def _key(replay: Replay) -> dict[str, str]:
    fleet = "\n".join(f"{node.name} {node.capacity!r}" for node in replay.fleet)
    settings = json.dumps(replay.settings(), sort_keys=True)
    return {
        "the trace": replay.trace.digest(),
        "the nodes": hashlib.sha256(fleet.encode()).hexdigest(),
        "the settings": hashlib.sha256(settings.encode()).hexdigest(),
        "Tenure's code": code_digest(),
    }


def code_digest() -> str:
    """Return a hash of the code that decides what a replay gives: the deciders, the simulator, the counting."""
    here = Path(__file__).parent
    files = [*Path(decide.__file__).parent.glob("*.py"), here / "simulator.py", *here.glob("replay*.py")]
    digest = hashlib.sha256(tenure.__version__.encode())
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _kept(path: Path, key: Mapping[str, str]) -> tuple[dict[str, Any] | None, set[str]]:
    """Return the result that a file holds, None when there is none of use, and what has changed since it was made."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        changed = {name for name, value in key.items() if held["key"].get(name) != value}
        return (None, changed) if changed else (held["result"], set())
    except FileNotFoundError:
        return None, set()
    except (ValueError, KeyError, TypeError, AttributeError):  # cut short by a crash or edited: made again
        return None, {path.name}


def _write(path: Path, held: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(held, sort_keys=True, allow_nan=False), encoding="utf-8")
    temporary.replace(path)


def _file_name(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", label.lower())


def limited(replay: Replay, count: int) -> Replay:
    """Return the replay of the first jobs only; 0: all."""
    return replace(replay, trace=replay.trace.first(count))
