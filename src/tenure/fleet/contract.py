"""What the broker needs of a fleet. The operations are the agent's own (`wire.AGENT_OPS`): nothing is said twice here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tenure.errors import SpecError
from tenure.nodes import Node
from tenure.resources import format_bytes, parse_bytes
from tenure.tenants import check_name
from tenure.wire import AttemptView, BootTime, NodeTerm

OnAttempt = Callable[[str, AttemptView], None]
OnCut = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One node to be: its name, and which part of the machine it offers.

    cpus, memory_bytes: one alone brings the same share of the other; neither offers all that is left. Written
    ``name:cpus:memory``, each of the two perhaps empty, or ``name`` alone.
    """

    name: str = "local"
    cpus: float | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        check_name("node", self.name)
        if self.cpus is not None and not 0 < self.cpus < float("inf"):
            raise SpecError(f"the cpus of node {self.name} must be above 0; found {self.cpus!r}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that a text such as ``a``, ``a:1:`` or ``a:1:512MiB`` describes. Raises SpecError."""
        name, *rest = text.split(":")
        if len(rest) not in (0, 2):
            raise SpecError(f"a node is written name or name:cpus:memory, e.g. a:1:512MiB; found {text!r}")
        cpus, memory = rest or ("", "")
        try:
            return cls(name=name, cpus=float(cpus) if cpus else None, memory_bytes=parse_bytes(memory) if memory else None)
        except ValueError as error:
            raise SpecError(f"the cpus of node {text!r} must be a number") from error

    def __str__(self) -> str:
        if self.cpus is None and self.memory_bytes is None:
            return self.name
        memory = "" if self.memory_bytes is None else format_bytes(self.memory_bytes)
        return f"{self.name}:{'' if self.cpus is None else repr(self.cpus)}:{memory}"

    @property
    def sized(self) -> bool:
        """Whether it names how much it offers."""
        return self.cpus is not None or self.memory_bytes is not None

    def describe(self) -> str:
        """Return what it offers, for people, e.g. ``1 cpus, 512MiB``."""
        named = [] if self.cpus is None else [f"{self.cpus:g} cpus"]
        named += [] if self.memory_bytes is None else [format_bytes(self.memory_bytes)]
        return ", ".join(named) or "all that is left of the machine"


class Fleet(Protocol):
    """The nodes one broker grants on. One contract suite runs over all (tests/fleet)."""

    def names(self) -> tuple[str, ...]:
        """Return the nodes' names, sorted."""
        ...

    def parts(self) -> tuple[Part, ...]:
        """Return the nodes as they were asked for, sorted by name."""
        ...

    def add(self, part: Part) -> None:
        """Have one more node, from the next `reach` on; one of that name is replaced."""
        ...

    async def remove(self, node: str) -> None:
        """End a node's agent, and have the node no more. Returns once its part of the machine is free.

        Nothing happens to an unknown one. Raises Unavailable, and keeps the node, when its agent does not end.
        """
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
