"""Whether a lease is granted once and holds what it says: random operations on the broker's own grant code, and an oracle.

World: the whole `tenure.broker.daemon.Broker` (book, queue, attempts, nodes, handlers, invocations, placement) on an SQLite
ledger, four imagined nodes (`trust_agents`), a virtual clock. Nodes: CPUs, memory and disk of different sizes; two devices of
one model; two of different models and sizes; none. Fresh worlds of 20,000 operations, the seed counted up, over all cores but
at most 2 processes.
Operations, by weight, drawn from the seed: request a gang of 1 to 4 (CPU, memory, disk, fractions of a device with its memory,
whole devices; some wait for events), the same request once more, end an attempt (every ExitKind), publish an event, renew,
resize up and down, release, preempt, let time pass (up to past slots, totals and queue times), cut a node off (shorter and
longer than its term) and mend it, kill an agent, set the wall clock by up to a day, kill the broker at any point of its work
and start the next from the ledger. All the while 1 in 30 calls is lost, late, or done and its answer lost; so with notes.
Oracle (`trust_oracle`): after every operation it counts again from what the agents hold, reachable or not, together with
what is granted and not started: CPUs, memory, disk, and per device shares and memory. It also checks: an ended lease runs
nowhere; one attempt per lease; gangs whole or not at all; fences only grow; deadlines on CLOCK_BOOTTIME are what grant, slots
and renewals make them, whatever the wall clock does, never past the total; states change as `LEGAL_CHANGES` says; the
broker's fold equals the one rebuilt from the ledger's events (every 50 operations and at each world's end).
Value: violations of any kind in 1,000,000 operations (--quick: 24,000). Bar: 0. Operations count whether granted or refused.
Control: fractions of devices summed over devices, put in place of the broker's choice: the oracle must find over-grants.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from tests.broker.conftest import die

from benchmarks.harness import Control, Options, Result, judge
from benchmarks.trust_agents import Agents, VirtualClock
from benchmarks.trust_oracle import Oracle
from tenure import wire
from tenure.broker.daemon import Broker
from tenure.decide import packing
from tenure.errors import IllegalChange, TenureError
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, LeaseState
from tenure.ledger.store import Ledger
from tenure.nodes import Machine, Node
from tenure.protocols import Exit, ExitKind
from tenure.resources import Capacity, DeviceShare, Envelope, Gpu

NAME = "lease_trust"
BAR = "0 over-grants in 1,000,000 random operations"
OPERATIONS = 1_000_000
QUICK_OPERATIONS = 24_000
WORLD_OPERATIONS = 20_000
QUICK_WORLD_OPERATIONS = 6_000
CONTROL_OPERATIONS = 1_000
FAULTS = 1 / 30
TERM_S = 60.0
COMPARE_EVERY = 50
MIB, GIB = 1 << 20, 1 << 30


def _node(name: str, cpus: float, memory_gib: int, disk_gib: int, *gpus: Gpu) -> Node:
    capacity = Capacity(cpus=cpus, memory_bytes=memory_gib * GIB, disk_bytes=disk_gib * GIB, gpus=gpus)
    return Node(name=name, capacity=capacity, machine=Machine(cpu_model="imagined"))


NODES = (
    _node("a", 8.0, 16, 40, Gpu(index=0, model="X", memory_bytes=16 * GIB), Gpu(index=1, model="X", memory_bytes=16 * GIB)),
    _node("b", 4.0, 8, 20, Gpu(index=0, model="X", memory_bytes=16 * GIB), Gpu(index=1, model="Y", memory_bytes=8 * GIB)),
    _node("c", 2.0, 4, 8),
    _node("d", 6.0, 6, 0),
)


def run(options: Options) -> Result:
    """Run the worlds and the control, and report what the oracle found."""
    total, each = (QUICK_OPERATIONS, QUICK_WORLD_OPERATIONS) if options.quick else (OPERATIONS, WORLD_OPERATIONS)
    seeds = range(options.seed * 10_000, options.seed * 10_000 + total // each)
    processes = min(2, os.cpu_count() or 1)
    begun_s = time.perf_counter()
    # Spawned: a world must not share the parent's state, and the control patches its process for good.
    # Not concurrent.futures: with a bound on a child's tasks its pool stands still once all children are spent (Python 3.11).
    with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=8) as pool:
        found = []
        for one in pool.imap(partial(play, operations=each), seeds):
            found.append(one)
            said = one["violations"] or "trusted"
            print(f"world {one['seed']}: {each} operations in {one['cpu_s']:.0f} s of CPU; {said}", flush=True)
    wall_s = time.perf_counter() - begun_s
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        broken = pool.apply(play, (options.seed, CONTROL_OPERATIONS), {"summed": True})
    counts: Counter[str] = sum((Counter(one["counts"]) for one in found), Counter())
    violations: Counter[str] = sum((Counter(one["violations"]) for one in found), Counter())
    first = {kind: f"seed {one['seed']} {text}" for one in reversed(found) for kind, text in one["first"].items()}
    operations = sum(counts[name] for name in OPERATIONS_BY_WEIGHT)
    assert operations == total, f"{operations} operations were done, not {total}"
    assert counts["grants"] > total / 100, f"only {counts['grants']} leases were granted: the world does not try the broker"
    control = Control(
        name="fractions summed over devices",
        value=float(broken["violations"].get("over_grant", 0)),
        failed=broken["violations"].get("over_grant", 0) > 0,
        how=f"over-grants the oracle found in {CONTROL_OPERATIONS} operations: {broken['first'].get('over_grant', 'none')}",
    )
    holds, why = judge(not violations, control)
    if violations:
        why = f"{dict(violations)}; first: {first}"
    return Result(
        value=float(violations.total()),
        spread=0.0,
        unit="violations",
        holds=holds,
        why=why,
        control=control,
        details={
            "operations": operations,
            "operations_by_kind": {name: counts[name] for name in OPERATIONS_BY_WEIGHT},
            "grants": counts["grants"],
            "refusals": counts["refusals"],
            "broker_restarts": counts["kill_broker"],
            "nodes_lost": counts["nodes_lost"],
            "oracle_looks": counts["looks"],
            "worlds": len(found),
            "processes": processes,
            "wall_s": wall_s,
            "cpu_s": sum(one["cpu_s"] for one in found),
            "operations_per_s": operations / wall_s,
            "load_1min": os.getloadavg()[0],
        },
    )


def play(seed: int, operations: int, *, summed: bool = False) -> dict[str, Any]:
    """Play one world and return what happened as plain data. summed: with the control's choice of devices."""
    logging.disable(logging.CRITICAL)  # every fault here is logged by the broker, and meant
    if summed:
        packing._choose_fraction = choose_summed
    folder = Path(tempfile.mkdtemp(prefix="lease-trust-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    begun_s = time.process_time()
    try:
        world = World(folder, seed)
        asyncio.run(world.play(operations))
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(folder, ignore_errors=True)
    world.counts.update(grants=world.oracle.grants, looks=world.oracle.looks, nodes_lost=world.oracle.nodes_lost)
    return {
        "seed": seed,
        "counts": dict(world.counts),
        "violations": dict(world.oracle.violations),
        "first": dict(world.oracle.first),
        "cpu_s": time.process_time() - begun_s,
    }


def choose_summed(room: packing.Room, envelope: Envelope) -> tuple[DeviceShare, ...] | None:
    """Return a share of the first device as long as the sum over all devices has room: the mistake of the control."""
    taken = sum(fraction for fraction, _ in room.devices.values())
    if taken + envelope.gpus > len(room.capacity.gpus):
        return None
    return (DeviceShare(index=room.capacity.gpus[0].index, fraction=envelope.gpus, memory_bytes=envelope.gpu_memory_bytes),)


class World:
    """A broker over imagined nodes, driven at random. Every operation is a method of its own name."""

    def __init__(self, home: Path, seed: int, *, faults: float = FAULTS) -> None:
        self.home, self.rng, self.clock = home, random.Random(seed), VirtualClock()
        self.agents = Agents(NODES, self.clock, self.rng)
        self.agents.faults = faults
        self.counts: Counter[str] = Counter()
        self.oracle = Oracle(home / "ledger.sqlite", {node.name: node for node in NODES}, self.agents, self.clock)
        self._ids = self._gangs = 0
        self._asked: list[wire.RequestGang] = []
        self._events = 0
        self._open()

    def _new_id(self) -> str:
        self._ids += 1
        return f"l{self._ids}"

    def _open(self) -> None:
        self.ledger = Ledger.open(self.home / "ledger.sqlite", now_s=self.clock.utc_s)
        self.broker = Broker(
            self.ledger, self.agents, home=self.home, clock=self.clock, term_s=TERM_S, new_lease_id=self._new_id
        )

    async def play(self, operations: int) -> None:
        """Do so many operations, the oracle looking after each, then let everything end."""
        names, weights = list(OPERATIONS_BY_WEIGHT), list(OPERATIONS_BY_WEIGHT.values())
        await self.broker.nodes.reach_all()
        try:
            for number, name in enumerate(self.rng.choices(names, weights, k=operations)):
                self.counts[name] += 1
                with contextlib.suppress(TenureError):
                    await getattr(self, name)()
                if self.rng.random() < 0.8:
                    await self.settle()
                self.oracle.look()
                if number % COMPARE_EVERY == 0:
                    await self.compare()
            await self.end()
        finally:
            await self.broker.close()
            self.ledger.close()
            self.oracle.close()

    async def settle(self) -> None:
        """Let the broker do what is due."""
        self.broker.tick()
        await self.broker.book.settle()

    async def compare(self) -> None:
        """Hold the broker's fold against the events."""
        await self.settle()
        self.oracle.look()
        up = frozenset(name for name in self.agents.names() if self.broker.nodes.is_up(name))
        self.oracle.compare(self.broker.book.placement, up)

    async def end(self) -> None:
        """Mend everything, release everything: no lease may stay, and nothing may run."""
        self.agents.faults = 0.0
        for name in self.agents.names():
            self.agents.mend(name)
        for _ in range(200):
            await self.ask("release", lease_ids=tuple(lease.id for lease in self.oracle.live()))
            await self._after(2.0)
            await self.settle()
            self.oracle.look()
            if not self.oracle.live() and not any(self.agents.running.values()):
                break
        else:
            left = [f"{lease.id} {lease.state}" for lease in self.oracle.live()][:5]
            self.oracle.say("never_ends", f"released for 400 s and still there: {left}, {self.agents.running}")
        await self.compare()

    async def ask(self, op: str, **args: Any) -> Any:
        """Ask what a client may ask; a refusal is counted and passed on."""
        try:
            return await getattr(self.broker.handlers, f"op_{op}")(wire.BROKER_OPS[op].args(**args), None)
        except TenureError:
            self.counts["refusals"] += 1
            raise

    # --- choices ---

    def _envelope(self) -> Envelope:
        rng = self.rng
        gpus = rng.choice((0.0, 0.0, 0.0, 0.25, 0.5, 0.6, 0.3, 1.0, 2.0))
        slot_s = rng.choice((10.0, 30.0, 100.0, 300.0))
        return Envelope(
            cpus=rng.choice((0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0)),
            memory_bytes=rng.choice((64, 300, 512, 1024, 2048, 5000)) * MIB,
            disk_bytes=rng.choice((1, 1, 2, 5)) * GIB,
            gpus=gpus,
            gpu_memory_bytes=rng.choice((0, 1, 4, 7, 12)) * GIB if gpus else 0,
            slot_s=slot_s,
            total_s=slot_s * rng.choice((1.0, 2.0, 5.0)),
        )

    def _lease(self, *states: LeaseState) -> Lease | None:
        found = [lease for lease in self.oracle.live() if not states or lease.state in states]
        return self.rng.choice(found) if found else None

    async def _after(self, seconds: float) -> None:
        end_s = self.clock.now_s + seconds
        while self.clock.now_s < end_s:
            # A write takes no seconds here: the oracle reads off the clock when something was decided.
            with contextlib.suppress(TenureError):
                await self.broker.book.durable()
            self.oracle.look()
            self.clock.now_s = min(end_s, self.clock.now_s + self.rng.choice((1.0, 3.0, 7.0)))
            self.agents.pass_time()
            await self.settle()
            self.oracle.look()

    # --- operations ---

    async def request(self) -> None:
        """Ask for a gang."""
        self._gangs += 1
        same, first = self.rng.random() < 0.5, self._envelope()
        on_event = self.rng.random() < 0.15
        command = Command(
            argv=("work",), on_event=on_event, expects_result=on_event, grace_s=self.rng.choice((0.0, 2.0, 5.0, 30.0))
        )
        members = tuple(
            wire.GangMember(worker=worker, envelope=first if same else self._envelope(), command=command)
            for worker in range(self.rng.choice((1, 1, 1, 2, 2, 3, 4)))
        )
        asked = wire.RequestGang(
            gang_id=f"g{self._gangs}",
            run_id=f"r{self.rng.randrange(6)}",
            stage=f"e{self._gangs}" if on_event else f"s{self.rng.randrange(3)}",
            members=members,
            queue_s=self.rng.choice((0.0, 5.0, 30.0, 120.0)),
        )
        self._asked = [*self._asked[-9:], asked]
        await self._request(asked)

    async def request_again(self) -> None:
        """Ask for one of the last gangs once more: the same leases, nothing new."""
        if self._asked:
            await self._request(self.rng.choice(self._asked))

    async def _request(self, asked: wire.RequestGang) -> None:
        try:
            leases = await self.broker.handlers.op_request_gang(asked, None)
        except TenureError:
            self.counts["refusals"] += 1
            return
        if {lease.gang_id for lease in leases} != {asked.gang_id} or len(leases) != len(asked.members):
            self.oracle.say("not_idempotent", f"gang {asked.gang_id} has {len(leases)} leases, not {len(asked.members)}")

    async def finish(self) -> None:
        """An attempt ends by itself."""
        running = [(node, lease_id) for node, leases in self.agents.running.items() for lease_id in leases]
        if not running:
            return
        node, lease_id = self.rng.choice(running)
        kind = self.rng.choice((*ExitKind, ExitKind.COMPLETED, ExitKind.COMPLETED))
        result = self.rng.choice((None, {"state": "done"}, {"state": "continue"}))
        code = 3 if kind is ExitKind.FAILED else 0
        self.agents.end(lease_id, Exit(kind=kind, code=code, result=result, ended_at_s=self.clock.utc_s()), node=node)

    async def publish(self) -> None:
        """An event for a lease that waits for them."""
        waiting = [lease for lease in self.oracle.live() if lease.command.on_event and lease.state is LeaseState.ACTIVE]
        if waiting:
            lease = self.rng.choice(waiting)
            self._events += 1
            folder = self.home / "runs" / lease.run_id / lease.stage / "store" / "events"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"x{self._events}.json").write_text(f'{{"worker": {lease.worker}}}')
            await self.ask("nudge", run_id=lease.run_id, stage=lease.stage)

    async def renew(self) -> None:
        """Move a slot's end."""
        lease = self._lease(LeaseState.ACTIVE, LeaseState.GRANTING)
        if lease is not None:
            self.oracle.look()
            for_s = self.rng.choice((5.0, 50.0, 500.0))
            self.oracle.renewal_asked(lease.id, for_s)
            try:
                await self.ask("renew", lease_id=lease.id, for_s=for_s)
            except IllegalChange:  # any other comes from the node, when it was written down already
                self.oracle.renewal_refused(lease.id)
                raise

    async def resize(self) -> None:
        """Change a lease's bounds."""
        lease = self._lease(LeaseState.ACTIVE)
        if lease is not None:
            other = self._envelope()
            changed = {"gpus": lease.envelope.gpus, "gpu_memory_bytes": lease.envelope.gpu_memory_bytes}
            fields = {name: getattr(other, name) for name in ("cpus", "memory_bytes", "disk_bytes", "slot_s", "total_s")}
            await self.ask("resize", lease_id=lease.id, envelope=Envelope(**fields, **changed))

    async def release(self) -> None:
        """Give a lease back."""
        if (lease := self._lease()) is not None:
            await self.ask("release", lease_ids=(lease.id,))

    async def preempt(self) -> None:
        """Take a gang back."""
        if (lease := self._lease()) is not None:
            gang = tuple(other.id for other in self.oracle.live() if other.gang_id == lease.gang_id)
            await self.ask("release", lease_ids=gang, reason=EndReason.PREEMPTED, why="for the test")

    async def pass_moment(self) -> None:
        """A short time goes by; what is late arrives."""
        self.agents.deliver()
        await self._after(self.rng.choice((0.5, 1.0, 2.0)))

    async def pass_while(self) -> None:
        """A longer time goes by: slots end, queues are given up."""
        await self._after(self.rng.choice((6.0, 20.0, 40.0)))

    async def cut_node(self) -> None:
        """A node can't be reached for a while, shorter or longer than its term."""
        name = self.rng.choice(self.agents.names())
        self.agents.cut(name)
        if self.rng.random() < 0.5:
            await self._after(self.rng.choice((2.0, 30.0, 55.0, 70.0, 90.0)))
            self.agents.mend(name)

    async def mend_node(self) -> None:
        """A node that was cut off is back."""
        if self.agents.cut_off:
            self.agents.mend(self.rng.choice(sorted(self.agents.cut_off)))

    async def kill_agent(self) -> None:
        """An agent dies, its shims live on; the next is there at once."""
        self.agents.short_cut(self.rng.choice(self.agents.names()))

    async def set_clock(self) -> None:
        """Somebody sets the wall clock."""
        self.clock.offset_s += self.rng.choice((-86400.0, -3600.0, -30.0, 30.0, 3600.0, 86400.0))

    async def kill_broker(self) -> None:
        """The broker dies, somewhere in its work or at rest, and the next one takes over."""
        if self.rng.random() < 0.7:
            work: list[Callable[[], Coroutine[Any, Any, None]]] = [self.request, self.release, self.renew, self.resize]
            task = asyncio.ensure_future(self.rng.choice(work)())
            for _ in range(self.rng.randrange(8)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.agents.broker_died()
        await die(self.broker)
        self.oracle.broker_died()
        self._open()
        if self.rng.random() < 0.8:
            await self.broker.nodes.reach_all()


OPERATIONS_BY_WEIGHT = {
    "request": 24.0,
    "request_again": 3.0,
    "finish": 18.0,
    "publish": 4.0,
    "renew": 9.0,
    "resize": 9.0,
    "release": 7.0,
    "preempt": 2.0,
    "pass_moment": 18.0,
    "pass_while": 1.0,
    "cut_node": 0.3,
    "mend_node": 0.6,
    "kill_agent": 0.7,
    "set_clock": 0.5,
    "kill_broker": 0.2,
}
"""Operation -> weight in the draw."""
