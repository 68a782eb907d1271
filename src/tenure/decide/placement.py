"""Which waiting lease goes on which node: a fold over the ledger's events that plans grants. Grants nothing itself.

A gang is granted whole or not at all. Whose turn it is says the queue's order (`queueing`); where the next in turn finds no
room, those behind it wait too, unless the order lets them by. At the end of a slot a gang goes on where it is. By an order that
has gangs give way it makes room for one before it in turn: the last in turn first, and only those whose room is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tenure.codec import from_builtins
from tenure.events import Event
from tenure.leases import Lease, LeaseState
from tenure.nodes import Node, NodeState
from tenure.resources import Capacity, DeviceShare, Envelope

from .packing import Packing, Room, pack, room_with, shortage, size
from .queueing import FIFO, WAITING, Gang, Order, Queue, amounts
from .reserving import Ahead, is_ahead, reach_s
from .rules import TENURE, Rule
from .shapes import Shape, shape_of
from .slack import Slack

if TYPE_CHECKING:
    from .rooms import Rooms

MAX_REMEMBERED = 10_000
"""Sizes of gangs whose "never" is remembered; past it, all are forgotten and asked anew."""
_NODE_STATES = {
    "node.draining": NodeState.DRAINING,
    "node.unreachable": NodeState.UNREACHABLE,
    "node.lost": NodeState.LOST,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One lease to be granted now."""

    lease_id: str
    node: str
    devices: tuple[DeviceShare, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Impossible:
    """One lease that the present fleet could not hold even when idle."""

    lease_id: str
    reasons: Mapping[str, str]
    """Node -> what it is short of; for a gang whose members fit one by one, key ``gang``: what fails together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do now. Every waiting lease is in exactly one of the three."""

    grants: tuple[Grant, ...] = ()
    """Gang by gang, in the order in which they are to be granted."""
    impossible: tuple[Impossible, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)
    """Lease id -> what it waits for."""
    renewals: tuple[str, ...] = ()
    """Of the leases whose slot is over, those that go on where they are. The others give way: grants may rest on their room."""


class Placement:
    """The fold. Two folds over events that leave the same leases and nodes are equal (`==`)."""

    def __init__(self, *, rule: Rule = TENURE, order: Order = FIFO) -> None:
        """rule: which of the nodes with room takes a lease. order: whose turn it is."""
        self._rule, self.order = rule, order
        self._queue = Queue(order)
        self._nodes: dict[str, Node] = {}
        self._waiting: dict[str, Lease] = {}
        self._held: dict[str, dict[str, Lease]] = {}  # node -> lease id -> lease
        self._where: dict[str, str] = {}  # lease id -> node that holds it
        self._rooms: dict[str, Room] = {}  # of nodes with known capacity; dropped when out of date
        self._nevers: dict[tuple[tuple[float, ...], ...], Mapping[str, str] | None] = {}  # dropped when a node changes
        self._alone: dict[tuple[float, ...], int] = {}  # size -> how many nodes could hold it when idle; dropped likewise
        self._idle: dict[str, Room] = {}  # the nodes with nothing on them; dropped likewise
        self._shapes: Counter[Shape] = Counter()  # of the leases that wait or hold and ask for GPUs
        self._free: Rooms | None = None  # of nodes that are up; made when a GPU lease is planned, dropped with a node
        self._levels: dict[Shape, int] = {}  # what its weights were made of
        self._planned: Plan | None = None  # dropped when anything changes; None while time alone could change it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Placement) and self.snapshot() == other.snapshot()

    __hash__ = None  # type: ignore[assignment]

    def snapshot(self) -> dict[str, Any]:
        """Return all that the fold knows, in a form that compares: for tests and for people."""
        return {
            "nodes": dict(sorted(self._nodes.items())),
            "waiting": dict(sorted(self._waiting.items())),
            "held": {node: dict(sorted(held.items())) for node, held in sorted(self._held.items()) if held},
        }

    def apply(self, event: Event) -> None:
        """Take in one event. Kinds other than ``lease.*``, ``invoked`` and ``node.*`` change nothing.

        The first two carry `data["lease"]`, ``node.up`` carries `data["node"]`, each as the noun or as plain data. A request
        may carry `data["estimate_s"]`: how long its job takes, as its owner says.
        Raises CorruptData when that does not fit the noun.
        """
        if event.kind.startswith("lease.") or event.kind == "invoked":
            lease = event.data.get("lease")
            if lease is not None:
                known = lease if isinstance(lease, Lease) else from_builtins(lease, Lease)
                self._put(known, event.data.get("estimate_s"))
        elif event.kind == "node.up":
            given = event.data["node"]
            node = given if isinstance(given, Node) else from_builtins(given, Node)
            self._set_node(node, node.state if node.state is NodeState.DRAINING else NodeState.UP)
        elif event.kind == "node.removed":
            self._nodes.pop(event.node, None)
            self._forget(event.node)
        elif event.kind in _NODE_STATES and event.node in self._nodes:
            self._set_node(self._nodes[event.node], _NODE_STATES[event.kind])

    def plan(self, now_s: float, *, ending: Sequence[str] = ()) -> Plan:
        """Return what to grant at `now_s` (UTC seconds; reservations and waits look at it). Changes nothing.

        ending: leases held whose slot is over, whole gangs of them; the plan says which are renewed.
        The same plan (`is`) as before comes back at once as long as no event has changed anything.
        """
        if ending:
            return self._plan(now_s, ending)
        if self._planned is None:
            plan = self._plan(now_s, ())
            if any(lease.state is LeaseState.RESERVED for lease in self._waiting.values()):
                return plan
            self._planned = plan
        return self._planned

    def _plan(self, now_s: float, ending: Sequence[str]) -> Plan:
        stays, running = self._ending(ending, now_s)
        slack = Slack(self._fleet(), self._copied_rooms)
        try:
            plan = self._plan_with(slack, self._queue.turns(now_s, running), now_s)
        finally:
            slack.undo()
        return replace(plan, renewals=(*stays, *plan.renewals)) if stays else plan

    def _plan_with(self, slack: Slack, turns: Sequence[Gang], now_s: float) -> Plan:
        grants: list[Grant] = []
        renewals: list[str] = []
        impossible: list[Impossible] = []
        waiting: dict[str, str] = {}
        lacks: dict[tuple[tuple[float, ...], ...], str] = {}  # sizes that had no room -> what they wait for
        yielding = [gang for gang in turns if gang.ending]  # those after the present one that still have their room
        yielding.reverse()
        behind = ""
        reserved = any(lease.state is LeaseState.RESERVED for lease in self._waiting.values())
        ahead = self.ahead(now_s) if reserved else None
        if reserved:  # whose time has come takes the room that was kept for it before anybody else could
            turns = sorted(turns, key=lambda gang: not gang.is_reserved())
        for gang in turns:
            members = gang.in_turn()
            if gang.ending:
                if yielding and yielding[-1] is gang:
                    yielding.pop()
                    renewals += gang.members
                elif slack.take_again(members):
                    renewals += gang.members
                continue
            if any(is_ahead(lease, now_s) for lease in members):
                waiting |= {lease.id: "reserved for later" for lease in members}
                continue
            envelopes = [lease.envelope for lease in members]
            sizes = tuple([size(envelope) for envelope in envelopes])
            never = self._never(envelopes, sizes)
            if never is not None:
                impossible += [Impossible(lease_id=lease.id, reasons=never) for lease in members]
                continue
            packing = None
            for_s = max(map(reach_s, members))
            beside = ahead is not None and ahead.first_s() < now_s + for_s
            promised = gang.is_reserved() and self._are_up(members)
            if promised and slack.take_again(members):
                packing = tuple((lease.node, lease.devices) for lease in members)
                for lease in members:
                    slack.give(lease.node, lease.envelope, lease.devices)
            elif ahead is not None and beside and not behind:
                packing = ahead.place(envelopes, now_s, for_s)
            elif not behind and sizes not in lacks:
                packing = slack.pack(envelopes) or self._make_room(slack, envelopes, yielding)
            if packing is None and ahead is not None and beside and not behind:
                text = self._lacks(members, ahead.rooms(now_s, for_s)) + "; room is reserved within its time"
                waiting |= dict.fromkeys(gang.members, text)
                behind = "" if self.order.backfill and not gang.overdue else f"waits behind {gang.id}"
                continue
            if packing is None:
                lacks[sizes] = text = behind or lacks.get(sizes) or self._lacks(members, slack.rooms)
                waiting |= dict.fromkeys(gang.members, text)
                if not self.order.backfill or gang.overdue or promised:
                    behind = behind or f"waits behind {gang.id}"
                continue
            for lease, (node, devices) in zip(members, packing, strict=True):
                slack.take(node, lease.envelope, devices)
                if ahead is not None and not (promised and node == lease.node):
                    ahead.take(node, lease.envelope, devices, reach_s(lease))
                grants.append(Grant(lease_id=lease.id, node=node, devices=devices))
        return Plan(grants=tuple(grants), impossible=tuple(impossible), waiting=waiting, renewals=tuple(renewals))

    def ahead(self, now_s: float) -> Ahead:
        """Return the nodes as they will be, with what is reserved: for decisions about reservations and renewals."""
        capacities = {name: node.capacity for name, node in sorted(self._nodes.items()) if node.state is NodeState.UP}
        return Ahead(capacities, self._held, self._waiting.values(), now_s)

    def _are_up(self, members: Sequence[Lease]) -> bool:
        return all(self._is_up(lease.node) for lease in members)

    def _ending(self, ending: Sequence[str], now_s: float) -> tuple[list[str], list[Gang]]:
        """Return the leases that are renewed whatever waits, and the gangs that may have to give way."""
        if not ending or not self.order.gives_way:
            return list(ending), []
        gangs: dict[str, list[Lease]] = {}
        for lease_id in ending:
            lease = self._held[self._where[lease_id]][lease_id]
            gangs.setdefault(lease.gang_id or lease.id, []).append(lease)
        stays: list[str] = []
        running = []
        for name, leases in gangs.items():
            if all(self._is_up(lease.node) for lease in leases):
                running.append(self._queue.running(name, leases, now_s))
            else:  # its room would be of no use to others
                stays += [lease.id for lease in leases]
        return stays, running

    def _make_room(self, slack: Slack, envelopes: Sequence[Envelope], yielding: list[Gang]) -> Packing | None:
        """Have gangs whose slot is over give way, the last in turn first, until these fit; none does if they never would.

        yielding: those after these in turn, the next one last; who gives way is taken out of it.
        """
        if not yielding:
            return None
        wanted = [amounts(envelope) for envelope in envelopes]
        short = [sum(column) - left for *column, left in zip(*wanted, slack.left(), strict=True)]
        given: list[Gang] = []
        for number, gang in enumerate(yielding):
            for lease in gang.members.values():
                short = [lack - amount for lack, amount in zip(short, amounts(lease.envelope), strict=True)]
            if max(short) > 0:
                continue
            for each in yielding[len(given) : number + 1]:
                given.append(each)
                for lease in each.members.values():
                    slack.give(lease.node, lease.envelope, lease.devices)
            packing = slack.pack(envelopes)
            if packing is not None:
                del yielding[: len(given)]
                return packing
        for each in given:
            for lease in each.members.values():
                slack.take(lease.node, lease.envelope, lease.devices)
        return None

    def _copied_rooms(self) -> dict[str, Room]:
        return {name: self._room(name).copy() for name in self._nodes if self._is_up(name)}

    def _is_up(self, node: str) -> bool:
        return node in self._nodes and self._nodes[node].state is NodeState.UP

    def what_if(self, members: Sequence[Envelope | Lease], *, idle: bool = False) -> Mapping[str, str] | None:
        """Return None when these could be granted together, else the reason per node. Leaves the state as it was.

        idle: ask about the present fleet with nothing on it ("could it ever?") instead of as it is now. A fleet without
        nodes gives ``{"fleet": "no node is up"}`` either way.
        """
        envelopes = [member.envelope if isinstance(member, Lease) else member for member in members]
        if not self._alive():
            return {"fleet": "no node is up"}
        if idle:
            return self._never(envelopes, tuple([size(envelope) for envelope in envelopes]))
        rooms = {name: self._room(name) for name in self._alive() if self._is_up(name)}
        packing: Packing | None = pack(envelopes, rooms)[0]
        return None if packing is not None else self._reasons(envelopes, rooms, "free")

    def resize_shortage(self, lease_id: str, envelope: Envelope) -> str:
        """Return "" when a held lease could have this envelope on its node, else what is short. GPUs can't be resized."""
        name = self._where.get(lease_id)
        if name is None or name not in self._nodes:
            return f"lease {lease_id} is not held on a known node"
        held = self._held[name]
        if (envelope.gpus, envelope.gpu_memory_bytes) != (
            held[lease_id].envelope.gpus,
            held[lease_id].envelope.gpu_memory_bytes,
        ):
            return "gpus of a lease that is held can't be changed; release it and request another"
        others = [(lease.envelope, lease.devices) for key, lease in held.items() if key != lease_id]
        return shortage(room_with(self._nodes[name].capacity, others), replace(envelope, gpus=0.0))

    def nodes(self) -> Mapping[str, Node]:
        """Return the nodes known, with their present state."""
        return dict(sorted(self._nodes.items()))

    def taken(self, node: str) -> Room:
        """Return what is held of a node, as a copy. Raises KeyError for a node that was never up."""
        return self._room(node).copy()

    # --- state ---

    def _put(self, lease: Lease, estimate_s: float | None) -> None:
        self._planned = None
        old = self._where.get(lease.id)
        known = self._waiting.get(lease.id) if old is None else self._held[old][lease.id]
        self._queue.put(lease, known, estimate_s)
        if known is not None and known.holds and lease.holds and _takes(known) == _takes(lease):
            self._held[lease.node][lease.id] = lease  # renewed, for one
            return
        was = self._waiting.pop(lease.id, None)
        self._where.pop(lease.id, None)
        if old is not None:
            was = self._held[old].pop(lease.id)
            self._rooms.pop(old, None)
            if self._free is not None and old in self._free:
                self._free.give(old, was.envelope, was.devices)
        if was is not None:
            self._count(was, -1)
        if lease.state in WAITING:
            self._waiting[lease.id] = lease
            self._count(lease, 1)
        elif lease.holds and lease.node:
            self._count(lease, 1)
            self._held.setdefault(lease.node, {})[lease.id] = lease
            self._where[lease.id] = lease.node
            self._rooms.pop(lease.node, None)
            if self._free is not None and lease.node in self._free:
                self._free.take(lease.node, lease.envelope, lease.devices)

    def _count(self, lease: Lease, change: int) -> None:
        if lease.envelope.gpus:
            shape = shape_of(lease.envelope)
            self._shapes[shape] += change
            if not self._shapes[shape]:
                del self._shapes[shape]

    def _fleet(self) -> Rooms | None:
        """Return what is free on the nodes that are up, weighed by the leases that wait and hold now.

        None while there are no GPU leases, unless the rule has something to say of others too.

        How often a shape is asked for counts in powers of two, so that most requests leave the weights as they are.
        """
        if not self._shapes and self._rule.about_gpus:
            return None
        from .mix import Mix  # both bring NumPy, which a fleet without GPUs has no use for
        from .rooms import Rooms

        levels = {shape: count.bit_length() for shape, count in self._shapes.items()}
        if self._free is None:
            up = {name: node.capacity for name, node in self._nodes.items() if node.state is NodeState.UP}
            self._free, self._levels = Rooms(up, Mix({}), self._rule), {}
            for name in up:
                for lease in self._held.get(name, {}).values():
                    self._free.take(name, lease.envelope, lease.devices)
        if levels != self._levels:
            self._levels = levels
            self._free.weigh(self._rule.mix({shape: 2.0**level for shape, level in levels.items()}))
        return self._free

    def _set_node(self, node: Node, state: NodeState) -> None:
        self._nodes[node.name] = replace(node, state=state)
        self._forget(node.name)

    def _forget(self, node: str) -> None:
        """Drop what followed from the nodes as they were before this one changed."""
        self._planned = self._free = None
        self._queue.resize(known.capacity for name, known in self._nodes.items() if self._is_up(name))
        for remembered in (self._nevers, self._alone, self._idle):
            remembered.clear()
        self._rooms.pop(node, None)

    def _room(self, name: str) -> Room:
        if name not in self._rooms:
            held = self._held.get(name, {}).values()
            self._rooms[name] = room_with(self._nodes[name].capacity, [(lease.envelope, lease.devices) for lease in held])
        return self._rooms[name]

    def _alive(self) -> list[str]:
        return sorted(name for name, node in self._nodes.items() if node.state is not NodeState.LOST)

    # --- reasons ---

    def _never(self, envelopes: Sequence[Envelope], sizes: tuple[tuple[float, ...], ...]) -> Mapping[str, str] | None:
        """Return why the fleet could not hold these even when idle, None when it could or when that is not certain."""
        if sizes not in self._nevers:
            if len(self._nevers) >= MAX_REMEMBERED:
                self._nevers.clear()
                self._alone.clear()
            self._nevers[sizes] = self._never_anew(envelopes, sizes)
        return self._nevers[sizes]

    def _never_anew(self, envelopes: Sequence[Envelope], sizes: Sequence[tuple[float, ...]]) -> Mapping[str, str] | None:
        if not self._idle:
            self._idle = {name: room_with(self._nodes[name].capacity, ()) for name in self._alive()}
        for envelope, key in zip(envelopes, sizes, strict=True):
            if key not in self._alone:
                self._alone[key] = sum(not shortage(room, envelope) for room in self._idle.values())
        # Where each fits alone on as many nodes as there are members, each can have a node of its own: no need to pack.
        if not self._idle or all(self._alone[key] >= len(envelopes) for key in sizes):
            return None
        packing, certain = pack(envelopes, self._idle)
        return None if packing is not None or not certain else self._reasons(envelopes, self._idle, "")

    def _reasons(self, envelopes: Sequence[Envelope], rooms: Mapping[str, Room], word: str) -> dict[str, str]:
        for envelope in envelopes:
            short = {name: shortage(room, envelope, word=word) for name, room in sorted(rooms.items())}
            if all(short.values()):
                away = {name: "not reachable now" for name in self._alive() if name not in rooms}
                return short | away
        return {"gang": _together(envelopes, rooms, word)}

    def _lacks(self, members: Sequence[Lease], rooms: Mapping[str, Room]) -> str:
        if not rooms:
            return "no node is up"
        reasons = self._reasons([lease.envelope for lease in members], rooms, "free")
        return "waits for room: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())


def _takes(lease: Lease) -> tuple[str, Envelope, tuple[DeviceShare, ...]]:
    return lease.node, lease.envelope, lease.devices


def _together(envelopes: Sequence[Envelope], rooms: Mapping[str, Room], word: str) -> str:
    total = room_with(
        Capacity(
            cpus=sum(room.capacity.cpus for room in rooms.values()),
            memory_bytes=sum(room.capacity.memory_bytes for room in rooms.values()),
        ),
        (),
    )
    total.cpus = sum(room.cpus for room in rooms.values())
    total.memory_bytes = sum(room.memory_bytes for room in rooms.values())
    cpus, memory_bytes = sum(e.cpus for e in envelopes), sum(e.memory_bytes for e in envelopes)
    short = shortage(total, Envelope(cpus=cpus, memory_bytes=memory_bytes), word=word).replace("node has", "all nodes have")
    return f"{len(envelopes)} leases together: {short or 'each fits alone, but not all of them at once'}"
