"""Imagined agents for `lease_trust`: they hold what they were ordered, and forget, lose and delay what real ones may.

For: a fleet whose agents keep terms, deadlines, fences and graces on a virtual clock as `tenure.agent` and its shims do, and
whose wire drops orders, answers and notes or brings them late. `running` is the truth that the oracle counts.
Not for: checking anything (`trust_oracle`), or choosing what happens (`lease_trust`).
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tenure import orders, wire
from tenure.errors import Conflict, TenureError, Unavailable
from tenure.fleet.fake import FakeFleet
from tenure.nodes import Node
from tenure.protocols import Exit, ExitKind, RuntimeHandle, StartSpec
from tenure.resources import Envelope

AGENT_GRACE_S = 5.0
"""What agents and shims give at most when a node's term ends."""


class VirtualClock:
    """Time that only the world moves; `utc_s` can be set like a wall clock, `boot_s` cannot."""

    def __init__(self) -> None:
        self.now_s = 100_000.0
        self.offset_s = 900_000.0

    def utc_s(self) -> float:
        """See protocols.Clock."""
        return self.now_s + self.offset_s

    def boot_s(self) -> float:
        """See protocols.Clock."""
        return self.now_s

    def boot_id(self) -> str:
        """See protocols.Clock."""
        return "boot"


@dataclass(slots=True)
class Running:
    """One attempt that is alive on a node, as its shim knows it."""

    spec: StartSpec
    envelope: Envelope
    deadline_boot_s: float
    ends_s: float = math.inf
    """When it will be gone: set by the first thing that ends it, moved forward only by a shorter grace."""
    kind: ExitKind = ExitKind.STOPPED


