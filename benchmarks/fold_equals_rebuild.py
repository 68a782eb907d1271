"""Whether the folded placement state is, at every checked moment, the one that its events rebuild.

Input: a random history of a fleet (30 nodes with 0 to 8 GPUs of three models; nodes drained, lost and back) and its leases:
requests alone and in gangs, grants as the plan says, invocations, renewals, resizes, ends; drawn from the seed. At least
1,000,000 events (--quick: 20,000) in parts of 10,000, each a history of its own drawn from (seed, part), so that a run can go
on where it stopped: parts that are done are kept beside the results, with a digest of the deciders' source, and not run again.
Checked in each part, every 1,000 events: the fold equals (`==`) one rebuilt from the part's events so far, and both give the
same plan; `Rooms`, which followed the same grants and ends, is as one filled anew with what is held, in another order, and both
choose the same nodes and devices for ten requests. Value: events whose state was compared without a difference.
Bar: >= 1,000,000 events, no difference.
Control: one event dropped, in a part of its own, drawn from the last ones of each lease: must be noticed at the part's end.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.harness import ROOT, Control, Options, Result, judge
from tenure.decide.mix import Mix
from tenure.decide.placement import Placement
from tenure.decide.rooms import Rooms
from tenure.decide.shapes import shape_of
from tenure.events import Event
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState, changed, granted, renewed
from tenure.nodes import Machine, Node
from tenure.resources import Capacity, Envelope, Gpu

NAME = "fold_equals_rebuild"
BAR = "the folded placement state equals the rebuilt one over 1,000,000 events; one event dropped is noticed"
EVENTS, QUICK_EVENTS = 1_000_000, 20_000
PART, CHECK_EACH = 10_000, 1_000
NODES, MAX_LIVE = 30, 150
GIB = 1 << 30
KEPT = ROOT / "benchmarks" / "results"


def run(options: Options) -> Result:
    """Run the parts that are not done yet, then the control."""
    wanted = (QUICK_EVENTS if options.quick else EVENTS) // PART
    kept = KEPT / f"{NAME}-parts-{options.seed}.json"
    digest = _digest()
    done: dict[str, int] = {}
    if kept.exists() and (record := json.loads(kept.read_text()))["deciders"] == digest:
        done = record["parts"]
    resumed = sum(str(part) in done for part in range(wanted))
    for part in range(wanted):
        if str(part) not in done:
            done[str(part)] = History(options.seed, part).played()
            KEPT.mkdir(exist_ok=True)
            kept.write_text(json.dumps({"deciders": digest, "parts": done}))
            print(f"part {part + 1} of {wanted}: {done[str(part)]:,} events compared", flush=True)
    value = sum(done[str(part)] for part in range(wanted))
    noticed = dropped_event_noticed(options.seed)
    control = Control(name="one event dropped", value=None, failed=noticed, how="the rebuilt fold differs")
    holds, why = judge(value >= wanted * PART, control)
    return Result(
        value=value,
        spread=None,
        unit="events compared",
        holds=holds,
        why=why,
        control=control,
        details={"parts": wanted, "parts_kept_from_before": resumed},
    )


def dropped_event_noticed(seed: int) -> bool:
    """Return whether a fold rebuilt without one event differs from the one that saw all."""
    history = History(seed, -1)
    history.played()
    last = {event.data["lease"].id: number for number, event in enumerate(history.events) if "lease" in event.data}
    dropped = random.Random(seed).choice(sorted(last.values()))
    return _rebuilt(history.events[:dropped] + history.events[dropped + 1 :]) != history.fold


class History:
    """One part: a fleet, its leases, and the folds that follow them."""

    def __init__(self, seed: int, part: int) -> None:
        self.rng = random.Random(f"{seed} {part}")
        self.fold, self.events = Placement(), list[Event]()
        self.leases: dict[str, Lease] = {}  # those that have not ended
        self.nodes = {f"n{number:02}": self._node(f"n{number:02}") for number in range(NODES)}
        self.down: set[str] = set()
        self.mix = Mix({shape_of(self._envelope()): 1 for _ in range(30)})
        self.rooms = Rooms({name: node.capacity for name, node in self.nodes.items()}, self.mix)
        self.now_s, self.number = 0.0, 0
        for name in self.nodes:
            self._up(name)

    def played(self) -> int:
        """Play the part; return how many events were compared. AssertionError at the first difference."""
        actions: list[tuple[Callable[[], None], int]] = [
            *((self._request, 30), (self._grant, 12), (self._end, 24), (self._renew, 20), (self._resize, 8)),
            *((self._invoke, 10), (self._node_changes, 1)),
        ]
        compared = 0
        while compared < PART:
            (action,) = self.rng.choices([one for one, _ in actions], [often for _, often in actions])
            self.now_s += 1.0
            action()
            if len(self.events) >= compared + CHECK_EACH:
                self._compare()
                compared = len(self.events)
        return compared

    def _compare(self) -> None:
        rebuilt = _rebuilt(self.events)
        where = f"after {len(self.events):,} events"
        assert rebuilt == self.fold, f"{where} the rebuilt fold differs"
        assert rebuilt.plan(self.now_s) == self.fold.plan(self.now_s), f"{where} the rebuilt fold plans otherwise"
        anew = Rooms({name: node.capacity for name, node in self.nodes.items()}, self.mix)
        held = [lease for lease in self.leases.values() if lease.holds]
        self.rng.shuffle(held)
        for lease in held:
            anew.take(lease.node, lease.envelope, lease.devices)
        assert anew.snapshot() == self.rooms.snapshot(), f"{where} rooms filled anew differ"
        for _ in range(10):
            asked = self._envelope()
            assert anew.choose(asked) == self.rooms.choose(asked), f"{where} rooms filled anew choose otherwise for {asked}"

    # --- what happens ---

    def _request(self) -> None:
        if len(self.leases) >= MAX_LIVE:
            return self._end()
        self.number += 1
        gang = f"g{self.number}" if self.rng.random() < 0.2 else ""
        for worker in range(self.rng.randint(2, 4) if gang else 1):
            lease = Lease(
                id=f"l{self.number}-{worker}",
                run_id=f"r{self.number % 50}",
                stage="s",
                worker=worker,
                gang_id=gang,
                envelope=self._envelope(),
                command=Command(argv=("true",)),
                requested_at_s=self.now_s,
            )
            self._put(lease)
        return None

    def _grant(self) -> None:
        for grant in self.fold.plan(self.now_s).grants:
            lease = granted(
                self.leases[grant.lease_id], node=grant.node, devices=grant.devices, fence=self.number, now_s=self.now_s
            )
            self._put(lease)
            self._put(changed(lease, LeaseState.ACTIVE))

    def _end(self) -> None:
        if self.leases:
            self._put_ended(self._any(lambda lease: True), EndReason.COMPLETED)

    def _renew(self) -> None:
        if lease := self._any(lambda lease: lease.state is LeaseState.ACTIVE and lease.total_ends_at_s > self.now_s):
            self._put(renewed(lease, for_s=600.0, now_s=self.now_s), kind="lease.renewed")

    def _resize(self) -> None:
        if lease := self._any(lambda lease: lease.state is LeaseState.ACTIVE):
            cpus = self.rng.choice([0.1, 0.3, 1.0, 2.0, 4.0])
            envelope = replace(lease.envelope, cpus=cpus)
            if not self.fold.resize_shortage(lease.id, envelope):
                lease = changed(lease, LeaseState.RESIZING, envelope=envelope)
                self._put(lease)
                self._put(changed(lease, LeaseState.ACTIVE))

    def _invoke(self) -> None:
        if lease := self._any(lambda lease: lease.state is LeaseState.ACTIVE):
            self._put(replace(lease, attempt=lease.attempt + 1), kind="invoked")

    def _node_changes(self) -> None:
        name = self.rng.choice(sorted(self.nodes))
        if name in self.down:
            self._up(name)
            return
        kind = self.rng.choice(["node.draining", "node.unreachable", "node.lost"])
        self.down.add(name)
        self._hear(kind, name)
        if kind == "node.lost":
            for lease in [lease for lease in self.leases.values() if lease.node == name and lease.holds]:
                self._put_ended(lease, EndReason.NODE_LOST)

    # --- how it is told ---

    def _up(self, name: str) -> None:
        self.down.discard(name)
        self._hear("node.up", name, {"node": self.nodes[name]})

    def _put(self, lease: Lease, *, kind: str = "") -> None:
        before = self.leases.pop(lease.id, None)
        if before is not None and before.holds:
            self.rooms.give(before.node, before.envelope, before.devices)
        if lease.holds:
            self.rooms.take(lease.node, lease.envelope, lease.devices)
        if lease.state is not LeaseState.ENDED:
            self.leases[lease.id] = lease
        self._hear(kind or f"lease.{lease.state}", lease.node, {"lease": lease})

    def _put_ended(self, lease: Lease | None, reason: EndReason) -> None:
        if lease is not None:
            self._put(changed(lease, LeaseState.ENDED, end_reason=reason, ended_at_s=self.now_s))

    def _hear(self, kind: str, node: str, data: dict[str, Any] | None = None) -> None:
        event = Event(seq=len(self.events) + 1, at_s=self.now_s, kind=kind, who="broker", node=node, data=data or {})
        self.events.append(event)
        self.fold.apply(event)

    def _any(self, wanted: Callable[[Lease], bool]) -> Lease | None:
        found = [lease for lease in self.leases.values() if wanted(lease)]
        return self.rng.choice(found) if found else None

    def _envelope(self) -> Envelope:
        gpus = self.rng.choice([0.0, 0.0, 0.1, 0.3, 0.5, 0.7, 0.81, 1.0, 1.0, 2.0, 4.0])
        return Envelope(
            cpus=self.rng.choice([0.1, 0.3, 1.0, 1.7, 4.0]),
            memory_bytes=self.rng.choice([1, 3, 16]) * GIB,
            gpus=gpus,
            gpu_memory_bytes=self.rng.choice([0, 0, 4 * GIB]) if gpus else 0,
            total_s=1e6,
        )

    def _node(self, name: str) -> Node:
        model = self.rng.choice(["A", "B", "C"])
        gpus = tuple(Gpu(index=i, model=model, memory_bytes=16 * GIB) for i in range(self.rng.choice([0, 1, 2, 4, 8])))
        cpus, memory_gib = self.rng.choice([4, 8, 32]), self.rng.choice([16, 64, 128])
        capacity = Capacity(cpus=float(cpus), memory_bytes=memory_gib * GIB, disk_bytes=1000 * GIB, gpus=gpus)
        return Node(name=name, capacity=capacity, machine=Machine(cpu_model="none"))


def _rebuilt(events: list[Event]) -> Placement:
    fold = Placement()
    for event in events:
        fold.apply(event)
    return fold


def _digest() -> str:
    found = hashlib.sha256()
    for path in sorted((ROOT / "src" / "tenure" / "decide").glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()
