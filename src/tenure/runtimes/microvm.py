"""The microVM runtime: a lease's command as the one program of a small virtual machine, from an image of form microvm.

For: `protocols.Runtime` on one node with QEMU (or Firecracker, for commands without ports). What it shares with other runtimes
is `shimmed`; the guest is made by `microvm_job`, its end told by `microvm_shim`.

A guest shares no folder with this machine and reaches nothing of it or beyond; the ports that its lease names are reached at
127.0.0.1. Its root is the image, read-only; /tmp, /run and /dev/shm are memory. Memory is the machine's size, and what the
emulator itself takes comes on top, up to a fixed bound: hence `upper`. Where no hardware carries it, software does, many times
slower: `confinement`, the exit's witness and `machine.json` say which.
Not for: building images (`images.microvm`).
"""

from __future__ import annotations

import os
import pwd
import secrets
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenure import codec
from tenure.errors import NotFound, SpecError, TenureError, Unavailable, Unsupported
from tenure.protocols import Clock, RuntimeHandle, StartSpec
from tenure.resources import Bound, Envelope, show_bytes
from tenure.runtimes import pidfds, procfs
from tenure.runtimes.confine import Confinement
from tenure.runtimes.confiner import Confine, find_confiner
from tenure.runtimes.environment import container_environment
from tenure.runtimes.forkserver import ForkServer
from tenure.runtimes.microvm_image import MicrovmImage, find_image, read_image
from tenure.runtimes.microvm_machine import OVERHEAD_BYTES, QEMU, WORKER_DIR, find_firecracker, find_qemu
from tenure.runtimes.microvm_probe import accel_for, describe
from tenure.runtimes.shimmed import ShimmedRuntime, check_fence
from tenure.runtimes.state import LeaseFiles, read_json
from tenure.usage import Usage

LEAST_MEMORY_BYTES = 72 << 20
"""Debian's kernel alone does not come up in less: in 64 MiB it finds no room for itself."""
BOOT_MAX_S = {"kvm": 10.0, "tcg": 60.0}
"""Until the first program speaks: a quarter of a second on hardware, two under emulation on an idle machine."""
NOBODY = 65534
"""Whom machines run as when the agent is root and the lease names nobody."""
_REMEDY = "Use the container runtime."
_NOT_THERE = ("TENURE_RUN_DIR", "TENURE_STARTED_BOOT_S", "TENURE_HOME", "TENURE_DATA")
"""Variables that name what a guest does not have: folders of this machine, its clock."""