class Agents(FakeFleet):
    """A fleet on a virtual clock with a wire that fails. `faults` is the share of calls and notes that something happens to."""

    def __init__(self, nodes: Sequence[Node], clock: VirtualClock, rng: random.Random) -> None:
        super().__init__(nodes, clock)
        self._rng = rng
        self.faults = 0.0
        self.running: dict[str, dict[str, Running]] = {node.name: {} for node in nodes}
        """Node -> lease -> what is alive there, whether or not anybody can reach it."""
        self.changed: set[str] = {node.name for node in nodes}
        """Nodes where something began, ended or changed its bounds since the oracle looked."""
        self.term_ends_s = {node.name: 0.0 for node in nodes}
        self.orders: list[tuple[str, str, float]] = []
        """(operation, lease, deadline) of each start and renewal obeyed since the oracle looked."""
        self._session: dict[str, int] = {node.name: 0 for node in nodes}
        self._late: list[tuple[str, int, str, Any]] = []
        self._notes: list[tuple[str, int, orders.AttemptView]] = []

    # --- the wire ---

    async def reach(self, node: str, **fields: Any) -> tuple[Node, orders.BootTime]:
        """See Fleet. A new connection: what is still under way on an older one is refused when it arrives."""
        if node not in self.cut_off:
            self._session[node] += 1
            self._connected.discard(node)
        return await super().reach(node, **fields)

    async def call(self, node: str, op: str, args: Any, *, timeout_s: float = 10.0) -> Any:
        """See Fleet. Some calls never arrive, some arrive late, some are done and their answer is lost."""
        self.calls.clear()
        if self._rng.random() >= self.faults or node in self.cut_off or node not in self._connected:
            return await super().call(node, op, args, timeout_s=timeout_s)
        fate = self._rng.choice(("lost", "late", "unanswered", "slow"))
        if fate == "slow":
            return await super().call(node, op, args, timeout_s=timeout_s)
        if fate == "late":
            self._late.append((node, self._session[node], op, args))
        elif fate == "unanswered":
            await super().call(node, op, args, timeout_s=timeout_s)
        self._hang_up(node)  # as a real one does: what becomes of an unanswered order cannot be told
        raise Unavailable(f"node {node} did not answer {op}")

    def deliver(self) -> None:
        """Let what is late arrive: orders whose connection was replaced are refused, as agents refuse them."""
        late, self._late = self._late, []
        for node, session, op, args in late:
            if session == self._session[node]:
                with contextlib.suppress(TenureError):  # the answer goes nowhere, whatever it is
                    getattr(self, f"_{op}")(node, args)
        notes, self._notes = self._notes, []
        for node, session, view in notes:
            if session == self._session[node] and node in self._connected:
                self._on_attempt(node, view)

    def short_cut(self, node: str) -> None:
        """Break the connection; the node can be reached again at once (its agent may have been killed)."""
        self._hang_up(node)

    def broker_died(self) -> None:
        """Break every connection without telling anybody."""
        self._connected.clear()
        self._on_attempt, self._on_cut = (lambda node, view: None), (lambda node: None)

    def _hang_up(self, node: str) -> None:
        if node in self._connected:
            self._connected.discard(node)
            self._on_cut(node)

    # --- time ---

    def pass_time(self) -> None:
        """Have every node notice the time: terms and deadlines end what they bound, the told stop in time."""
        now_s = self._clock.boot_s()
        for node, attempts in self.running.items():
            term_s = self.term_ends_s[node]
            for lease_id, run in list(attempts.items()):
                if term_s <= now_s:
                    self._end_by(run, term_s, min(run.spec.grace_s, AGENT_GRACE_S), ExitKind.STOPPED)
                if run.deadline_boot_s <= now_s:
                    self._end_by(run, run.deadline_boot_s, run.spec.grace_s, ExitKind.OUT_OF_TIME)
                if run.ends_s <= now_s:
                    self.end(lease_id, Exit(kind=run.kind, ended_at_s=self._clock.utc_s()), node=node)

    def _end_by(self, run: Running, from_s: float, grace_s: float, kind: ExitKind) -> None:
        """Some jobs leave at once, some use their grace up, some ignore SIGTERM and are killed after it."""
        if math.isinf(run.ends_s):
            run.kind = kind
        run.ends_s = min(run.ends_s, from_s + grace_s * self._rng.choice((0.0, 0.5, 1.0)))

    def end(self, lease_id: str, end: Exit, *, node: str) -> None:
        """An attempt is over; its note may be lost or late, its record stays until it is forgotten."""
        del self.running[node][lease_id]
        self.changed.add(node)
        view = replace(self.attempts[node][lease_id], exit=end)
        self.attempts[node][lease_id] = view
        if node in self._connected and node not in self.cut_off:
            fate = self._rng.random()
            if fate < self.faults:
                return
            if fate < 2 * self.faults:
                self._notes.append((node, self._session[node], view))
            else:
                self._on_attempt(node, view)

    # --- operations ---

    def _term(self, node: str, args: orders.NodeTerm) -> orders.BootTime:
        boot = super()._term(node, args)
        self.term_ends_s[node] = min(boot.boot_s + args.term_s, getattr(args, "ends_boot_s", math.inf))
        return boot

    def _start(self, node: str, args: orders.AgentStart) -> RuntimeHandle:
        known = self.attempts[node].get(args.spec.lease_id)
        if self._clock.boot_s() >= self.term_ends_s[node]:
            raise Conflict(f"node {node}: its term is over")
        if known is not None and args.spec.attempt <= known.handle.attempt:
            raise Conflict(f"lease {args.spec.lease_id}: attempt {known.handle.attempt} came before {args.spec.attempt}")
        handle = super()._start(node, args)
        self.started.clear()
        spec = args.spec
        self.running[node][spec.lease_id] = Running(spec, spec.envelope, spec.deadline_boot_s)
        self.changed.add(node)
        self.orders.append(("start", spec.lease_id, spec.deadline_boot_s))
        return handle

    def _run(self, node: str, lease_id: str, fence: int) -> Running:
        self._known(node, lease_id, fence)
        run = self.running[node].get(lease_id)
        if run is None:
            raise Conflict(f"the attempt of lease {lease_id} has ended")
        return run

    def _renew(self, node: str, args: orders.AgentRenew) -> wire.Nothing:
        self._run(node, args.lease_id, args.fence).deadline_boot_s = args.deadline_boot_s
        self.orders.append(("renew", args.lease_id, args.deadline_boot_s))
        return wire.Nothing()

    def _resize(self, node: str, args: orders.AgentResize) -> wire.Nothing:
        self._run(node, args.lease_id, args.fence).envelope = args.envelope
        self.changed.add(node)
        return wire.Nothing()

    def _stop(self, node: str, args: orders.AgentStop) -> wire.Nothing:
        view = self._known(node, args.lease_id, args.fence)
        if view.exit is None:
            run = self.running[node][args.lease_id]
            self._end_by(run, self._clock.boot_s(), args.grace_s, args.kind)
            if run.ends_s <= self._clock.boot_s():
                self.end(args.lease_id, Exit(kind=run.kind, ended_at_s=self._clock.utc_s()), node=node)
        return wire.Nothing()

    def _forget(self, node: str, args: wire.LeaseRef) -> wire.Nothing:
        if args.lease_id in self.running[node]:
            raise Conflict(f"lease {args.lease_id} still runs")
        return super()._forget(node, args)
