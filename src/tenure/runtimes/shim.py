"""The shim: parent and subreaper of one attempt's processes, from fork to exit record.

    fork server ─fork─► shim (own session; survives agent, fork server and broker)
                         └─fork─► job (waits for the order, joins its groups, drops rights, execs: `job`)

Both are forked ahead of the order; one pair always waits.

It ends the job at the deadline of CLOCK_BOOTTIME (SIGTERM, the grace, SIGKILL), on order, and when a poll finds memory
or disk over its bound; kills every descendant, double-forked ones included (as subreaper they come to it); writes the
exit record; and only then leaves. Standard library and nouns only: it is forked from a small single-threaded process.
Not for: getting ready ahead of the order (`waiting`), choosing how bounds are held (`confiner`), talking to anyone
(`process`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tenure.errors import TenureError
from tenure.nodes import TERM_GRACE_S
from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.acting import acting_as, actor_from
from tenure.runtimes.become import adopt_orphans, own_memory
from tenure.runtimes.confine import Confinement, data_limit_bytes
from tenure.runtimes.memory_height import MemoryHeight
from tenure.runtimes.outcome import read_result, read_tail
from tenure.runtimes.state import read_json, write_json, write_record
from tenure.runtimes.waiting import Waiting, rehearse

CONTROL_EVERY_S = 1.0
MEMORY_EVERY_S = 0.05
"""Between looks at a tree whose memory only polling holds; the first looks come sooner."""
COUNTER_EVERY_S = 0.1
"""Between looks at a cgroup's counters: the kernel holds the bound, the look is for the record."""
DISK_EVERY_S = 0.5
USAGE_EVERY_S = 1.0
LEAVE_DEVICE_MAX_S = 1.0
"""Bound of each of the few questions to a device's MPS daemon before a job is killed; one that hangs delays that no further."""
KILL_MAX_S = 30.0
"""Bound of waiting for killed processes; what is still there then (stuck in the kernel) is named in the record."""
_REFUSED = "Operation not permitted"
"""What a program says of a system call that its profile refuses (EPERM)."""
_MEMORY_ERROR = re.compile(r"[\w.]*MemoryError\b")


def serve(channel: socket.socket, kinds: Mapping[str, type[Shim]]) -> None:
    """Get ready, wait for an order, run its attempt, return when all is over.

    channel: there the plan is read up to its end and the start reported; closed without a plan, nothing is to do.
    kinds: which shim a plan with a key of that name wants; any other gets `Shim`.
    """
    os.setsid()
    adopt_orphans()
    waiting = Waiting()
    own_memory()
    rehearse()
    text = _read_all(channel)
    if text:
        plan = json.loads(text)
        kind = next((kinds[key] for key in kinds if key in plan), Shim)
        kind(plan, text, channel, waiting).run()


