"""What the runtimes whose attempts have a shim of Tenure share: leases' files, orders, fences, exits.

Each attempt has a shim (`shim`), forked from a warm server (`forkserver`), with its state on disk (`state`), so that a runtime
made anew after `kill -9` finds all of it again by pid + start time. A runtime adds what confines its commands: the plan of an
attempt, its consumption, its live bounds, a command inside, and what to do about an attempt whose shim has died.
Not for: deadlines of nodes, sockets (`agent`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tenure import codec
from tenure.errors import Conflict, NotFound, SpecError, StaleFence, TenureError, Unavailable, Unsupported
from tenure.protocols import MACHINE_RESTARTED, Clock, Exit, ExitKind, RuntimeHandle, Session, StartSpec, SystemClock, Window
from tenure.resources import Bound, Envelope
from tenure.runtimes import pidfds, procfs
from tenure.runtimes.acting import acting_as, actor_from, actor_of, open_regular
from tenure.runtimes.environment import lease_file
from tenure.runtimes.forkserver import ForkServer
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.state import LeaseFiles, read_json, term_file, write_json
from tenure.usage import Usage


class ShimmedRuntime(ABC):
    """See `protocols.Runtime`. One of a kind per node: `state_dir` is private to it."""

    name: ClassVar[str]

    def __init__(
        self,
        state_dir: Path | str,
        *,
        clock: Clock | None = None,
        fork_server: ForkServer | None = None,
        term_dir: Path | str | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        """state_dir: absolute or relative; made when missing. fork_server: of another runtime, which ends it; None: an own one.

        term_dir: where the node's term lies; None: in `state_dir`. gpus: the node's; None: it has none.
        """
        self._gpus = gpus or Gpus()
        self._state_dir = Path(state_dir).absolute()
        self._term_file = term_file(Path(term_dir).absolute() if term_dir else self._state_dir)
        (self._state_dir / "leases").mkdir(parents=True, exist_ok=True)
        for lease_id in self.known():
            if not LeaseFiles(self._state_dir, lease_id).spec.exists():  # its agent died while it made or removed the folder
                shutil.rmtree(self._state_dir / "leases" / lease_id, ignore_errors=True)
        self._clock = clock or SystemClock()
        self._boot_id = self._clock.boot_id()
        self._owns_fork_server = fork_server is None
        self._fork_server = fork_server or ForkServer(self._state_dir / "shims.log")
        self._locks: dict[str, threading.RLock] = {}
        self._locks_lock = threading.Lock()

    def close(self) -> None:
        """End the fork server. Attempts and their shims live on; a later runtime attaches to them."""
        if self._owns_fork_server:
            self._fork_server.close()

    @property
    def fork_server_pid(self) -> int:
        """Of the warm server, for tests and people."""
        return self._fork_server.pid

    @property
    def state_dir(self) -> Path:
        """Where everything about the runtime's leases lies."""
        return self._state_dir

    @property
    def fork_server(self) -> ForkServer:
        """The warm server, for a further runtime of the same node."""
        return self._fork_server

    # --- what a runtime adds ---

    @abstractmethod
    def bounds(self) -> Mapping[str, Bound]:
        """Return how each envelope field is held here."""

    @abstractmethod
    def confinement(self) -> str:
        """Return one sentence on the means."""

    @abstractmethod
    def usage(self, handle: RuntimeHandle) -> Usage:
        """Return the attempt's consumption so far; for an ended one its last counters. Raises NotFound."""

    @abstractmethod
    def resize(self, handle: RuntimeHandle, envelope: Envelope, *, fence: int) -> None:
        """Change CPU, memory and disk bounds live. Raises StaleFence, Conflict when the attempt has ended, Refused."""

    @abstractmethod
    def exec(self, handle: RuntimeHandle, argv: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
        """Run a command inside the lease's bounds; return exit code and output (its first MiB)."""

    @abstractmethod
    def pids(self, handle: RuntimeHandle) -> frozenset[int]:
        """Return the attempt's processes, as this machine numbers them; none of one that has ended. Raises NotFound."""

    def session(self, handle: RuntimeHandle, argv: Sequence[str], *, window: Window | None) -> Session:
        """See `protocols.Runtime`."""
        raise Unsupported("exec", f"nobody can talk to a command inside a lease of the {self.name} runtime", "Leave -i and -t.")

    @abstractmethod
    def _check(self, spec: StartSpec) -> None:
        """Raise Unsupported for what this runtime cannot honour, SpecError for what is wrong."""

    @abstractmethod
    def _plan(self, files: LeaseFiles, spec: StartSpec) -> dict[str, Any]:
        """Return what the shim needs: spec, env, folder, term_file, confinement, uid, gid, gpu, and the runtime's own."""

    @abstractmethod
    def _end_leftovers(self, last: Mapping[str, Any]) -> int:
        """Kill what a lost shim has left of its attempt; return how many processes would not die."""

    @abstractmethod
    def _remove(self, last: Mapping[str, Any]) -> None:
        """Remove what the attempt had of the machine besides processes and files. Nothing happens when it is gone."""

    # --- start ---

    def start(self, spec: StartSpec) -> RuntimeHandle:
        """Start an attempt and return once its program runs.

        Raises Unsupported, Conflict (it still runs), StaleFence, SpecError (the program cannot be executed), Unavailable.
        """
        self._check(spec)
        with self._lock(spec.lease_id):
            files = LeaseFiles(self._state_dir, spec.lease_id)
            self._make_room(files, spec)
            actor = actor_of(spec.user)
            plan = self._plan(files, spec) | {"acting": actor.to_plan() if actor else None}
            self._prepare(files, spec, plan)
            report = self._fork(files, plan)
            if "error" in report:
                error = self._start_error(spec, report)
                self._record(files, ExitKind.FAILED, f"never started: {error}", None, None)
                raise error
            return _handle(spec.lease_id, plan["spec"], report)

    def _start_error(self, spec: StartSpec, report: Mapping[str, Any]) -> TenureError:
        """Return the error for a start that failed, as its shim reported it."""
        found = f"lease {spec.lease_id}: {' '.join(spec.argv[:3])!r} could not be started: {report['error']}"
        if report.get("step") == "exec":
            return SpecError(f"{found}; give a program that exists and may be executed, or its full path")
        return Unavailable(f"{found} (while it was to {report.get('step')})")

    def _make_room(self, files: LeaseFiles, spec: StartSpec) -> None:
        control = read_json(files.control)
        check_fence(spec.lease_id, control, spec.fence)
        last = read_json(files.spec)
        if last is None:
            files.root.mkdir(parents=True, exist_ok=True)
            return
        if spec.attempt <= int(last["attempt"]):
            raise Conflict(
                f"lease {spec.lease_id} has had attempt {last['attempt']}; the order for {spec.attempt} came too late"
            )
        if self._runs(last, read_json(files.shim)):
            raise Conflict(f"lease {spec.lease_id} still runs attempt {last['attempt']}; stop it before starting another")
        self._settle(files, last)
        if self._runs(last, read_json(files.shim)):
            raise Conflict(f"lease {spec.lease_id} has just begun attempt {last['attempt']} after all; it is being stopped")
        files.root.mkdir(parents=True, exist_ok=True)
        files.set_aside(int(last["attempt"]))

    def _prepare(self, files: LeaseFiles, spec: StartSpec, plan: dict[str, Any]) -> None:
        actor = actor_from(plan.get("acting"))
        try:
            with acting_as(actor):
                for folder in (spec.worker_dir, spec.workdir, os.path.dirname(spec.log_path)):
                    os.makedirs(folder, exist_ok=True)
            if actor is None and plan["uid"] is not None:
                os.chown(spec.worker_dir, plan["uid"], plan["gid"])
        except OSError as error:
            raise SpecError(f"lease {spec.lease_id}: its folders cannot be made: {error}") from error
        kept = {key: value for key, value in plan.items() if key != "env"}
        kept["spec"] = dict(plan["spec"], env=sorted(spec.env))
        write_json(files.spec, dict(kept, attempt=spec.attempt, fence=spec.fence, boot_id=spec.boot_id))
        control = {
            "attempt": spec.attempt,
            "fence": spec.fence,
            "deadline_boot_s": spec.deadline_boot_s,
            "envelope": plan["spec"]["envelope"],
            "stop": None,
        }
        write_json(files.control, control)
        self._tell_job(spec.lease_id, kept, control)

    def _fork(self, files: LeaseFiles, plan: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._fork_server.start(plan)
        except Unavailable:
            self._withdraw(files, "its start timed out")
            raise

    def _tell_job(self, lease_id: str, kept: Mapping[str, Any], control: Mapping[str, Any]) -> None:
        """Rewrite the job's own copy, `lease.json` in its worker folder. A folder the job removed is its own loss."""
        actor = actor_from(kept.get("acting"))
        told = lease_file(lease_id, kept, control, bounds=self.bounds())
        with contextlib.suppress(FileNotFoundError if actor is None else OSError), acting_as(actor):
            write_json(f"{kept['spec']['worker_dir']}/lease.json", told, mode=0o644)

    # --- find ---

    def attach(self, lease_id: str) -> RuntimeHandle:
        """Return the handle of a lease's last attempt, running or not. Raises NotFound."""
        files, last = self._last(lease_id)
        return _handle(lease_id, last["spec"], read_json(files.shim) or {})

    def list(self) -> Sequence[RuntimeHandle]:
        """Return the handles of all attempts whose shim is alive."""
        found = []
        for lease_id in self.known():
            with contextlib.suppress(NotFound):
                files, last = self._last(lease_id)
                shim = read_json(files.shim)
                if self._runs(last, shim):
                    found.append(_handle(lease_id, last["spec"], shim or {}))
        return found

    def known(self) -> Sequence[str]:
        """Return the ids of all leases that the runtime keeps something of, ended ones included."""
        return sorted(os.listdir(self._state_dir / "leases"))

    def has(self, lease_id: str) -> bool:
        """Return whether the runtime keeps something of a lease."""
        return LeaseFiles(self._state_dir, lease_id).spec.exists()

    def gpu(self, lease_id: str) -> Mapping[str, Any]:
        """Return what a lease's last attempt was given of the node's GPUs (`GpuGrant.to_plan`). Raises NotFound."""
        found: Mapping[str, Any] = self._last(lease_id)[1].get("gpu") or {}
        return found

    def newest_fence(self, lease_id: str) -> int:
        """Return the newest fence seen for a lease. Raises NotFound."""
        files, last = self._last(lease_id)
        return int((read_json(files.control) or last)["fence"])

    def logs(self, handle: RuntimeHandle, *, max_bytes: int = 65536) -> bytes:
        """Return the end of the attempt's output. Raises NotFound."""
        _, last = self._last(handle.lease_id)
        try:
            with acting_as(actor_from(last.get("acting"))):
                descriptor = open_regular(last["spec"]["log_path"], os.O_RDONLY)
            with os.fdopen(descriptor, "rb") as stream:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - max_bytes))
                return stream.read(max_bytes)
        except FileNotFoundError:
            return b""

    # --- orders ---

    def renew(self, handle: RuntimeHandle, *, deadline_boot_s: float, fence: int) -> None:
        """Move the deadline. Raises StaleFence, Conflict when the attempt has ended."""
        self._order(handle, fence, deadline_boot_s=deadline_boot_s)

    def stop(
        self, handle: RuntimeHandle, *, grace_s: float, fence: int, kind: ExitKind = ExitKind.STOPPED, why: str = ""
    ) -> None:
        """Ask the attempt to leave, and end it after the grace. Returns at once; nothing happens to one that has ended.

        why: kept in the exit record as its witness. Raises StaleFence, NotFound.
        """
        try:
            self._order(handle, fence, stop={"kind": kind.value, "grace_s": grace_s, "why": why or "on order"})
        except StaleFence:
            raise
        except Conflict:
            return  # it has ended

    def _order(self, handle: RuntimeHandle, fence: int, **fields: Any) -> None:
        with self._lock(handle.lease_id):
            files, _ = self._last(handle.lease_id)
            check_fence(handle.lease_id, read_json(files.control), fence)
            files, last = self._running(handle)
            control = dict(read_json(files.control) or {}, fence=fence, **fields)
            write_json(files.control, control)
            self._tell_job(handle.lease_id, last, control)
            pidfds.send(handle.pid, handle.start_ticks, signal.SIGHUP)

    # --- end ---

    def wait(self, handle: RuntimeHandle, timeout_s: float) -> Exit | None:
        """Return the exit record, or None when the attempt still runs after `timeout_s`. Raises NotFound."""
        if (ended := self._ended(handle)) is not None:
            return ended
        pidfds.wait(handle.pid, handle.start_ticks, timeout_s)
        return self._ended(handle)

    def forget(self, lease_id: str) -> None:
        """Remove what is kept of an ended lease. Nothing happens to an unknown one. Raises Conflict while it runs."""
        with self._lock(lease_id):
            try:
                files, last = self._last(lease_id)
            except NotFound:
                return
            if self._runs(last, read_json(files.shim)):
                raise Conflict(f"lease {lease_id} still runs; stop it before it can be forgotten")
            self._settle(files, last)
            shutil.rmtree(files.root, ignore_errors=True)

    def sample(self, handle: RuntimeHandle) -> Usage | None:
        """Return what its shim last wrote down of an attempt that runs, about once a second; None before it did.

        One file is read: for those who ask of many leases again and again (`usage` reads the kernel's counters now).
        """
        sample = read_json(f"{self._state_dir}/leases/{handle.lease_id}/usage.json")
        return Usage(**sample) if sample else None

    def _ended(self, handle: RuntimeHandle) -> Exit | None:
        with self._lock(handle.lease_id):
            files, last = self._last(handle.lease_id)
            current = int(last["attempt"]) == handle.attempt
            if current and self._runs(last, read_json(files.shim)):
                return None
            if current:
                self._settle(files, last)
            record = read_json(files.exit_of(handle.attempt, int(last["attempt"])))
            if record is None:
                raise NotFound(f"lease {handle.lease_id} has no record of attempt {handle.attempt}")
            ended: Exit = codec.from_builtins(record, Exit)
            return ended

    def _settle(self, files: LeaseFiles, last: dict[str, Any]) -> None:
        """When a shim died without a record: kill what is left of its attempt and write one.

        An attempt whose shim never came up has run nothing: nothing is kept of it, so that it can be ordered again.
        """
        if files.exit.exists():
            self._remove(last)  # its shim may have died right after the record
            return
        shim = read_json(files.shim)
        if shim is None:
            self._withdraw(files, "its agent died before it was started")
            if self._runs(last, read_json(files.shim)):
                return
        left = self._end_leftovers(last)
        self._remove(last)
        if shim is None and not left:
            shutil.rmtree(files.root, ignore_errors=True)
            return
        sample = read_json(files.usage)
        usage = codec.from_builtins(sample, Usage) if sample else None
        if last["boot_id"] != self._boot_id:
            self._record(files, ExitKind.STOPPED, f"{MACHINE_RESTARTED}: nothing of it runs", shim, usage)
            return
        witness = "shim lost: it died without a record" if shim else "shim lost: it never reported a start"
        if left:
            witness += f"; {left} processes would not die"
        self._record(files, ExitKind.FAILED, witness, shim, usage)

    def _withdraw(self, files: LeaseFiles, why: str) -> None:
        """Have a shim that comes up after all not start anything: nobody knows of it."""
        control = read_json(files.control) or {}
        write_json(files.control, dict(control, stop={"kind": "stopped", "grace_s": 0.0, "why": why}))

    def _record(
        self, files: LeaseFiles, kind: ExitKind, witness: str, shim: Mapping[str, Any] | None, usage: Usage | None
    ) -> None:
        now = self._clock.utc_s()
        ended = Exit(
            kind=kind,
            code=int(kind is ExitKind.FAILED),
            witness=witness,
            started_at_s=float((shim or {}).get("started_at_s", now)),
            ended_at_s=now,
            usage=usage,
        )
        write_json(files.exit, codec.to_builtins(ended), sync=True)

    # --- state ---

    def _lock(self, lease_id: str) -> threading.RLock:
        with self._locks_lock:
            return self._locks.setdefault(lease_id, threading.RLock())

    def _last(self, lease_id: str) -> tuple[LeaseFiles, dict[str, Any]]:
        files = LeaseFiles(self._state_dir, lease_id)
        last = read_json(files.spec)
        if last is None:
            raise NotFound(f"no lease {lease_id!r} was ever started on this node, or it was forgotten")
        return files, last

    def _running(self, handle: RuntimeHandle) -> tuple[LeaseFiles, dict[str, Any]]:
        files, last = self._last(handle.lease_id)
        if int(last["attempt"]) != handle.attempt or not self._runs(last, read_json(files.shim)):
            raise Conflict(
                f"attempt {handle.attempt} of lease {handle.lease_id} has ended; nothing in it can be changed or run"
            )
        return files, last

    def _runs(self, last: Mapping[str, Any], shim: Mapping[str, Any] | None) -> bool:
        if shim is None or last["boot_id"] != self._boot_id:
            return False
        return procfs.is_alive(int(shim["pid"]), int(shim["start_ticks"]))


def _handle(lease_id: str, spec: Mapping[str, Any], shim: Mapping[str, Any]) -> RuntimeHandle:
    return RuntimeHandle(
        lease_id=lease_id,
        attempt=int(spec["attempt"]),
        fence=int(spec["fence"]),
        pid=int(shim.get("pid", 0)),
        start_ticks=int(shim.get("start_ticks", 0)),
        started_at_s=float(shim.get("started_at_s", 0.0)),
    )


def check_fence(lease_id: str, control: Mapping[str, Any] | None, fence: int) -> None:
    """Refuse an order older than one already seen. Raises StaleFence."""
    if control is not None and fence < int(control["fence"]):
        raise StaleFence(f"order for lease {lease_id} refused: it carries fence {fence}, the newest seen is {control['fence']}")
