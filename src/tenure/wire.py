"""The one schema spoken between CLI, broker and agent: nouns as JSON lines over a Unix socket.

Each line is one message, at most `MAX_LINE_BYTES`:

    {"id": 7, "op": "renew", "args": {…}}              a call
    {"id": 7, "result": …}                             its answer
    {"id": 7, "error": {"kind": "NoPlacement", …}}     … or its refusal
    {"note": "lease_event", "data": {…}}               told without being asked

The first call on a connection is `hello` with the protocol version; another version is refused in words.
Here is what clients ask of the broker (`BROKER_OPS`), each operation with its arguments and its result. Not here: what the
broker orders of agents (`orders`), how both are written as JSON (`codec`), sockets (`sockets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tenure.events import Event
from tenure.frames import OpenSession, SessionAt
from tenure.jobs import Command
from tenure.leases import EndReason, Lease, RightSize
from tenure.nodes import AddNode as AddNode
from tenure.nodes import Node
from tenure.nodes import RemoveNode as RemoveNode
from tenure.protocols import Exit
from tenure.resources import Envelope
from tenure.retention import CollectGarbage, Freed
from tenure.runs import Run, RunState, Stage
from tenure.tenants import Policy, RemoveTenant, Role, SetPolicy, SetRole, TenantView
from tenure.trials import Recommendation, Trial
from tenure.usage import Usage

VERSION = 1
MAX_LINE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation: its arguments' dataclass and its result's type."""

    args: type
    result: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing:
    """No arguments, or no result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First call on every connection."""

    version: int = VERSION
    who: str = "client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Answer to `hello`."""

    version: int
    who: str
    pid: int
    fence: int = 0
    """The broker's own fence; 0 from an agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitRun:
    """Record a run. Doing it again with the same run changes nothing."""

    run: Run


@dataclass(frozen=True, slots=True, kw_only=True)
class SetStage:
    """Record a stage's state, fingerprint, artefacts."""

    run_id: str
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRun:
    """Record a run's state."""

    run_id: str
    state: RunState
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GangMember:
    """One lease of a gang."""

    worker: int
    envelope: Envelope
    command: Command


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestGang:
    """Ask for leases, all or none. `gang_id` is the idempotency key. Raises NoPlacement when no node could ever hold them;
    otherwise they queue for at most `queue_s`, then end `cancelled`. With `starts_at_s` it is a reservation: room is kept from
    then on; raises Refused when no node will have it."""

    gang_id: str
    run_id: str
    stage: str
    tenant: str = "default"
    members: tuple[GangMember, ...]
    queue_s: float = 60.0
    """From `starts_at_s` on, where that is set."""
    starts_at_s: float = 0.0
    """UTC; 0 for now."""
    right_size: RightSize = RightSize.OFF
    resumes: int = 0
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Values of the secrets that commands name, of a tenant of a shared home; kept in the broker's memory alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRef:
    """Name a lease."""

    lease_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitLeases:
    """Answer when every named lease is active or ended (`until="active"`), or ended (`until="ended"`), or after `timeout_s`,
    with the leases as they then are."""

    lease_ids: tuple[str, ...]
    until: str = "ended"
    timeout_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """Move a lease's slot end to now + `for_s`, at most its total."""

    lease_id: str
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resize:
    """Change a lease's CPU, memory and disk live."""

    lease_id: str
    envelope: Envelope


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """End leases: SIGTERM, the grace, SIGKILL."""

    lease_ids: tuple[str, ...]
    reason: EndReason = EndReason.RELEASED
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exec:
    """Run a command inside a lease, without a terminal; of the broker and of the agent. It is ended after `timeout_s`
    (Unavailable). Unlike every other operation, doing it again runs it again. Raises Conflict when nothing runs there."""

    lease_id: str
    argv: tuple[str, ...]
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Nudge:
    """Have the broker look into a stage's ``store/events`` now instead of within a second."""

    run_id: str
    stage: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ListLeases:
    """Select leases; empty fields select all."""

    run_id: str = ""
    stage: str = ""
    tenant: str = ""
    live: bool = False
    """Only those that have not ended."""
    max_leases: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ListEvents:
    """Events after `after_seq`, oldest first."""

    after_seq: int = 0
    run_id: str = ""
    max_events: int = 1000
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRuns:
    """Runs, newest first."""

    run_id: str = ""
    max_runs: int = 100
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordTrial:
    """Keep a trial. Its id is the idempotency key."""

    trial: Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class ListTrials:
    """Trials, oldest first; empty fields select all."""

    fingerprint: str = ""
    run_id: str = ""
    max_trials: int = 10_000
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRecommendation:
    """Keep a recommendation. Its id is the idempotency key."""

    recommendation: Recommendation


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRecommendations:
    """Recommendations of a run, oldest first."""

    run_id: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeBackup:
    """Write what the ledger holds to a file of the broker's machine. Only for the broker's own user. Raises Conflict when the
    file is there (unless `force`), Refused when it cannot be written."""

    path: str
    """Absolute."""
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backup:
    """A backup file and what it holds."""

    path: str
    schema: str
    """The ledger's schema when it was made, e.g. ``0002``."""
    made_at_s: float
    rows: Mapping[str, int]
    """Table -> how many rows."""
    sha256: str
    """Over all its lines but the last, unpacked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """Exit code and output (as text, undecodable bytes replaced) of a command run inside a lease."""

    code: int
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseView:
    """A lease with what is known of its attempts."""

    lease: Lease
    usage: Usage | None = None
    exits: tuple[Exit, ...] = ()
    """One per ended attempt, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsagePoint:
    """A rollup of one lease's consumption."""

    lease_id: str
    at_s: float
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The broker in one answer."""

    fence: int
    leases: int
    clients: int
    nodes: tuple[Node, ...] = ()
    persistent: bool = False
    """Started by `tenure up`: stays when nobody is left."""
    unreached: Mapping[str, str] = field(default_factory=dict)
    """Node -> why it can't be used now, e.g. who holds the machine."""
    order: str = "fifo"
    """By which order of the queue it grants."""
    tenant: str = ""
    """Who asks, in a shared home; empty in a home of one's own."""
    role: Role = Role.ADMIN


