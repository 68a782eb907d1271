"""What the broker orders of a node's agent, what the agent answers, and what it tells unasked; over the same wire.

An order carries the lease's fence: an agent refuses one that is older than what it has seen. Not here: what clients ask of the
broker (`wire`), how either is written as JSON (`codec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tenure.frames import OpenSession, SessionAt
from tenure.nodes import Node
from tenure.protocols import Exit, ExitKind, RuntimeHandle, StartSpec
from tenure.resources import Envelope
from tenure.usage import Usage
from tenure.wire import Exec, ExecResult, Hello, LeaseRef, Nothing, Op, Welcome


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStart:
    """Start one attempt on this node."""

    runtime: str = "process"
    spec: StartSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRenew:
    """Move a running attempt's deadline."""

    lease_id: str
    fence: int
    deadline_boot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentResize:
    """Change a running attempt's bounds."""

    lease_id: str
    fence: int
    envelope: Envelope


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStop:
    """End a running attempt."""

    lease_id: str
    fence: int
    grace_s: float = 5.0
    kind: ExitKind = ExitKind.STOPPED
    why: str = ""
    """Kept in the exit record as its witness."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTerm:
    """Renew the node's term: the agent may act for `term_s` more without hearing from the broker."""

    term_s: float
    broker_fence: int
    """An agent refuses a broker with an older fence than the last it obeyed."""
    ends_boot_s: float = 0.0
    """The node's CLOCK_BOOTTIME past which this term does not go, however late the order arrives: what the broker counts on."""
    boot_id: str = ""
    """Of the boot that `ends_boot_s` is counted in; in another one it says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptView:
    """One attempt on a node: `exit` is None while it runs."""

    handle: RuntimeHandle
    usage: Usage | None = None
    exit: Exit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BootTime:
    """The node's CLOCK_BOOTTIME, so that the broker can turn UTC ends into deadlines."""

    boot_s: float
    utc_s: float
    boot_id: str


AGENT_OPS: Mapping[str, Op] = {
    "hello": Op(args=Hello, result=Welcome),
    "describe": Op(args=Nothing, result=Node),
    "term": Op(args=NodeTerm, result=BootTime),
    "start": Op(args=AgentStart, result=RuntimeHandle),
    "renew": Op(args=AgentRenew, result=Nothing),
    "resize": Op(args=AgentResize, result=Nothing),
    "stop": Op(args=AgentStop, result=Nothing),
    "attempts": Op(args=Nothing, result=tuple[AttemptView, ...]),
    "forget": Op(args=LeaseRef, result=Nothing),
    "exec": Op(args=Exec, result=ExecResult),
    "open_session": Op(args=OpenSession, result=SessionAt),
    "shutdown": Op(args=Nothing, result=Nothing),
}

AGENT_NOTES: Mapping[str, Any] = {"attempt": AttemptView}
"""What an agent tells the broker unasked: usage of a running attempt about once a second, and each exit."""
