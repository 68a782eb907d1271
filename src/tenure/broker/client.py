"""The broker's client: finds the home's broker, or starts one, and offers each operation as a method.

Cheap to import: no SQL, no event loop. Safe to share between threads: each call takes an idle connection or opens one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tenure import wire
from tenure.errors import Conflict, CorruptData, TenureError, Unavailable
from tenure.events import Event
from tenure.frames import OpenSession, SessionAt
from tenure.homes import check_owner, check_user, is_guest, socket_dir
from tenure.leases import EndReason, Lease
from tenure.nodes import Node
from tenure.resources import Envelope
from tenure.retention import CollectGarbage, Freed
from tenure.runs import Run, RunState, Stage
from tenure.sockets import LineClient
from tenure.tenants import Policy, RemoveTenant, Role, SetPolicy, SetRole, TenantView
from tenure.trials import Recommendation, Trial

START_MAX_S = 15.0
BACKUP_MAX_S = 3600.0
MAX_IDLE_CONNECTIONS = 8
EXIT_HELD = 75
"""Exit code of a broker that found its home held by another."""
EXIT_REASONS: Mapping[int, type[TenureError]] = {77: CorruptData, 78: Conflict}
"""Exit code of a broker that could not start -> what its client raises; Unavailable for any other code."""


def connect(home: Path, *, start: bool = True, who: str = "client") -> BrokerClient:
    """Return a client of the home's broker. start: start one when none answers.

    Raises Unavailable when none answers and none may or can be started within START_MAX_S, with the end of its log.
    """
    return BrokerClient(home.resolve(), start=start, who=who)


def start_broker(home: Path, *, persistent: bool = False, nodes: Sequence[str] = (), confine: str = "auto") -> None:
    """Start a broker that outlives this process, unless one answers, and return once it does.

    persistent: it stays when nobody is left. nodes: ``name`` or ``name:cpus:memory`` each; by default those of a broker that
    died here, else ``local`` with the whole machine; none for one that is to stay. Raises Unavailable with the end of
    ``broker.log``, CorruptData or Conflict when that is what kept it from starting, SpecError when the home is another user's.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    if is_guest(home):
        if _answers(home):
            return
        raise Unavailable(f"no broker is up in {home}, which all users of this machine share: have root say tenure up --shared")
    check_owner(home)
    end_s = time.monotonic() + START_MAX_S
    with _start_lock(home, end_s):
        if _answers(home):
            return
        log = home / "broker.log"
        argv = [sys.executable, "-m", "tenure.broker", "--home", str(home), "--confine", confine]
        argv += ["--persistent"] * persistent + [word for node in nodes for word in ("--node", node)]
        said_from = log.stat().st_size if log.exists() else 0
        process = _spawn(argv, log)
        while time.monotonic() < end_s:
            if _answers(home):
                # It is meant to outlive us; whoever inherits it reaps it.
                process.returncode = 0
                return
            code = process.poll()
            if code == EXIT_HELD and not _lock_held(home):
                process = _spawn(argv, log)  # an earlier broker was just leaving
            elif code not in (None, EXIT_HELD):
                break
            time.sleep(0.02)
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.returncode = 0 if process.returncode is None else process.returncode
    with log.open("rb") as stream:
        stream.seek(max(said_from, log.stat().st_size - 2000))
        tail = stream.read().decode(errors="replace").strip()
    kind = EXIT_REASONS.get(process.returncode, Unavailable)
    raise kind(f"the broker of home {home} could not start, or not within {START_MAX_S:g} s. Its log ({log}) ends:\n{tail}")


def _spawn(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600)) as stream:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True, cwd="/")