BROKER_OPS: Mapping[str, Op] = {
    "hello": Op(args=Hello, result=Welcome),
    "status": Op(args=Nothing, result=Status),
    "add_node": Op(args=AddNode, result=Node),
    "remove_node": Op(args=RemoveNode, result=Nothing),
    "submit_run": Op(args=SubmitRun, result=Run),
    "set_stage": Op(args=SetStage, result=Nothing),
    "set_run": Op(args=SetRun, result=Nothing),
    "runs": Op(args=ListRuns, result=tuple[Run, ...]),
    "request_gang": Op(args=RequestGang, result=tuple[Lease, ...]),
    "wait_leases": Op(args=WaitLeases, result=tuple[LeaseView, ...]),
    "lease": Op(args=LeaseRef, result=LeaseView),
    "leases": Op(args=ListLeases, result=tuple[Lease, ...]),
    "renew": Op(args=Renew, result=Lease),
    "resize": Op(args=Resize, result=Lease),
    "release": Op(args=Release, result=Nothing),
    "exec": Op(args=Exec, result=ExecResult),
    "open_session": Op(args=OpenSession, result=SessionAt),
    "live": Op(args=Nothing, result=tuple[LeaseView, ...]),
    "set_policy": Op(args=SetPolicy, result=Nothing),
    "policies": Op(args=Nothing, result=dict[str, Policy]),
    "tenants": Op(args=Nothing, result=tuple[TenantView, ...]),
    "set_role": Op(args=SetRole, result=Nothing),
    "remove_tenant": Op(args=RemoveTenant, result=Nothing),
    "home_volume": Op(args=Nothing, result=str),
    "nudge": Op(args=Nudge, result=Nothing),
    "events": Op(args=ListEvents, result=tuple[Event, ...]),
    "usage": Op(args=LeaseRef, result=tuple[UsagePoint, ...]),
    "record_trial": Op(args=RecordTrial, result=Nothing),
    "trials": Op(args=ListTrials, result=tuple[Trial, ...]),
    "record_recommendation": Op(args=RecordRecommendation, result=Nothing),
    "recommendations": Op(args=ListRecommendations, result=tuple[Recommendation, ...]),
    "collect_garbage": Op(args=CollectGarbage, result=tuple[Freed, ...]),
    "backup": Op(args=MakeBackup, result=Backup),
    "shutdown": Op(args=Nothing, result=Nothing),
}