class MicrovmRuntime(ShimmedRuntime):
    """See `protocols.Runtime`. One per node: `state_dir` is private to it. QEMU is looked for at every start."""

    name = "microvm"

    def __init__(
        self,
        state_dir: Path | str,
        *,
        images_dir: Path | None = None,
        confine: Confine = "auto",
        clock: Clock | None = None,
        fork_server: ForkServer | None = None,
        term_dir: Path | str | None = None,
        accel: str = "auto",
    ) -> None:
        """images_dir: where images are found by name. accel: ``kvm``, ``tcg``, or ``auto``: what boots here."""
        super().__init__(state_dir, clock=clock, fork_server=fork_server, term_dir=term_dir)
        self._images_dir, self._accel = images_dir, accel
        self._confiner = find_confiner(confine)

    def available(self) -> bool:
        """Return whether QEMU is here."""
        return bool(find_qemu())

    def bounds(self) -> Mapping[str, Bound]:
        """Return how each envelope field is held here."""
        return dict(self._confiner.bounds()) | {
            "memory_bytes": "upper",
            "disk_bytes": "exact",
            "slot_s": "exact",
            "total_s": "exact",
        }

    def confinement(self) -> str:
        """Return one sentence on the means."""
        if not find_qemu():
            return f"no microVMs: no program named {QEMU}"
        overhead = show_bytes(max(OVERHEAD_BYTES.values()))
        cpus = "control group" if self._confiner.bounds()["cpus"] == "exact" else "affinity"
        return (
            f"a machine of its own in QEMU, by {describe(self._state_dir)}; memory by the machine's size, at most "
            f"{overhead} more for QEMU itself; cpus by {cpus}; no network but its ports on 127.0.0.1"
        )

    # --- start ---

    def _check(self, spec: StartSpec) -> None:
        """Raise Unsupported for what a guest cannot honour, SpecError for what is wrong."""
        if spec.mounts:
            raise Unsupported(
                "mounts", "a microVM shares no folder with this machine: it carries jobs that talk by network", _REMEDY
            )
        if spec.devices:
            raise Unsupported("devices", "a microVM has no device of this machine", _REMEDY)
        if spec.capabilities:
            raise Unsupported(
                "capabilities", "a guest's program is root of its own machine and of nothing else", "Leave it empty."
            )
        if spec.seccomp:
            raise Unsupported("seccomp", "a guest has its own kernel, whose calls nobody here filters", "Leave it empty.")
        kind = spec.network.partition(":")[0]
        if kind not in ("tenant", "none", "host") or (kind == "host" and spec.network != "host"):
            raise Unsupported(
                "network", f"a microVM has its own, restricted to its ports on 127.0.0.1; found {spec.network!r}", _REMEDY
            )
        if not spec.image:
            raise Unsupported(
                "image", "a microVM needs an image of form microvm to start from", "Name one: tenure image build."
            )
        if spec.envelope.memory_bytes < LEAST_MEMORY_BYTES:
            found = show_bytes(spec.envelope.memory_bytes)
            raise Unsupported(
                "envelope.memory_bytes", f"a guest needs {show_bytes(LEAST_MEMORY_BYTES)}; found {found}", "Ask for more."
            )
        if not self.available():
            raise Unsupported(
                "runtime", f"there is no program named {QEMU} here", "Install it (apt-get install qemu-system-x86)."
            )
        if spec.boot_id != self._boot_id:
            raise SpecError(
                f"lease {spec.lease_id}: its deadline counts from boot {spec.boot_id!r}, but this machine's boot is "
                f"{self._boot_id!r}; ask the node for its boot time and send the deadline again"
            )
        for field in ("workdir", "worker_dir", "log_path"):
            if not os.path.isabs(getattr(spec, field)):
                raise SpecError(f"lease {spec.lease_id}: {field} must be absolute; found {getattr(spec, field)!r}")
        if "\0" in "".join((*spec.argv, *spec.env, *spec.env.values())):
            raise SpecError(f"lease {spec.lease_id}: a word of its command or environment has a zero byte")
        if spec.user:
            self._user(spec)
        image = self._image(spec)
        if image.has_program(spec.argv[0], _environment(image, spec)["PATH"]) is False:
            raise SpecError(f"lease {spec.lease_id}: image {image.name} has no program {spec.argv[0]}: its closure lists none")

    def _image(self, spec: StartSpec) -> MicrovmImage:
        try:
            return read_image(find_image(spec.image, self._images_dir))
        except NotFound as error:
            raise SpecError(f"lease {spec.lease_id}: {error}") from error

    def _user(self, spec: StartSpec) -> tuple[int | None, int | None]:
        """Return whose the attempt is; None: the agent's own. Raises SpecError, Unsupported."""
        if not spec.user:
            return None, None
        try:
            entry = pwd.getpwnam(spec.user)
        except KeyError as error:
            raise SpecError(f"lease {spec.lease_id}: no user {spec.user!r} on this machine") from error
        if os.geteuid() not in (0, entry.pw_uid):
            raise Unsupported("user", f"only root can run a job as {spec.user!r}", "Run the agent as root, or leave it empty.")
        return (entry.pw_uid, entry.pw_gid) if os.geteuid() == 0 else (None, None)

    def _plan(self, files: LeaseFiles, spec: StartSpec) -> dict[str, Any]:
        image, qemu = self._image(spec), find_qemu()
        accel = self._accel
        if accel == "auto":
            accel, _ = accel_for(image, qemu, state_dir=self._state_dir, boot_id=self._boot_id)
        firecracker = find_firecracker() if accel == "kvm" and image.kernel_format == "elf" and not spec.ports else ""
        uid, gid = self._user(spec)
        runs_as = (NOBODY, NOBODY) if uid is None and os.geteuid() == 0 else (uid, gid)
        own_workdir = image.workdir if spec.workdir == spec.worker_dir else spec.workdir
        return {
            "spec": codec.to_builtins(spec),
            "env": _environment(image, spec),
            "folder": str(files.root),
            "term_file": str(self._term_file),
            "confinement": self._confiner.for_attempt(f"tenure.guest.{spec.lease_id}.{spec.attempt}").to_plan(),
            "uid": uid,
            "gid": gid,
            "netns": "",
            "microvm": {
                "vmm": "firecracker" if firecracker else "qemu",
                "qemu": qemu,
                "firecracker": firecracker,
                "accel": accel,
                "kernel": str(image.kernel),
                "initrd": str(image.initrd),
                "root": str(image.root),
                "root_type": image.root_type,
                "modules": list(image.modules),
                "memory_bytes": spec.envelope.memory_bytes,
                "cpus": spec.envelope.cpus,
                "ports": sorted({port for port in spec.ports.values() if port}),
                "workdir": own_workdir,
                "uid": runs_as[0],
                "gid": runs_as[1],
                "token": secrets.token_hex(16),
                "boot_max_s": BOOT_MAX_S[accel],
            },
        }

    def _start_error(self, spec: StartSpec, report: Mapping[str, Any]) -> TenureError:
        said = str(report.get("error", ""))
        if report.get("step") != "machine":
            return super()._start_error(spec, report)
        if "host forwarding rule" in said:
            ports = ", ".join(f"{name} {port}" for name, port in spec.ports.items())
            return SpecError(f"lease {spec.lease_id}: a port of it is taken on 127.0.0.1 ({ports}): {said}; name others")
        return Unavailable(f"lease {spec.lease_id}: its machine could not be started: {said}")

    # --- consumption ---

    def usage(self, handle: RuntimeHandle) -> Usage:
        """Return the attempt's consumption so far, the machine's own included; for an ended one its last counters."""
        ended = self._ended(handle)
        if ended is not None:
            return ended.usage or Usage(at_s=ended.ended_at_s)
        files, last = self._last(handle.lease_id)
        confinement = Confinement.from_plan(last["confinement"])
        sample = read_json(files.usage) or {}
        machine = read_json(files.root / "machine.json") or {}
        tree = procfs.tree_use([int(machine["pid"])] if machine else [])
        memory = confinement.memory_bytes(handle.pid)
        return Usage(
            at_s=self._clock.utc_s(),
            cpu_s=max(confinement.cpu_s(handle.pid), float(sample.get("cpu_s", 0.0))),
            memory_bytes=memory,
            peak_memory_bytes=max(memory, int(sample.get("peak_memory_bytes", 0))),
            read_bytes=tree.read_bytes,
            write_bytes=tree.write_bytes,
            processes=tree.processes,
        )

    def pids(self, handle: RuntimeHandle) -> frozenset[int]:
        """Return the machine's processes, attendant and shim's other children included; none of an attempt that has ended."""
        _, last = self._last(handle.lease_id)
        if not procfs.is_alive(handle.pid, handle.start_ticks):
            return frozenset()
        inside = Confinement.from_plan(last["confinement"]).members()
        return frozenset({*procfs.descendants(handle.pid), *inside})

    def accel_of(self, handle: RuntimeHandle) -> str:
        """Return what carries an attempt's guest: ``kvm``, or ``tcg`` for software emulation. Raises NotFound."""
        _, last = self._last(handle.lease_id)
        return str(last["microvm"]["accel"])

    # --- orders that a guest cannot follow ---

    def resize(self, handle: RuntimeHandle, envelope: Envelope, *, fence: int) -> None:
        """Raise Unsupported: a machine has the memory and the processors that it was started with. Raises StaleFence first."""
        files, _ = self._running(handle)
        check_fence(handle.lease_id, read_json(files.control), fence)
        raise Unsupported(
            "resize", "a microVM keeps the size that it was started with", "Start it again with another envelope."
        )

    def exec(self, handle: RuntimeHandle, argv: Sequence[str], *, timeout_s: float) -> tuple[int, bytes]:
        """Raise Unsupported: a guest has one program and no door for another. Raises Conflict when it has ended."""
        self._running(handle)
        raise Unsupported("exec", "a microVM runs one program and has no door for another", _REMEDY)

    # --- end ---

    def _end_leftovers(self, last: Mapping[str, Any]) -> int:
        left = Confinement.from_plan(last["confinement"]).kill_members()
        machine = read_json(LeaseFiles(self._state_dir, str(last["spec"]["lease_id"])).root / "machine.json")
        if machine and last["boot_id"] == self._boot_id:
            pid, ticks = int(machine["pid"]), int(machine["start_ticks"])
            pidfds.send(pid, ticks, signal.SIGKILL)
            pidfds.wait(pid, ticks, 10.0)
            left += int(procfs.is_alive(pid, ticks))
        return left

    def _remove(self, last: Mapping[str, Any]) -> None:
        Confinement.from_plan(last["confinement"]).remove()


def _environment(image: MicrovmImage, spec: StartSpec) -> dict[str, str]:
    """Return the whole environment of a guest's program: the image's, then the lease's, with places as they are inside."""
    found = dict(image.env) | container_environment(spec)
    found.setdefault("PATH", "/usr/local/bin:/usr/bin:/bin")
    inside = {name: value.replace(spec.worker_dir, WORKER_DIR) for name, value in found.items() if name not in _NOT_THERE}
    return inside