def _read_all(channel: socket.socket) -> bytes:
    parts = []
    while part := channel.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Shim:
    """One attempt. `plan`: spec (a StartSpec's fields), env, folder, confinement, uid, gid, netns; `text`: the same as JSON."""

    def __init__(self, plan: dict[str, Any], text: bytes, channel: socket.socket, waiting: Waiting) -> None:
        self._text, self._waiting = text, waiting
        self._spec = plan["spec"]
        self._plan = plan
        self._folder = Path(plan["folder"])
        self._actor = actor_from(plan.get("acting"))
        """Whose rights count where the job may write, when that is another user."""
        self._channel = channel
        self._confinement = Confinement.from_plan(plan["confinement"])
        self._envelope = Envelope(**self._spec["envelope"])
        self._deadline_s = float(self._spec["deadline_boot_s"])
        self._term_s = float("inf")
        self._stop: dict[str, Any] | None = None
        self._job = waiting.job
        self._status: int | None = None
        self._kind = ""
        self._witness = ""
        self._kill_at_s = float("inf")
        self._memory = MemoryHeight()
        self._identity = {"pid": os.getpid(), "start_ticks": waiting.start_ticks, "started_at_s": 0.0, "job_pid": self._job}
        self._log_start_bytes = 0
        self._ended_usage: dict[str, Any] = {}

    def run(self) -> None:
        """Start the job, watch it, end everything, write the record."""
        failure = self._start()
        if failure is None:
            self._report(self._identity)
            self._watch(self._waiting.wakeup)
        left = self._end_all()
        if failure is None:
            write_record(self._folder / "exit.json", self._record(left))
            self._tidy()
        else:
            self._tidy()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._folder}/shim.json")
            self._report(failure)

    def _report(self, data: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever asked may be gone: the files tell the rest
            self._channel.sendall(json.dumps(data).encode())
        self._channel.close()

    # --- start ---

    def _start(self) -> dict[str, Any] | None:
        """Let the job go; return None once it runs, or why it does not as {"error", "errno", "step"}."""
        with contextlib.suppress(OSError), acting_as(self._actor):
            self._log_start_bytes = os.stat(self._spec["log_path"]).st_blocks * 512
        try:
            self._make()
            self._identity["started_at_s"] = time.time()
            # First the note, then the look, then the job: an attempt without a note has run nothing, and stays so.
            write_json(f"{self._folder}/shim.json", self._identity)
            control = read_json(self._folder / "control.json")
            if control is None or control["attempt"] != self._spec["attempt"] or control.get("stop"):
                return {"error": "it is no longer wanted", "errno": None, "step": "prepare"}
            with os.fdopen(self._waiting.orders, "wb") as orders:
                orders.write(self._text)
        except OSError as error:
            return {"error": f"the shim could not prepare it: {error}", "errno": error.errno, "step": "prepare"}
        with os.fdopen(self._waiting.failure, "rb") as stream:
            text = stream.read(65536)
        return json.loads(text) if text else self._begun()

    # What a shim of another kind of attempt does otherwise:

    def _make(self) -> None:
        """Make what confines the job. Raises OSError."""
        self._confinement.make(self._envelope, int(self._spec["pids_max"]))

    def _begun(self) -> dict[str, Any] | None:
        """Take note of a job that runs; return None, or why it does not after all."""
        return None

    def _pids(self) -> list[int]:
        """Return the processes of the attempt."""
        return procfs.descendants(os.getpid())

    def _ask_to_leave(self) -> None:
        """Send the job SIGTERM."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._job, signal.SIGTERM)

    def _oom_witness(self) -> str:
        """Return who says that memory ran out; empty when nobody does."""
        return self._confinement.oom_witness() if self._confinement.enforced and self._confinement.oom_kills() > 0 else ""

    def _height_bytes(self) -> int:
        """Return the kernel's height of memory, page cache included."""
        return self._confinement.highest_charge_bytes()

    def _ended_how(self) -> tuple[int, int, str]:
        """Return exit code, signal number (0: none), and who says so."""
        if self._status is None:
            return 0, 0, f"wait status of pid {self._job}: exit 0"
        if os.WIFSIGNALED(self._status):
            number = os.WTERMSIG(self._status)
            return 0, number, f"wait status of pid {self._job}: signal {number}"
        code = os.WEXITSTATUS(self._status)
        return code, 0, f"wait status of pid {self._job}: exit {code}"

    def _tidy(self) -> None:
        """Remove what confined the job."""
        self._confinement.remove()

    # --- watch ---

    def _watch(self, wakeup: int) -> None:
        """Return when the job has ended, or when all is to be killed."""
        memory_s = COUNTER_EVERY_S if self._confinement.enforced else MEMORY_EVERY_S
        step_s = 0.005  # short attempts deserve a look too
        next_memory = _boot_s() + step_s
        next_disk = next_memory + DISK_EVERY_S
        next_control = _boot_s()  # an order may have come while we started
        next_usage = next_control + USAGE_EVERY_S
        while self._reap():
            now = _boot_s()
            if self._waiting.hangup or now >= next_control:
                self._waiting.hangup, next_control = False, now + CONTROL_EVERY_S
                self._read_control()
            if now >= next_memory:
                step_s = min(memory_s, step_s * 2)
                next_memory = now + step_s
                if self._over_memory():
                    return
            if now >= next_disk:
                if self._over_disk():
                    return
                next_disk = _boot_s() + max(DISK_EVERY_S, 5 * (_boot_s() - now))
            if now >= next_usage:
                next_usage = now + USAGE_EVERY_S
                self._write_usage()
            self._check_end(now)
            if now >= self._kill_at_s:
                return
            until = min(next_memory, next_disk, next_control, next_usage, self._kill_at_s)
            if not self._kind:
                until = min(until, self._deadline_s, self._term_s)
            readable, _, _ = select.select([wakeup], [], [], max(0.0, min(until - _boot_s(), CONTROL_EVERY_S)))
            if readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(wakeup, 4096)

    def _reap(self) -> bool:
        """Collect ended children; return whether the job still runs."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return self._status is None
            if pid == self._job:
                self._status = status

    def _read_control(self) -> None:
        """Take over what the runtime has written since; a torn or missing file changes nothing."""
        path = self._folder / "control.json"
        try:
            control = read_json(path)
            if control and control.get("attempt") == self._spec["attempt"]:
                self._deadline_s = float(control["deadline_boot_s"])
                self._envelope = Envelope(**control["envelope"])
                self._stop = control.get("stop")
        except (OSError, TenureError, KeyError, TypeError, ValueError):
            pass
        try:  # the node's term holds although the agent may be dead
            term = read_json(self._plan["term_file"])
            if term and term["boot_id"] == self._spec["boot_id"]:
                self._term_s = float(term["ends_boot_s"])
        except (OSError, TenureError, KeyError, TypeError, ValueError):
            pass

    def _check_end(self, now: float) -> None:
        order: dict[str, Any] | None = None
        if self._stop is not None:
            order = self._stop
        elif self._waiting.terminate:
            order = {"kind": "stopped", "grace_s": self._spec["grace_s"], "why": "the shim was sent SIGTERM"}
        elif now >= self._term_s:
            why = f"the node's term ended at {self._term_s:.3f} s of CLOCK_BOOTTIME without word from the broker"
            order = {"kind": "stopped", "grace_s": min(float(self._spec["grace_s"]), TERM_GRACE_S), "why": why}
        elif now >= self._deadline_s:
            why = f"deadline {self._deadline_s:.3f} s of CLOCK_BOOTTIME reached at {now:.3f} s"
            order = {"kind": "out_of_time", "grace_s": self._spec["grace_s"], "why": why}
        if order is None:
            return
        if not self._kind:
            self._kind, self._witness = str(order["kind"]), str(order.get("why", "on order"))
            self._ask_to_leave()
            self._kill_at_s = now + float(order["grace_s"])
        elif self._stop is not None:
            self._kill_at_s = min(self._kill_at_s, now + float(order["grace_s"]))

    def _over_memory(self) -> bool:
        used = self._memory.look(self._confinement, os.getpid())
        if self._confinement.enforced:
            return self._confinement.oom_kills() > 0
        if used <= self._envelope.memory_bytes:
            return False
        self._kind = "out_of_memory"
        self._witness = (
            f"shim's poll: the tree held {used} bytes (RssAnon + RssShmem); bound {self._envelope.memory_bytes} bytes"
        )
        return True

    def _over_disk(self) -> bool:
        with acting_as(self._actor):
            used = procfs.disk_use(self._spec["worker_dir"])
            with contextlib.suppress(OSError):
                used += max(0, os.stat(self._spec["log_path"]).st_blocks * 512 - self._log_start_bytes)
        if used <= self._envelope.disk_bytes:
            return False
        self._kind = "out_of_disk"
        self._witness = f"shim's poll: worker folder and log occupy {used} bytes; bound {self._envelope.disk_bytes} bytes"
        return True

    # --- end ---

    def _end_all(self) -> int:
        """Kill every descendant and everything in the groups; return how many would not die."""
        self._ended_usage = self._usage()
        self._leave_devices()
        self._confinement.stop_forks()
        mine = os.getpid()
        deadline = _boot_s() + KILL_MAX_S
        pause_s = 0.0005
        while True:
            targets = set(procfs.descendants(mine)) | set(self._confinement.members())
            if not self._confinement.enforced and (self._folder / "execs").exists():
                targets.update(procfs.with_environment("TENURE_WORKER_DIR", self._spec["worker_dir"]))
            targets.discard(mine)
            if targets:
                self._confinement.kill()
            for number in (signal.SIGSTOP, signal.SIGKILL):  # stop first: what is stopped forks no further
                for pid in targets:
                    with contextlib.suppress(OSError):
                        os.kill(pid, number)
            self._reap()
            if not targets:
                return 0
            if _boot_s() > deadline:
                return len(targets)
            time.sleep(pause_s)
            pause_s = min(0.02, pause_s * 2)

    def _leave_devices(self) -> None:
        """Take its work off a device that it shares by MPS: a client that is killed over it may take its neighbours with it."""
        gpu = self._plan.get("gpu") or {}
        if gpu.get("mps") and (pids := self._pids()):
            from tenure.runtimes.mps import Mps  # late: few attempts have a part of a device

            daemons = Mps(Path(gpu["mps"]["folder"]), program=gpu["mps"]["program"], answer_max_s=LEAVE_DEVICE_MAX_S)
            for uuid in gpu["uuids"]:
                daemons.end_clients(uuid, pids)

    def _usage(self) -> dict[str, Any]:
        used = self._memory.look(self._confinement, os.getpid())
        tree = procfs.tree_use(self._pids())
        waited = resource.getrusage(resource.RUSAGE_CHILDREN)
        read, written = procfs.io_bytes(os.getpid())
        cpu_s = self._confinement.cpu_s(os.getpid()) if self._confinement.enforced else 0.0
        return {
            "at_s": time.time(),
            "cpu_s": cpu_s or waited.ru_utime + waited.ru_stime + tree.cpu_s,
            "memory_bytes": used,
            "peak_memory_bytes": self._memory.peak_bytes,
            "read_bytes": read + tree.read_bytes,
            "write_bytes": written + tree.write_bytes,
            "processes": tree.processes,
        }

    def _write_usage(self) -> None:
        with contextlib.suppress(OSError):
            write_json(self._folder / "usage.json", self._usage())

    def _record(self, left: int) -> dict[str, Any]:
        """Return the exit record. Who ended it goes before how it ended: memory, disk, deadline, order, then its own status."""
        with acting_as(self._actor):
            result, log_tail = read_result(self._spec["worker_dir"]), read_tail(self._spec["log_path"])
        usage = dict(self._ended_usage, at_s=time.time(), memory_bytes=0, processes=0)
        code, number, said_by = self._ended_how()
        kind, witness = self._kind, self._witness
        said = str((result or {}).get("error", "")) if (result or {}).get("state") == "failed" else ""
        if out_of_memory := self._oom_witness():
            kind, witness = "out_of_memory", out_of_memory
            usage["peak_memory_bytes"] = max(usage["peak_memory_bytes"], min(self._envelope.memory_bytes, self._height_bytes()))
        elif not kind and number:
            kind, witness = "signalled", said_by
        elif not kind and code and not self._confinement.enforced and _MEMORY_ERROR.match(said):
            kind, witness = (
                "out_of_memory",
                f"the job's own result.json under RLIMIT_DATA {data_limit_bytes(self._envelope)}: {said[:200]}",
            )
        elif not kind:
            kind, witness = ("failed" if code else "completed"), said_by
            if code and (profile := self._plan.get("profile")) and _REFUSED in log_tail:
                witness += f'; its last words say "{_REFUSED}": so does a system call that {profile} does not let through'
        if left:
            witness += f"; {left} processes would not die within {KILL_MAX_S:g} s"
        return {
            "kind": kind,
            "code": code,
            "signal": number,
            "witness": witness,
            "started_at_s": self._identity["started_at_s"],
            "ended_at_s": time.time(),
            "usage": usage,
            "result": result,
            "log_tail": log_tail,
        }
