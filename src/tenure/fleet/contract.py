"""What the broker needs of a fleet. The operations are the agent's own (`orders.AGENT_OPS`): nothing is said twice here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tenure.errors import SpecError
from tenure.nodes import Node
from tenure.orders import AttemptView, BootTime, NodeTerm
from tenure.resources import format_bytes, parse_bytes
from tenure.tenants import check_name

MAX_GPUS = 1024
"""Of one node: more is a mistake."""
OnAttempt = Callable[[str, AttemptView], None]
OnCut = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One node to be: its name, and which part of the machine it offers.

    cpus, memory_bytes: one alone brings the same share of the other; neither offers all that is left. gpus: so many of the
    machine's devices, None: all that nobody offers; on a machine without any, declared ones of this model and memory. Written
    ``name``, ``name:cpus:memory`` or ``name:cpus:memory:gpus:gpu_memory:gpu_model``, each but the name perhaps empty.
    """

    name: str = "local"
    cpus: float | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    gpu_memory_bytes: int = 0
    gpu_model: str = ""

    def __post_init__(self) -> None:
        check_name("node", self.name)
        if self.gpus is not None and not 0 <= self.gpus <= MAX_GPUS:
            raise SpecError(f"the gpus of node {self.name} must lie between 0 and {MAX_GPUS}; found {self.gpus!r}")
        if not self.gpus and (self.gpu_model or self.gpu_memory_bytes):
            raise SpecError(f"node {self.name} has a model or memory of GPUs, but no number of them: say how many")
        if ":" in self.gpu_model or not self.gpu_model.isprintable():
            raise SpecError(f"the GPU model of node {self.name} must be one line without a colon; found {self.gpu_model!r}")
        if self.cpus is not None and not 0 < self.cpus < float("inf"):
            raise SpecError(f"the cpus of node {self.name} must be above 0; found {self.cpus!r}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return the part that a text such as ``a``, ``a:1:`` or ``a:1:512MiB`` describes. Raises SpecError."""
        name, *rest = text.split(":")
        if len(rest) not in (0, 2, 5):
            raise SpecError(f"a node is written name or name:cpus:memory, e.g. a:1:512MiB; found {text!r}")
        cpus, memory, gpus, gpu_memory, model = (*rest, *[""] * (5 - len(rest)))
        try:
            return cls(
                name=name,
                cpus=float(cpus) if cpus else None,
                memory_bytes=parse_bytes(memory) if memory else None,
                gpus=int(gpus) if gpus else None,
                gpu_memory_bytes=parse_bytes(gpu_memory) if gpu_memory else 0,
                gpu_model=model,
            )
        except ValueError as error:
            raise SpecError(f"the cpus and gpus of node {text!r} must be numbers") from error

    def __str__(self) -> str:
        if not self.sized:
            return self.name
        memory = "" if self.memory_bytes is None else format_bytes(self.memory_bytes)
        text = f"{self.name}:{'' if self.cpus is None else repr(self.cpus)}:{memory}"
        if self.gpus is None:
            return text
        gpu_memory = format_bytes(self.gpu_memory_bytes) if self.gpu_memory_bytes else ""
        return f"{text}:{self.gpus}:{gpu_memory}:{self.gpu_model}"

    @property
    def sized(self) -> bool:
        """Whether it names how much it offers."""
        return self.cpus is not None or self.memory_bytes is not None or self.gpus is not None

    def describe(self) -> str:
        """Return what it offers, for people, e.g. ``1 cpus, 512MiB``."""
        named = [] if self.cpus is None else [f"{self.cpus:g} cpus"]
        named += [] if self.memory_bytes is None else [format_bytes(self.memory_bytes)]
        named += [] if self.gpus is None else [f"{self.gpus} gpus {self.gpu_model}".rstrip()]
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