@contextlib.contextmanager
def _start_lock(home: Path, end_s: float) -> Iterator[None]:
    """Only one client starts a broker at a time."""
    descriptor = os.open(home / "broker-start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    raise Unavailable(f"another process has been starting the broker of home {home} for too long") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _lock_held(home: Path) -> bool:
    """Whether some broker lives, perhaps one that is just leaving or has not yet begun to listen."""
    try:
        descriptor = os.open(home / "broker.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(home: Path, who: str) -> LineClient:
    check_user(home)
    path = socket_dir(home) / "broker.sock"
    return LineClient(path, wire.BROKER_OPS, who=who, timeout_s=30.0, server_uids={os.geteuid(), home.stat().st_uid})


def _answers(home: Path) -> bool:
    try:
        _open(home, "starter").close()
    except Unavailable:
        return False
    return True


class BrokerClient:
    """Each method is the operation of that name in `wire.BROKER_OPS` and raises what the broker raises.

    A call that finds the broker dead is made once more, on a broker started anew: every operation is idempotent, but `exec`
    and `open_session`.
    """

    def __init__(self, home: Path, *, start: bool = True, who: str = "client") -> None:
        self.home = home
        self._start, self._who = start, who
        self._lock = threading.Lock()
        self._idle: list[LineClient] = []
        self._closed = False
        self._give_back(self._connection())

    def __enter__(self) -> BrokerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _connection(self) -> LineClient:
        with self._lock:
            if self._closed:
                raise Unavailable("this client was closed")
            if self._idle:
                return self._idle.pop()
        try:
            return _open(self.home, self._who)
        except Unavailable:
            if not self._start:
                raise Unavailable(f'no broker answers for home {self.home}; start one with "tenure up"') from None
        start_broker(self.home)
        return _open(self.home, self._who)

    def _give_back(self, connection: LineClient) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def _call(self, op: str, args: Any, *, timeout_s: float = 60.0, once: bool = False) -> Any:
        for again in (False,) if once else (True, False):
            connection = self._connection()
            try:
                result = connection.call(op, args, timeout_s=timeout_s)
            except Unavailable:
                alive = self._is_alive(connection)
                if alive or not again or not self._start:
                    raise  # the broker's own answer, or its second failure
                self._drop_idle()
                continue
            except BaseException as error:
                if isinstance(error, Exception):
                    self._give_back(connection)
                else:
                    connection.close()  # interrupted in the middle: half an answer may be on its way
                raise
            self._give_back(connection)
            return result
        raise AssertionError("unreachable")

    def _is_alive(self, connection: LineClient) -> bool:
        try:
            connection.call("status", wire.Nothing(), timeout_s=5.0)
        except (Unavailable, OSError, ValueError):
            connection.close()
            return False
        self._give_back(connection)
        return True

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def status(self) -> wire.Status:
        """Return the broker in one answer."""
        return self._call("status", wire.Nothing())  # type: ignore[no-any-return]

    def add_node(
        self,
        name: str,
        *,
        cpus: float | None = None,
        memory_bytes: int | None = None,
        gpus: int | None = None,
        gpu_memory_bytes: int = 0,
        gpu_model: str = "",
        order: str = "",
        metrics_port: int = 0,
    ) -> Node:
        """Have a node offer a part of this machine, and the broker stay; return the node.

        gpus, gpu_memory_bytes, gpu_model: see wire.AddNode. order: by which order of the queue to grant from now on; empty: as
        before. metrics_port: where metrics are read from now on; 0: as before. Raises Refused, Conflict, SpecError.
        """
        args = wire.AddNode(
            name=name,
            cpus=cpus,
            memory_bytes=memory_bytes,
            gpus=gpus,
            gpu_memory_bytes=gpu_memory_bytes,
            gpu_model=gpu_model,
            order=order,
            metrics_port=metrics_port,
        )
        return self._call("add_node", args)  # type: ignore[no-any-return]

    def remove_node(self, name: str) -> None:
        """Release a node's leases, end its agent, have its part free. Raises Unavailable when it takes too long."""
        self._call("remove_node", wire.RemoveNode(name=name), timeout_s=120.0)

    def submit_run(self, run: Run) -> Run:
        """Record a run; return it as recorded."""
        return self._call("submit_run", wire.SubmitRun(run=run))  # type: ignore[no-any-return]

    def set_stage(self, run_id: str, stage: Stage) -> None:
        """Record a stage as it now is. Raises NotFound."""
        self._call("set_stage", wire.SetStage(run_id=run_id, stage=stage))

    def set_run(self, run_id: str, state: RunState, why: str = "") -> None:
        """Record a run's state. Raises NotFound."""
        self._call("set_run", wire.SetRun(run_id=run_id, state=state, why=why))

    def runs(self, *, run_id: str = "", max_runs: int = 100) -> tuple[Run, ...]:
        """Return runs, newest first."""
        return self._call("runs", wire.ListRuns(run_id=run_id, max_runs=max_runs))  # type: ignore[no-any-return]

    def request_gang(self, request: wire.RequestGang) -> tuple[Lease, ...]:
        """Ask for leases, all or none. Raises NoPlacement, Refused."""
        if is_guest(self.home):  # that broker has none of our environment
            names = {name for member in request.members for name in member.command.secrets}
            request = replace(request, secrets={name: os.environ[name] for name in sorted(names) if name in os.environ})
        return self._call("request_gang", request)  # type: ignore[no-any-return]

    def wait_leases(
        self, lease_ids: Sequence[str], *, until: str = "ended", timeout_s: float = 30.0
    ) -> tuple[wire.LeaseView, ...]:
        """Return the leases once all are active (or ended), or as they are after `timeout_s` (at most 600 s)."""
        args = wire.WaitLeases(lease_ids=tuple(lease_ids), until=until, timeout_s=timeout_s)
        return self._call("wait_leases", args, timeout_s=min(timeout_s, 600.0) + 30.0)  # type: ignore[no-any-return]

    def lease(self, lease_id: str) -> wire.LeaseView:
        """Return one lease with its exits and usage. Raises NotFound."""
        return self._call("lease", wire.LeaseRef(lease_id=lease_id))  # type: ignore[no-any-return]

    def leases(
        self, *, run_id: str = "", stage: str = "", tenant: str = "", live: bool = False, max_leases: int = 1000
    ) -> tuple[Lease, ...]:
        """Return leases, newest first; empty fields select all."""
        args = wire.ListLeases(run_id=run_id, stage=stage, tenant=tenant, live=live, max_leases=max_leases)
        return self._call("leases", args)  # type: ignore[no-any-return]

    def renew(self, lease_id: str, for_s: float) -> Lease:
        """Move a lease's slot end to now + `for_s`, at most its total. Raises IllegalChange."""
        return self._call("renew", wire.Renew(lease_id=lease_id, for_s=for_s))  # type: ignore[no-any-return]

    def resize(self, lease_id: str, envelope: Envelope) -> Lease:
        """Change a lease's CPU, memory and disk live. Raises Refused."""
        return self._call("resize", wire.Resize(lease_id=lease_id, envelope=envelope))  # type: ignore[no-any-return]

    def release(self, lease_ids: Sequence[str], *, reason: EndReason = EndReason.RELEASED, why: str = "") -> None:
        """Ask leases to end; returns at once."""
        self._call("release", wire.Release(lease_ids=tuple(lease_ids), reason=reason, why=why))

    def exec(self, lease_id: str, argv: Sequence[str], *, timeout_s: float) -> wire.ExecResult:
        """Run a command inside a lease. Raises NotFound, Conflict, Unavailable when it did not end in time."""
        args = wire.Exec(lease_id=lease_id, argv=tuple(argv), timeout_s=timeout_s)
        return self._call("exec", args, timeout_s=timeout_s + 30.0, once=True)  # type: ignore[no-any-return]

    def open_session(self, args: OpenSession) -> SessionAt:
        """Begin a command inside a lease to talk to. Raises NotFound, Conflict, Unsupported, Refused."""
        return self._call("open_session", args, timeout_s=60.0, once=True)  # type: ignore[no-any-return]

    def live(self) -> tuple[wire.LeaseView, ...]:
        """Return every lease that has not ended with its latest usage, oldest request first; exits are left out."""
        return self._call("live", wire.Nothing())  # type: ignore[no-any-return]

    def set_policy(self, tenant: str, policy: Policy | None) -> None:
        """Have a policy hold for a tenant from now on; None takes its own away."""
        self._call("set_policy", SetPolicy(tenant=tenant, policy=policy))

    def policies(self) -> dict[str, Policy]:
        """Return the policies that were set, by tenant; `tenants.EVERYBODY` for who has none of their own."""
        return self._call("policies", wire.Nothing())  # type: ignore[no-any-return]

    def tenants(self) -> tuple[TenantView, ...]:
        """Return the tenants with what they hold; to a tenant itself alone."""
        return self._call("tenants", wire.Nothing())  # type: ignore[no-any-return]

    def set_role(self, tenant: str, role: Role) -> None:
        """Have a user be an admin, or a tenant as any other. Raises NotFound, Conflict, Refused."""
        self._call("set_role", SetRole(tenant=tenant, role=role))

    def remove_tenant(self, tenant: str) -> None:
        """Have a tenant's name be free. Raises NotFound, Conflict, Refused."""
        self._call("remove_tenant", RemoveTenant(tenant=tenant))

    def home_volume(self) -> str:
        """Return where the caller's home volume lies, made when missing."""
        return self._call("home_volume", wire.Nothing())  # type: ignore[no-any-return]

    def nudge(self, run_id: str, stage: str) -> None:
        """Have the broker look into a stage's events now."""
        self._call("nudge", wire.Nudge(run_id=run_id, stage=stage))

    def events(self, *, after_seq: int = 0, run_id: str = "", max_events: int = 1000) -> tuple[Event, ...]:
        """Return events after `after_seq`, oldest first."""
        args = wire.ListEvents(after_seq=after_seq, run_id=run_id, max_events=max_events)
        return self._call("events", args)  # type: ignore[no-any-return]

    def usage(self, lease_id: str) -> tuple[wire.UsagePoint, ...]:
        """Return a lease's rollups, oldest first. Raises NotFound."""
        return self._call("usage", wire.LeaseRef(lease_id=lease_id))  # type: ignore[no-any-return]

    def record_trial(self, trial: Trial) -> None:
        """Keep a trial, once per id."""
        self._call("record_trial", wire.RecordTrial(trial=trial))

    def trials(self, *, fingerprint: str = "", run_id: str = "", max_trials: int = 10_000) -> tuple[Trial, ...]:
        """Return trials, oldest first; empty fields select all."""
        args = wire.ListTrials(fingerprint=fingerprint, run_id=run_id, max_trials=max_trials)
        return self._call("trials", args)  # type: ignore[no-any-return]

    def record_recommendation(self, recommendation: Recommendation) -> None:
        """Keep a recommendation, once per id."""
        self._call("record_recommendation", wire.RecordRecommendation(recommendation=recommendation))

    def recommendations(self, *, run_id: str = "") -> tuple[Recommendation, ...]:
        """Return recommendations, oldest first."""
        return self._call("recommendations", wire.ListRecommendations(run_id=run_id))  # type: ignore[no-any-return]

    def collect_garbage(self, asked: CollectGarbage) -> tuple[Freed, ...]:
        """Remove what is old, or say what would go; return it by kind. May take minutes, at most an hour."""
        return self._call("collect_garbage", asked, timeout_s=3600.0)  # type: ignore[no-any-return]

    def backup(self, path: str, *, force: bool = False) -> wire.Backup:
        """Have the broker write what the ledger holds to a file. path: absolute. Raises Conflict, Refused."""
        return self._call("backup", wire.MakeBackup(path=path, force=force), timeout_s=BACKUP_MAX_S)  # type: ignore[no-any-return]

    def shutdown(self) -> None:
        """End every lease, the agents and the broker."""
        self._call("shutdown", wire.Nothing(), timeout_s=60.0)
