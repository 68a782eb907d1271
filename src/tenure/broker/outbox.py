"""The two doors out of the broker: answers to clients, orders to agents. What they rest on is on disk before they pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tenure import orders
from tenure.broker.book import Book
from tenure.errors import TenureError, Unavailable
from tenure.fleet.contract import Fleet, OnAttempt, OnCut, Part
from tenure.nodes import Node
from tenure.sockets import Connection, Handler

RESTS_ON_NOTHING = frozenset({"attempts", "describe", "term"})
"""Operations of an agent that are right whatever the ledger says: a full disk must not let a node's term run out."""


def answering(book: Book, handler: Handler) -> Handler:
    """Return the handler, answering once all that was written so far is on disk; it fails with what kept it from being so."""

    async def answer(args: Any, client: Connection) -> Any:
        book.calls += 1
        try:
            return await handler(args, client)
        finally:
            try:
                await book.durable()
            finally:
                book.calls -= 1

    return answer


class Outbox:
    """A fleet whose orders wait for the disk. Implements `contract.Fleet`."""

    def __init__(self, book: Book, fleet: Fleet) -> None:
        self._book, self._fleet = book, fleet

    def names(self) -> tuple[str, ...]:
        """See Fleet."""
        return self._fleet.names()

    def parts(self) -> tuple[Part, ...]:
        """See Fleet."""
        return self._fleet.parts()

    def add(self, part: Part) -> None:
        """See Fleet."""
        self._fleet.add(part)

    async def remove(self, node: str) -> None:
        """See Fleet. Raises what kept the ends of its leases from being written."""
        await self._book.durable()
        await self._fleet.remove(node)

    def listen(self, on_attempt: OnAttempt, on_cut: OnCut) -> None:
        """See Fleet."""
        self._fleet.listen(on_attempt, on_cut)

    async def reach(self, node: str, *, term: Callable[[], orders.NodeTerm]) -> tuple[Node, orders.BootTime]:
        """See Fleet."""
        return await self._fleet.reach(node, term=term)

    async def call(self, node: str, op: str, args: Any, *, timeout_s: float = 10.0) -> Any:
        """See Fleet. Raises Unavailable also when the order was not sent, since the ledger could not be written."""
        if op not in RESTS_ON_NOTHING:
            try:
                await self._book.durable()
            except TenureError as error:
                raise Unavailable(f"{op} was not sent to node {node}: {error}") from error
        return await self._fleet.call(node, op, args, timeout_s=timeout_s)

    async def close(self) -> None:
        """See Fleet."""
        await self._fleet.close()
