"""The oracle of `lease_trust`: counts again what was granted, from what imagined agents hold and from the ledger's events.

It never asks the broker's placement, nor its book. On a connection of its own it reads only what the ledger has committed.
Not for: making anything happen (`lease_trust`), or the agents themselves (`trust_agents`).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.trust_agents import Agents, VirtualClock
from tenure.decide.placement import Placement
from tenure.events import Event
from tenure.leases import HOLDING, LEGAL_CHANGES, Lease, LeaseState
from tenure.nodes import Node
from tenure.resources import DeviceShare, Envelope

EPSILON = 1e-6
"""Cores, shares of a device and seconds that rounding may overshoot."""
_WAITING = frozenset({LeaseState.REQUESTED, LeaseState.RESERVED, LeaseState.QUEUED})


class _Data(msgspec.Struct):
    lease: Lease | None = None
    node: Node | None = None


@dataclass(slots=True)
class _Known:
    lease: Lease
    granted_boot_s: float = 0.0
    ends_boot_s: float = 0.0
    """End of the slot on CLOCK_BOOTTIME as the oracle counts it, from grants, renewals and invocations."""
    renewed: tuple[float, float] = (0.0, 0.0)
    """When it was last renewed, and the end before: a start order on its way then says that one, and is put right at once."""
    asked: list[float] = field(default_factory=list)
    """Ends that renewals asked for, of which none is on disk yet, in order."""


@dataclass(slots=True)
class Oracle:
    """Looks after every step. `violations` counts by kind, `first` keeps the first of each kind in words."""

    path: Path
    nodes: Mapping[str, Node]
    agents: Agents
    clock: VirtualClock
    violations: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    grants: int = 0
    nodes_lost: int = 0
    looks: int = 0
    shadow: Placement = field(default_factory=Placement)
    _known: dict[str, _Known] = field(default_factory=dict)
    _gangs: dict[str, set[str]] = field(default_factory=dict)
    _held: dict[str, set[str]] = field(default_factory=dict)
    _fence: int = 0
    _seq: int = 0
    _decoder: msgspec.json.Decoder[_Data] = field(default_factory=lambda: msgspec.json.Decoder(_Data))
    _reader: sqlite3.Connection | None = None

    def close(self) -> None:
        """Let go of the ledger."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def say(self, kind: str, text: str) -> None:
        """Count a violation."""
        self.violations[kind] += 1
        self.first.setdefault(kind, f"at {self.clock.now_s:.1f} s: {text}")

    def live(self) -> list[Lease]:
        """Return the leases that have not ended, as the ledger has them."""
        return [known.lease for known in self._known.values()]

    def look(self) -> None:
        """Take in what was written and what was ordered since, and recount every node where something changed."""
        self.looks += 1
        touched = self._read()
        for op, lease_id, deadline_s in self.agents.orders:
            self._check_deadline(op, lease_id, deadline_s)
        self.agents.orders.clear()
        changed = self.agents.changed | touched
        self.agents.changed.clear()
        for node in changed:
            self._recount(node)

    # --- the ledger ---

    def events(self, after_seq: int) -> Iterable[tuple[Event, _Data]]:
        """Return committed events with their nouns."""
        if self._reader is None:
            self._reader = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        rows = self._reader.execute(
            "SELECT seq, kind, lease_id, node, data FROM events WHERE seq > ? ORDER BY seq", (after_seq,)
        )
        for seq, kind, lease_id, node, text in rows.fetchall():
            data = self._decoder.decode(text) if kind.startswith(("lease.", "node.", "invoked")) else _Data()
            nouns: dict[str, Any] = {name: noun for name, noun in (("lease", data.lease), ("node", data.node)) if noun}
            yield Event(seq=seq, at_s=0.0, kind=kind, who="", lease_id=lease_id, node=node, data=nouns), data

    def _read(self) -> set[str]:
        touched: set[str] = set()
        gangs: set[str] = set()
        for event, data in self.events(self._seq):
            self._seq = event.seq
            self.shadow.apply(event)
            self.nodes_lost += event.kind == "node.lost"
            if data.lease is not None:
                self._take(event.kind, data.lease)
                gangs.add(data.lease.gang_id)
                touched.add(data.lease.node)
        for gang in gangs:
            self._check_gang(gang)
        touched.discard("")
        return touched

    def _take(self, kind: str, lease: Lease) -> None:
        known = self._known.get(lease.id)
        now_s = self.clock.boot_s()
        if known is None:
            if lease.state is not LeaseState.REQUESTED:
                self.say("illegal_change", f"{lease.id} begins {lease.state}")
            known = self._known[lease.id] = _Known(lease)
            self._gangs.setdefault(lease.gang_id, set()).add(lease.id)
        before, known.lease = known.lease, lease
        if before.state is not lease.state and lease.state not in LEGAL_CHANGES[before.state]:
            self.say("illegal_change", f"{lease.id} went from {before.state} to {lease.state}")
        if lease.state is LeaseState.GRANTING and before.state in _WAITING:
            self.grants += 1
            known.granted_boot_s, known.ends_boot_s = now_s, now_s + lease.envelope.slot_s
            if lease.fence <= before.fence or lease.fence < self._fence:
                self.say("fence", f"{lease.id} was granted with fence {lease.fence}; before: {before.fence}, {self._fence}")
            self._fence = max(self._fence, lease.fence)
        elif lease.fence != before.fence:
            self.say("fence", f"{lease.id} changed its fence from {before.fence} to {lease.fence} without a grant")
        if kind == "lease.renewed":
            if known.asked:
                total_s = known.granted_boot_s + lease.envelope.total_s
                known.renewed = (now_s, known.ends_boot_s)
                known.ends_boot_s = min(max(known.ends_boot_s, known.asked.pop(0)), total_s)
            else:
                self.say("renewed_unasked", f"{lease.id} was renewed although nobody asked")
        if kind == "invoked":
            known.ends_boot_s = min(now_s + lease.envelope.slot_s, known.granted_boot_s + lease.envelope.total_s)
        if lease.state in HOLDING:
            if (before.total_ends_at_s and lease.total_ends_at_s != before.total_ends_at_s) or (
                lease.ends_at_s > lease.total_ends_at_s + EPSILON
            ):
                self.say("past_total", f"{lease.id} ends {lease.ends_at_s}, its total {lease.total_ends_at_s}")
            self._held.setdefault(lease.node, set()).add(lease.id)
        elif lease.state is LeaseState.ENDED:
            self._held.get(lease.node, set()).discard(lease.id)
            del self._known[lease.id]
            for node, running in self.agents.running.items():
                if lease.id in running:
                    self.say("runs_past_end", f"{lease.id} ended {lease.end_reason} ({lease.end_detail}) and runs on {node}")

    def renewal_asked(self, lease_id: str, for_s: float) -> None:
        """Note that a renewal is asked for; what counts is that it is written down, answered or not."""
        if (known := self._known.get(lease_id)) is not None:
            known.asked.append(self.clock.boot_s() + for_s)

    def renewal_refused(self, lease_id: str) -> None:
        """Note that the last one was refused before anything was written."""
        if (known := self._known.get(lease_id)) is not None and known.asked:
            known.asked.pop()

    def broker_died(self) -> None:
        """Take in what was on disk; what was asked for and is not was never promised."""
        self.look()
        for known in self._known.values():
            known.asked.clear()

    def _check_gang(self, gang: str) -> None:
        members = [self._known[name].lease for name in self._gangs.get(gang, ()) if name in self._known]
        if not members:
            self._gangs.pop(gang, None)
        states = {lease.state for lease in members}
        if states & _WAITING and states & HOLDING:
            self.say("gang_torn", f"gang {gang}: {sorted(states)}")
        fences = {lease.fence for lease in members if lease.state in HOLDING}
        if len(fences) > 1:
            self.say("gang_torn", f"gang {gang} was granted under fences {sorted(fences)}")

    def _check_deadline(self, op: str, lease_id: str, deadline_s: float) -> None:
        known = self._known.get(lease_id)
        if known is None:
            return  # it ended meanwhile; what may still run of it is counted elsewhere
        total_s = known.granted_boot_s + known.lease.envelope.total_s
        if deadline_s > total_s + EPSILON:
            self.say("past_total", f"{op} of {lease_id}: deadline {deadline_s}, its total is over at {total_s}")
        elif op == "start" and known.renewed[0] == self.clock.boot_s() and abs(deadline_s - known.renewed[1]) <= 1e-3:
            return
        elif abs(deadline_s - known.ends_boot_s) > 1e-3:
            self.say("deadline_moved", f"{op} of {lease_id}: deadline {deadline_s}, its slot is over at {known.ends_boot_s}")

    # --- the nodes ---

    def _recount(self, name: str) -> None:
        running = self.agents.running[name]
        parts: list[tuple[Envelope, Envelope, tuple[DeviceShare, ...]]] = []
        for lease_id, run in running.items():
            known = self._known.get(lease_id)
            if known is None or known.lease.state not in HOLDING or known.lease.node != name:
                self.say("runs_without_lease", f"{lease_id} attempt {run.spec.attempt} runs on {name}, which no lease covers")
                parts.append((run.envelope, run.envelope, run.spec.devices))
                continue
            if any(lease_id in other for node, other in self.agents.running.items() if node != name):
                self.say("two_attempts", f"{lease_id} runs on {name} and elsewhere")
            # What is promised and what its agent was told may differ while a resize is under way: both must have room.
            parts.append((run.envelope, known.lease.envelope, run.spec.devices))
        for lease_id in self._held.get(name, ()):
            if lease_id not in running:
                lease = self._known[lease_id].lease
                parts.append((lease.envelope, lease.envelope, lease.devices))
        self._weigh(name, parts)

    def _weigh(self, name: str, parts: list[tuple[Envelope, Envelope, tuple[DeviceShare, ...]]]) -> None:
        capacity = self.nodes[name].capacity
        cpus = sum(max(a.cpus, b.cpus) for a, b, _ in parts)
        memory = sum(max(a.memory_bytes, b.memory_bytes) for a, b, _ in parts)
        disk = sum(max(a.disk_bytes, b.disk_bytes) for a, b, _ in parts)
        if cpus > capacity.cpus + EPSILON:
            self.say("over_grant", f"{name}: {cpus} cpus of {capacity.cpus}")
        if memory > capacity.memory_bytes:
            self.say("over_grant", f"{name}: {memory} bytes of memory of {capacity.memory_bytes}")
        if capacity.disk_bytes and disk > capacity.disk_bytes:
            self.say("over_grant", f"{name}: {disk} bytes of disk of {capacity.disk_bytes}")
        for gpu in capacity.gpus:
            shares = [share for *_, devices in parts for share in devices if share.index == gpu.index]
            fraction = sum(share.fraction for share in shares)
            held = sum(share.memory_bytes for share in shares)
            if fraction > 1 + EPSILON or held > gpu.memory_bytes:
                self.say("over_grant", f"{name} gpu {gpu.index}: {fraction} of it, {held} bytes of {gpu.memory_bytes}")
        known = {gpu.index for gpu in capacity.gpus}
        for envelope, _, devices in parts:
            if any(share.index not in known for share in devices) or len({share.index for share in devices}) != len(devices):
                self.say("over_grant", f"{name}: shares {devices} of devices that it lacks, or twice of one")
            if round(sum(share.fraction for share in devices) - envelope.gpus, 6):
                self.say("devices_wrong", f"{name}: {envelope.gpus} gpus asked, {devices} given")

    # --- the fold ---

    def compare(self, placement: Placement, up: frozenset[str]) -> None:
        """Check the broker's fold against the one rebuilt from events. up: nodes this broker has reached."""
        mine, its = self.shadow.snapshot(), placement.snapshot()
        for part in ("waiting", "held"):
            if mine[part] != its[part]:
                odd = {k for k in mine[part] | its[part] if mine[part].get(k) != its[part].get(k)}
                self.say("fold_differs", f"{part}: {sorted(odd)[:3]}")
        for node in up:
            if mine["nodes"].get(node) != its["nodes"].get(node):
                self.say("fold_differs", f"node {node}")
