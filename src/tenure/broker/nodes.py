"""The nodes: reaching their agents, renewing their terms, declaring them lost. What that means for leases is `attempts`' part.

A node not heard of for term + margin is lost: by then its agent has stopped whatever it held, so that nothing runs twice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from tenure import orders
from tenure.broker.book import LOG, Book
from tenure.errors import Conflict, TenureError, Unavailable
from tenure.fleet.contract import Fleet, Part
from tenure.ledger import queries
from tenure.nodes import TERM_GRACE_S, Node, NodeState

MARGIN_S = TERM_GRACE_S + 5.0
"""Past a term: what its attempts may take to leave, and then some."""
REACH_EVERY_S = 1.0
LOST_REACH_EVERY_S = 5.0
LOOK_EVERY_S = 5.0
"""Between two comparisons of what runs with what should: a note that got lost delays by no more."""


@dataclass(slots=True)
class _Link:
    node: Node | None = None
    state: NodeState = NodeState.LOST
    boot_offset_s: float = 0.0
    boot_id: str = ""
    sent_s: float = float("-inf")
    """Broker's boot clock when the node was last sent a term."""
    term_s: float = 0.0
    """How long the last one sent was."""
    term_ends_s: float = 0.0
    """Broker's boot clock by which every term is over that the node may have taken, answered or not."""
    tried_s: float = float("-inf")
    looked_s: float = 0.0
    working: bool = False
    leaving: bool = False
    """It is being taken out: nothing new is granted there."""
    seen: bool = False
    """Whether this broker has ever reached it."""


