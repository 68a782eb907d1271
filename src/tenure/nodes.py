"""A node: a machine, or a part of one, that can hold leases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tenure.resources import Bound, Capacity

TERM_GRACE_S = 5.0
"""SIGTERM to SIGKILL when a node's term ends, whatever grace the lease has: the broker's margin must outlast it."""


class NodeState(StrEnum):
    """Whether the broker may grant on a node."""

    UP = "up"
    DRAINING = "draining"
    """It is being taken out: what it holds goes on to its end, nothing new is granted."""
    UNREACHABLE = "unreachable"
    """Not heard of; its leases may still run until its term is over."""
    LOST = "lost"
    """Its term and margin are over: nothing of it runs any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a measurement ran on. Trials are compared only within `machine_class`."""

    cpu_model: str
    cpu_features: tuple[str, ...] = ()
    """Sorted instruction-set flags that change floating-point results or speed (avx2, avx512f, fma ...)."""
    cores: int = 1
    memory_bytes: int = 0
    gpu_model: str = ""
    gpus: int = 0
    kernel: str = ""
    python: str = ""

    @property
    def machine_class(self) -> str:
        """CPU model, features, cores and GPU model in one line."""
        gpu = f" + {self.gpus}x {self.gpu_model}" if self.gpus else ""
        return f"{self.cpu_model} x{self.cores} [{' '.join(self.cpu_features)}]{gpu}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node as its agent describes it."""

    name: str
    capacity: Capacity
    machine: Machine
    runtimes: tuple[str, ...] = ("process",)
    bounds: Mapping[str, Mapping[str, Bound]] = field(default_factory=dict)
    """runtime -> envelope field -> how it is held here."""
    confinement: Mapping[str, str] = field(default_factory=dict)
    """runtime -> one sentence on how it confines here, e.g. ``cgroup v1: memory, cpu, pids``."""
    state: NodeState = NodeState.UP
    term_s: float = 60.0
    """How long the agent may act without hearing from the broker."""
    held_cpus: float = 0.0
    """What leases hold of it, as the broker counts; 0 from an agent."""
    held_memory_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AddNode:
    """Offer a part of this machine as a node, and stay when nobody is left. Answers once it is up; doing it again changes
    nothing. cpus, memory_bytes: one alone brings the same share of the other, neither offers all that is left. Raises Refused
    with who holds the machine, Conflict when the name has another part; the node is then not kept."""

    name: str
    cpus: float | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    """So many devices; None: all that nobody offers. On a machine without any, so many are declared."""
    gpu_memory_bytes: int = 0
    """Of each declared device."""
    gpu_model: str = ""
    """Of declared devices."""
    order: str = ""
    """By which order of the queue to grant from now on; empty: as before. Raises SpecError for one that does not exist."""
    metrics_port: int = 0
    """Where metrics are read from now on, on the loopback address; 0: as before. Raises Refused for a port in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveNode:
    """Take a node out: its leases, and others of their gangs, are released, its agent ends, its part is free. Doing it again
    changes nothing. Raises Unavailable when that takes too long; it then gets no new lease, and this may be tried again."""

    name: str
