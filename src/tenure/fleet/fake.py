"""A fleet of imagined nodes for tests: nothing runs; the test says how attempts end and when nodes are cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tenure import orders, wire
from tenure.errors import Conflict, NotFound, StaleFence, TenureError, Unavailable
from tenure.fleet.contract import OnAttempt, OnCut, Part
from tenure.frames import OpenSession, SessionAt
from tenure.nodes import Machine, Node
from tenure.protocols import Clock, Exit, RuntimeHandle, StartSpec
from tenure.resources import Capacity
from tenure.usage import Usage


class FakeFleet:
    """Implements `contract.Fleet`. `started` holds every spec ever started, `attempts` what each node knows."""

    def __init__(self, nodes: Sequence[Node], clock: Clock) -> None:
        self._nodes = {node.name: node for node in nodes}
        self._parts = {
            node.name: Part(name=node.name, cpus=node.capacity.cpus, memory_bytes=node.capacity.memory_bytes) for node in nodes
        }
        self._clock = clock
        self._on_attempt: OnAttempt = lambda node, view: None
        self._on_cut: OnCut = lambda node: None
        self._connected: set[str] = set()
        self._broker_fence: dict[str, int] = {}
        self.cut_off: set[str] = set()
        """Nodes that do not answer."""
        self.started: list[StartSpec] = []
        self.attempts: dict[str, dict[str, orders.AttemptView]] = {node.name: {} for node in nodes}
        """Node -> lease -> its last attempt."""
        self.calls: list[tuple[str, str, Any]] = []
        """Every (node, operation, arguments) that was answered."""
        self.refuse_start: Callable[[StartSpec], TenureError | None] = lambda spec: None
        self.refuse_reach: Callable[[str], TenureError | None] = lambda node: None
        """What reaching a node raises, e.g. for want of a share of the machine."""
        self.stops_at_once = True
        """Whether a stopped attempt ends by itself."""

    def names(self) -> tuple[str, ...]:
        """See Fleet."""
        return tuple(sorted(self._nodes))

    def parts(self) -> tuple[Part, ...]:
        """See Fleet."""
        return tuple(self._parts[name] for name in self.names())

    def add(self, part: Part) -> None:
        """See Fleet. A part that does not say has 1 cpu and 1 GiB."""
        capacity = Capacity(cpus=part.cpus or 1.0, memory_bytes=part.memory_bytes or 1 << 30)
        self._nodes[part.name] = Node(name=part.name, capacity=capacity, machine=Machine(cpu_model="fake"))
        self._parts[part.name] = part
        self.attempts.setdefault(part.name, {})

    async def remove(self, node: str) -> None:
        """See Fleet."""
        if node in self.cut_off:
            raise Unavailable(f"the agent of node {node} has not left")
        self._nodes.pop(node, None)
        self._parts.pop(node, None)
        self.attempts.pop(node, None)
        self._connected.discard(node)

    def listen(self, on_attempt: OnAttempt, on_cut: OnCut) -> None:
        """See Fleet."""
        self._on_attempt, self._on_cut = on_attempt, on_cut

    async def reach(self, node: str, *, term: Callable[[], orders.NodeTerm]) -> tuple[Node, orders.BootTime]:
        """See Fleet."""
        if node not in self._nodes:
            raise NotFound(f"node {node!r} does not exist; this fleet has {', '.join(self.names())}")
        if node in self.cut_off:
            raise Unavailable(f"node {node} does not answer")
        if (error := self.refuse_reach(node)) is not None:
            raise error
        self._connected.add(node)
        order = term()
        boot = await self.call(node, "term", order)
        return replace(self._nodes[node], term_s=order.term_s), boot

    async def call(self, node: str, op: str, args: Any, *, timeout_s: float = 10.0) -> Any:
        """See Fleet."""
        if node in self.cut_off or node not in self._connected:
            raise Unavailable(f"node {node} is not connected")
        self.calls.append((node, op, args))
        return getattr(self, f"_{op}")(node, args)

    async def close(self) -> None:
        """See Fleet."""
        self._connected.clear()

    # --- what tests do ---

    def finish(self, lease_id: str, end: Exit, *, told: bool = True) -> None:
        """End a running attempt. told: whether the broker hears of it now (otherwise only when it asks)."""
        node, view = self._find(lease_id)
        self.attempts[node][lease_id] = replace(view, exit=end)
        if told and node in self._connected and node not in self.cut_off:
            self._on_attempt(node, self.attempts[node][lease_id])

    def use(self, lease_id: str, usage: Usage) -> None:
        """Report consumption of a running attempt."""
        node, view = self._find(lease_id)
        self.attempts[node][lease_id] = replace(view, usage=usage)
        self._on_attempt(node, self.attempts[node][lease_id])

    def cut(self, node: str) -> None:
        """Break the connection; the node answers no more until `mend`."""
        self.cut_off.add(node)
        self._connected.discard(node)
        self._on_cut(node)

    def mend(self, node: str) -> None:
        """Let the node answer again."""
        self.cut_off.discard(node)

    def _find(self, lease_id: str) -> tuple[str, orders.AttemptView]:
        for node, attempts in self.attempts.items():
            if lease_id in attempts:
                return node, attempts[lease_id]
        raise NotFound(f"no node knows lease {lease_id}")

    # --- operations ---

    def _term(self, node: str, args: orders.NodeTerm) -> orders.BootTime:
        if args.broker_fence < self._broker_fence.get(node, 0):
            raise StaleFence(f"node {node} obeys broker {self._broker_fence[node]}; this one is {args.broker_fence}")
        self._broker_fence[node] = args.broker_fence
        return orders.BootTime(boot_s=self._clock.boot_s(), utc_s=self._clock.utc_s(), boot_id=self._clock.boot_id())

    def _describe(self, node: str, args: wire.Nothing) -> Node:
        return self._nodes[node]

    def _start(self, node: str, args: orders.AgentStart) -> RuntimeHandle:
        spec = args.spec
        if (error := self.refuse_start(spec)) is not None:
            raise error
        known = self.attempts[node].get(spec.lease_id)
        if known is not None and spec.fence < known.handle.fence:
            raise StaleFence(f"lease {spec.lease_id} has fence {known.handle.fence}; the order carries {spec.fence}")
        if known is not None and known.exit is None:
            raise Conflict(f"lease {spec.lease_id} still runs attempt {known.handle.attempt}")
        handle = RuntimeHandle(
            lease_id=spec.lease_id,
            attempt=spec.attempt,
            fence=spec.fence,
            pid=1000 + len(self.started),
            start_ticks=1,
            started_at_s=self._clock.utc_s(),
        )
        self.started.append(spec)
        self.attempts[node][spec.lease_id] = orders.AttemptView(handle=handle)
        return handle

    def _known(self, node: str, lease_id: str, fence: int) -> orders.AttemptView:
        view = self.attempts[node].get(lease_id)
        if view is None:
            raise NotFound(f"node {node} knows no lease {lease_id}")
        if fence < view.handle.fence:
            raise StaleFence(f"lease {lease_id} has fence {view.handle.fence}; the order carries {fence}")
        return view

    def _renew(self, node: str, args: orders.AgentRenew) -> wire.Nothing:
        self._known(node, args.lease_id, args.fence)
        return wire.Nothing()

    def _resize(self, node: str, args: orders.AgentResize) -> wire.Nothing:
        self._known(node, args.lease_id, args.fence)
        return wire.Nothing()

    def _stop(self, node: str, args: orders.AgentStop) -> wire.Nothing:
        view = self._known(node, args.lease_id, args.fence)
        if view.exit is None and self.stops_at_once:
            self.finish(args.lease_id, Exit(kind=args.kind, ended_at_s=self._clock.utc_s()))
        return wire.Nothing()

    def _attempts(self, node: str, args: wire.Nothing) -> tuple[orders.AttemptView, ...]:
        return tuple(self.attempts[node].values())

    def _forget(self, node: str, args: wire.LeaseRef) -> wire.Nothing:
        self.attempts[node].pop(args.lease_id, None)
        return wire.Nothing()

    def _exec(self, node: str, args: wire.Exec) -> wire.ExecResult:
        return wire.ExecResult(code=0, output=" ".join(args.argv))

    def _open_session(self, node: str, args: OpenSession) -> SessionAt:
        return SessionAt(path=f"/{node}/{args.lease_id}", token=f"uid {args.uid}")

    def _shutdown(self, node: str, args: wire.Nothing) -> wire.Nothing:
        return wire.Nothing()
