"""What the broker needs of a fleet. The operations are the agent's own (`wire.AGENT_OPS`): nothing is said twice here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tenure.nodes import Node
from tenure.wire import AttemptView, BootTime, NodeTerm

OnAttempt = Callable[[str, AttemptView], None]
OnCut = Callable[[str], None]


class Fleet(Protocol):
    """The nodes one broker grants on. One contract suite runs over all (tests/fleet)."""

    def names(self) -> tuple[str, ...]:
        """Return the nodes' names, sorted."""
        ...

    def listen(self, on_attempt: OnAttempt, on_cut: OnCut) -> None:
        """Have `on_attempt(node, view)` told of usage and exits, and `on_cut(node)` of a connection that broke."""
        ...

    async def reach(self, node: str, *, term: Callable[[], NodeTerm]) -> tuple[Node, BootTime]:
        """Connect to a node, start its agent when none answers, and give it its term.

        term: makes the order; called once, when the order goes out, and not at all when it does not get that far.
        Raises Unavailable when that takes too long, StaleFence when it obeys a newer broker.
        """
        ...

    async def call(self, node: str, op: str, args: Any, *, timeout_s: float = 10.0) -> Any:
        """Return what the node's agent answers. Raises what it raises; Unavailable when it does not answer."""
        ...

    async def close(self) -> None:
        """Hang up. Agents and leases stay."""
        ...
