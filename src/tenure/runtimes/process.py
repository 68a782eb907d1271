"""The process runtime: a lease's command as plain Linux processes, as root or as any user.

For: `protocols.Runtime` on one node. What it shares with other runtimes (files, orders, exits) is `shimmed`; attempts are
confined by what the machine offers (`confiner`). With an image's folder for `image` a command has that image's root (`rooted`).

`Usage.memory_bytes` is anonymous + shared memory (cgroup statistics, else RssAnon + RssShmem summed over the tree), never
page cache. The peak is the highest of the shim's looks (every 100 ms under a cgroup, 50 ms otherwise) and, under a cgroup, of
what the kernel's height says came between them; after an out-of-memory kill the kernel's own height, at most the bound. Bytes
read and written are those that reached storage.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tenure import codec
from tenure.errors import TenureError, Unsupported
from tenure.protocols import Clock, RuntimeHandle, Session, StartSpec, Window
from tenure.resources import Bound, Envelope
from tenure.runtimes import procfs
from tenure.runtimes.checks import check_spec, netns_path
from tenure.runtimes.confine import Confinement
from tenure.runtimes.confiner import Confine, find_confiner
from tenure.runtimes.environment import container_environment, job_environment
from tenure.runtimes.execin import run_inside
from tenure.runtimes.gpus import Gpus
from tenure.runtimes.process_session import ProcessSession
from tenure.runtimes.rooted import root_of
from tenure.runtimes.seccomp import compiled, profile_of, profile_path
from tenure.runtimes.shimmed import ShimmedRuntime, check_fence
from tenure.runtimes.state import LeaseFiles, read_json
from tenure.usage import Usage


class ProcessRuntime(ShimmedRuntime):
    """See `protocols.Runtime`. One per node: `state_dir` is private to it. Raises Unsupported when `confine` can't be had."""

    name = "process"

    def __init__(
        self, state_dir: Path | str, *, confine: Confine = "auto", clock: Clock | None = None, gpus: Gpus | None = None
    ) -> None:
        """state_dir: absolute or relative; made when missing. gpus: the node's; None: it has none."""
        self._confiner = find_confiner(confine)
        super().__init__(state_dir, clock=clock, gpus=gpus)

    def bounds(self) -> Mapping[str, Bound]:
        """Return how each envelope field is held here."""
        return self._confiner.bounds()

    def confinement(self) -> str:
        """Return one sentence on the means."""
        return "; ".join(filter(None, (self._confiner.describe(), self._gpus.describe())))

    def _check(self, spec: StartSpec) -> None:
        check_spec(spec, self._boot_id)
        filter_of(spec)

    def _plan(self, files: LeaseFiles, spec: StartSpec) -> dict[str, Any]:
        entry = pwd.getpwnam(spec.user) if spec.user and os.geteuid() == 0 else None
        data = codec.to_builtins(spec)
        gpu = self._gpus.grant(spec.devices, runtime=self.name, uid=entry.pw_uid if entry else None)
        if spec.image and gpu.uuids:
            raise Unsupported("devices", "the root of an image shows no device files", "Leave the image out, or the devices.")
        root = None
        if spec.image:
            binds = {spec.worker_dir: spec.worker_dir, **spec.mounts}
            root = asdict(root_of(spec.image, binds=binds, memory_bytes=spec.envelope.memory_bytes // 2))
        return {
            "spec": data,
            "env": (container_environment(spec) if root else job_environment(spec)) | dict(gpu.environment),
            "gpu": gpu.to_plan(),
            "root": root,
            "folder": str(files.root),
            "term_file": str(self._term_file),
            "confinement": self._confiner.for_attempt(f"tenure.{spec.lease_id}.{spec.attempt}").to_plan(),
            "uid": entry.pw_uid if entry else None,
            "gid": entry.pw_gid if entry else None,
            "netns": netns_path(spec.network.removeprefix("netns:")) if spec.network != "host" else "",
            "filter": filter_of(spec),
            "profile": profile_path(spec),
        }

    def usage(self, handle: RuntimeHandle) -> Usage:
        """Return the attempt's consumption so far; for an ended one its last counters. Raises NotFound."""
        ended = self._ended(handle)
        if ended is not None:
            return ended.usage or Usage(at_s=ended.ended_at_s)
        files, last = self._last(handle.lease_id)
        confinement = Confinement.from_plan(last["confinement"])
        sample = read_json(files.usage) or {}
        pids = procfs.descendants(handle.pid)
        tree = procfs.tree_use(pids)
        read, written = procfs.io_bytes(handle.pid)
        memory = confinement.memory_bytes(handle.pid) if confinement.enforced else tree.memory_bytes
        cpu_s = confinement.cpu_s(handle.pid) if confinement.enforced else procfs.waited_cpu_s(handle.pid) + tree.cpu_s
        return Usage(
            at_s=self._clock.utc_s(),
            cpu_s=max(cpu_s, float(sample.get("cpu_s", 0.0))),
            memory_bytes=memory,
            peak_memory_bytes=max(memory, int(sample.get("peak_memory_bytes", 0))),
            read_bytes=read + tree.read_bytes,
            write_bytes=written + tree.write_bytes,
            processes=tree.processes,
        )

    def pids(self, handle: RuntimeHandle) -> frozenset[int]:
        """Return the attempt's processes; none of one that has ended. Raises NotFound."""
        _, last = self._last(handle.lease_id)
        inside = Confinement.from_plan(last["confinement"]).members()
        return frozenset({*procfs.descendants(handle.pid), *inside} if procfs.is_alive(handle.pid, handle.start_ticks) else ())

    def resize(self, handle: RuntimeHandle, envelope: Envelope, *, fence: int) -> None:
        """Change CPU, memory and disk bounds live.

        Raises StaleFence, Conflict when the attempt has ended, Refused when it uses more memory than the new bound.
        """
        with self._lock(handle.lease_id):
            files, last = self._running(handle)
            check_fence(handle.lease_id, read_json(files.control), fence)
            Confinement.from_plan(last["confinement"]).resize(envelope, handle.pid)
            self._order(handle, fence, envelope=codec.to_builtins(envelope))

    def exec(self, handle: RuntimeHandle, argv: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
        """Run a command inside the lease's bounds; return exit code and output (its first MiB).

        Raises Conflict when the attempt has ended, Unavailable when the command did not end within `timeout_s`.
        """
        plan, job_pid = self._inner_plan(handle, argv)
        return run_inside(plan, handle, job_pid=job_pid, timeout_s=timeout_s)

    def session(self, handle: RuntimeHandle, argv: Sequence[str], *, window: Window | None) -> Session:
        """See `protocols.Runtime`."""
        plan, job_pid = self._inner_plan(handle, argv)
        return ProcessSession(plan, handle, job_pid=job_pid, window=window)

    def _inner_plan(self, handle: RuntimeHandle, argv: Sequence[str]) -> tuple[dict[str, Any], int]:
        """Return what a command inside needs to know, and the pid of the job whose environment it has. Raises Conflict."""
        files, last = self._running(handle)
        shim = read_json(files.shim) or {}
        control = read_json(files.control) or {}
        files.execs.touch()
        plan = {key: last[key] for key in ("confinement", "netns", "uid", "gid")} | {
            "argv": list(argv),
            "envelope": control["envelope"],
            "user": last["spec"]["user"],
            "worker_dir": last["spec"]["worker_dir"],
            "workdir": last["root"]["workdir"] if last.get("root") else last["spec"]["workdir"],
            "root_of": int(shim.get("job_pid", 0)) if last.get("root") else 0,
            "filter": last.get("filter", ""),  # an attempt of an older version has none
        }
        return plan, int(shim.get("job_pid", 0))

    def _start_error(self, spec: StartSpec, report: Mapping[str, Any]) -> TenureError:
        if report.get("step") != "root":
            return super()._start_error(spec, report)
        why = f"this machine does not give a process another root directory: {report['error']}"
        return Unsupported("image", why, "Use the container runtime, or run Tenure as root.")

    def _end_leftovers(self, last: Mapping[str, Any]) -> int:
        left = Confinement.from_plan(last["confinement"]).kill_members()
        if last["boot_id"] == self._boot_id:
            left += _kill_named(str(last["spec"]["worker_dir"]))
        return left

    def _remove(self, last: Mapping[str, Any]) -> None:
        Confinement.from_plan(last["confinement"]).remove()


def filter_of(spec: StartSpec) -> str:
    """Return the filter that a spec's profile makes, in hex; empty when it names none. Raises SpecError, Unsupported."""
    text = profile_of(spec)
    return compiled(text).hex() if text else ""


def _kill_named(worker_dir: str, *, rounds: int = 100) -> int:
    """Kill all processes whose environment names the attempt's folder; return how many are left after `rounds` looks.

    Not by the lease's id: another home of this machine may have one of the same name.
    """
    pids: list[int] = []
    for _ in range(rounds):
        pids = [pid for pid in procfs.with_environment("TENURE_WORKER_DIR", worker_dir) if procfs.start_ticks(pid)]
        if not pids:
            return 0
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        time.sleep(0.005)
    return len(pids)
