"""A replay from what a user names to the report it leaves: loads, runs, compares, writes. Each part is a module of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tenure.experiments.replay import Replay, Tried, limited, parse_policies, run_replay
from tenure.experiments.replay_nodes import load_nodes
from tenure.experiments.replay_report import build_replay_report
from tenure.experiments.replay_trace import load_trace, of_leases
from tenure.experiments.report import write_pages
from tenure.leases import Lease
from tenure.nodes import Node

__all__ = ["MAX_LEASES", "Replayed", "parse_policies", "prepare", "replay"]

if TYPE_CHECKING:
    from tenure.experiments.context import Display

MAX_LEASES = 4_000
"""Of a ledger's history, the newest: the broker's answer must fit one line of its socket (`wire.MAX_LINE_BYTES`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a replay left."""

    answer: str
    """Which policy, by how much, on what evidence."""
    html: Path
    json: Path
    runs: int


def prepare(
    trace: Path | Sequence[Lease],
    nodes: Path | Sequence[Node],
    policies: Sequence[Tried],
    *,
    seeds: int,
    fill_percent: float | None,
    slot_s: float,
    restart_s: float,
    limit: int,
) -> Replay:
    """Return the replay that was asked for. Raises SpecError and NotFound for what is wrong in it, before anything is run."""
    fleet = load_nodes(nodes) if isinstance(nodes, Path) else tuple(nodes)
    largest = max((len(node.capacity.gpus) for node in fleet), default=0)
    loaded = (
        load_trace(trace, largest_gpus=largest, timeless=fill_percent is not None)
        if isinstance(trace, Path)
        else of_leases(trace, max_leases=MAX_LEASES)
    )
    asked = Replay(
        trace=loaded,
        fleet=fleet,
        fleet_name=nodes.name if isinstance(nodes, Path) else "the present fleet",
        policies=tuple(policies),
        seeds=seeds,
        fill_percent=fill_percent,
        slot_s=slot_s,
        restart_s=restart_s,
    )
    return limited(asked, limit)


def replay(asked: Replay, folder: Path, *, resume: bool, display: Display) -> Replayed:
    """Make the runs, write the report, return where it is. Raises Conflict when the folder holds runs of before."""
    folder = folder.expanduser().absolute()
    report = build_replay_report(asked, run_replay(asked, folder, resume=resume, display=display))
    html, json = write_pages(report, folder)
    return Replayed(answer=report["header"]["outcome"], html=html, json=json, runs=len(asked.policies) * asked.seeds)