class Nodes:
    """Keeps every node of the fleet in reach. `on_up(node)` compares what runs there; `on_lost(node)` ends its leases."""

    def __init__(
        self,
        book: Book,
        fleet: Fleet,
        *,
        fence: int,
        term_s: float,
        on_up: Callable[[str], Awaitable[None]],
        on_lost: Callable[[str], None],
    ) -> None:
        self._book, self._fleet, self._fence, self._term_s = book, fleet, fence, term_s
        self._on_up, self._on_lost = on_up, on_lost
        held = {lease.node for lease in book.live.values() if lease.holds}
        self._links = {name: _Link() for name in sorted({*fleet.names(), *held})}
        self._reasons: dict[str, str] = {}
        self._reloads = self._refusals = 0
        with book.ledger.reading() as connection:
            before = {node.name: node for node in queries.list_nodes(connection)}
        for name in held:
            # An earlier broker granted there: it may still run, so it counts as cut off from now, not as lost.
            link = self._links[name]
            link.state, link.node = NodeState.UNREACHABLE, before.get(name)
            link.term_ends_s = book.clock.boot_s() + max(term_s, link.node.term_s if link.node else 0.0)

    def known(self) -> tuple[Node, ...]:
        """Return the nodes that were ever reached, with their present state."""
        return tuple(_as_is(link.node, link) for _, link in sorted(self._links.items()) if link.node)

    def listed(self) -> tuple[Node, ...]:
        """Return the nodes that were ever reached, with their present state and what leases hold of each."""
        return tuple(self._with_held(node) for node in self.known())

    def _with_held(self, node: Node) -> Node:
        held = [lease.envelope for lease in self._book.live.values() if lease.holds and lease.node == node.name]
        return replace(
            node,
            held_cpus=math.fsum(envelope.cpus for envelope in held),
            held_memory_bytes=sum(envelope.memory_bytes for envelope in held),
        )

    def why_unreached(self) -> dict[str, str]:
        """Return the last error of each node that can't be reached."""
        return {name: self._reasons.get(name, "") for name, link in self._links.items() if link.state is not NodeState.UP}

    def unseen(self) -> tuple[str, ...]:
        """Return the nodes that this broker has not reached yet: what they offer, nobody knows."""
        return tuple(name for name in self._fleet.names() if name not in self._links or not self._links[name].seen)

    def is_up(self, name: str) -> bool:
        """Return whether the node answers."""
        return name in self._links and self._links[name].state is NodeState.UP

    def deadline(self, name: str, left_s: float) -> tuple[float, str]:
        """Return (boot_s, boot_id) on the node's own clock, `left_s` from now."""
        link = self._links[name]
        return self._book.clock.boot_s() + link.boot_offset_s + left_s, link.boot_id

    def cut(self, name: str) -> None:
        """Take note that a connection broke."""
        link = self._links.get(name)
        if link is not None and link.state is NodeState.UP and link.node is not None:
            link.state, link.tried_s = NodeState.UNREACHABLE, float("-inf")
            with self._book.transaction() as tx:
                tx.put_node(replace(link.node, state=link.state), kind="node.unreachable", who="broker", why="connection lost")

    async def add(self, part: Part, *, on_nodes: Callable[[], None]) -> Node:
        """Have one more node, and return it once it is up; one that is there already with this part is as good.

        on_nodes: called whenever the nodes of the fleet have changed, before that has an effect. Raises Conflict when the
        name is taken by another part or is being taken out, Refused (with who holds the machine) and Unavailable when it
        cannot be had; then the node is not kept.
        """
        name = part.name
        before = next((known for known in self._fleet.parts() if known.name == name), None)
        if name in self._links and self._links[name].leaving:
            raise Conflict(f'node {name} is being taken out; wait until "tenure nodes" no longer lists it, then add it again')
        if before is not None and part.sized and part != before:
            raise Conflict(
                f"node {name} exists and offers {before.describe()}; asked for {part.describe()}. Take it out first "
                f"(tenure down --node {name}), or use another name."
            )
        link = self._links.get(name)
        if before is not None and link is not None and link.state is NodeState.UP and link.node is not None:
            return self._with_held(_as_is(link.node, link))
        if before is None:
            self._fleet.add(part)
            on_nodes()
        self._links.setdefault(name, _Link())
        try:
            return await self._reached(name)
        except TenureError:
            if before is None and self._links[name].node is None:  # what was once up may still hold leases
                await self._give_up(name)
                on_nodes()
            raise

    async def _give_up(self, name: str) -> None:
        self._links[name].working = True
        try:
            await self._fleet.remove(name)
            del self._links[name]
        except TenureError as error:
            self._links[name].working = False
            LOG.warning("node %s stays for now: %s", name, error)

    async def _reached(self, name: str) -> Node:
        link = self._links[name]
        while link.working:  # the loop tries it, too
            await self._book.changed(0.1)
        await self._reach(name)
        if link.node is None:
            raise Unavailable(f"node {name} was not reached")
        return self._with_held(_as_is(link.node, link))

    def drain(self, name: str) -> None:
        """Grant nothing more on a node. Nothing happens to an unknown one."""
        link = self._links.get(name)
        if link is None or link.leaving:
            return
        link.leaving = True
        if link.node is not None and link.state is NodeState.UP:
            with self._book.transaction() as tx:
                tx.put_node(replace(link.node, state=NodeState.DRAINING), kind="node.draining", who="broker")

    async def remove(self, name: str) -> None:
        """Take a drained node, which holds no lease, out of the fleet; its agent ends. Nothing happens to an unknown one.

        Raises Unavailable when its agent does not end: the node stays as it is, and this may be tried again.
        """
        link = self._links.get(name)
        if link is None:
            return
        while link.working:
            await self._book.changed(0.1)
        link.working = True  # from here on the loop keeps away: it would start the agent anew
        try:
            await self._fleet.remove(name)
        except TenureError:
            link.working = False
            raise
        del self._links[name]
        self._reasons.pop(name, None)
        if link.node is not None:
            with self._book.transaction() as tx:
                tx.put_node(replace(link.node, state=NodeState.LOST), kind="node.removed", who="broker")

    async def lengthen(self, term_s: float) -> None:
        """Renew every node's term at once, and from now on, for so long. One out of reach gets it when it is back."""
        self._term_s = term_s
        for name, link in list(self._links.items()):
            if link.state is NodeState.UP and not link.working:
                link.working = True
                await self._renew(name, link)

    async def reach_all(self) -> None:
        """Try every node once; `why_unreached` tells which failed."""
        for name in list(self._links):
            try:
                await self._reach(name)
            except TenureError as error:
                LOG.error("node %s: %s", name, error)

    async def settled(self, timeout_s: float) -> None:
        """Return once no node is being reached any more, or after the time: its agent may just be coming up."""
        end_s = self._book.clock.boot_s() + timeout_s
        while any(link.working and link.state is not NodeState.UP for link in self._links.values()):
            if self._book.clock.boot_s() > end_s:
                return
            await asyncio.sleep(0.02)

    def tick(self) -> None:
        """Renew what is due, reach what is away, give up what is lost. Returns at once; the work is done beside."""
        now_s = self._book.clock.boot_s()
        if self._refusals != self._book.ledger.refusals:
            self._again()
        for name, link in self._links.items():
            if link.state is NodeState.UNREACHABLE and now_s > link.term_ends_s + MARGIN_S:
                self._lose(name, link)
            if link.working:
                continue
            if link.state is NodeState.UP:
                if now_s - link.sent_s >= min(self._term_s, link.term_s) / 3:
                    link.working = True
                    self._book.spawn(self._renew(name, link))
                elif now_s - link.looked_s >= LOOK_EVERY_S:
                    link.working = True
                    self._book.spawn(self._look(name, link))
            elif now_s - link.tried_s >= (REACH_EVERY_S if link.state is NodeState.UNREACHABLE else LOST_REACH_EVERY_S):
                self._book.spawn(self._reach(name))

    def _again(self) -> None:
        """The ledger refused something: ask each node what was to be written, and write the nodes if a batch was lost."""
        self._refusals = self._book.ledger.refusals
        for link in self._links.values():
            link.looked_s = float("-inf")
        if self._reloads != self._book.reloads:
            with self._book.transaction() as tx:
                for node in self.known():
                    tx.put_node(node, kind=f"node.{node.state}", who="broker", why="written again after a full disk")
            self._reloads = self._book.reloads

    def _lose(self, name: str, link: _Link) -> None:
        link.state = NodeState.LOST
        why = f"its last term was over {self._book.clock.boot_s() - link.term_ends_s:.1f} s ago (margin {MARGIN_S:g} s)"
        if link.node is not None:
            with self._book.transaction() as tx:
                tx.put_node(replace(link.node, state=NodeState.LOST), kind="node.lost", who="broker", why=why)
        self._on_lost(name)

    async def _renew(self, name: str, link: _Link) -> None:
        try:
            self._heard(link, await self._fleet.call(name, "term", self._order(link)))
        except TenureError as error:
            self._reasons[name] = str(error)
            self.cut(name)
        finally:
            link.working = False

    async def _look(self, name: str, link: _Link) -> None:
        try:
            await self._on_up(name)
        finally:
            link.looked_s = self._book.clock.boot_s()
            link.working = False

    async def _reach(self, name: str) -> None:
        link = self._links[name]
        if link.working:
            return
        link.working = True
        link.tried_s = self._book.clock.boot_s()
        try:
            node, boot = await self._fleet.reach(name, term=lambda: self._order(link))
            self._heard(link, boot)
            link.node, link.state, link.seen = replace(node, state=NodeState.UP, term_s=link.term_s), NodeState.UP, True
            self._reasons.pop(name, None)
            with self._book.transaction() as tx:
                tx.put_node(_as_is(link.node, link), kind="node.up", who=f"agent:{name}")
            await self._on_up(name)
            link.looked_s = self._book.clock.boot_s()
        except TenureError as error:
            self._reasons[name] = str(error)
            raise
        finally:
            link.working = False

    def _order(self, link: _Link) -> orders.NodeTerm:
        """Return a term about to be sent. It counts from now on, also should no answer come: the node may have taken it."""
        link.sent_s, link.term_s = self._book.clock.boot_s(), self._term_s
        link.term_ends_s = max(link.term_ends_s, link.sent_s + link.term_s)
        return orders.NodeTerm(
            term_s=link.term_s,
            broker_fence=self._fence,
            ends_boot_s=link.sent_s + link.boot_offset_s + link.term_s,
            boot_id=link.boot_id or self._book.clock.boot_id(),
        )

    def _heard(self, link: _Link, boot: orders.BootTime) -> None:
        link.boot_id, link.term_ends_s = boot.boot_id, link.sent_s + link.term_s
        same = boot.boot_id == self._book.clock.boot_id()
        link.boot_offset_s = 0.0 if same else boot.boot_s - self._book.clock.boot_s()


def _as_is(node: Node, link: _Link) -> Node:
    return replace(node, state=NodeState.DRAINING if link.leaving and link.state is NodeState.UP else link.state)
