"""The process that attends to one guest: forked ahead of its order like any job, it starts the machine and follows its console.

Output goes to the log as it comes; what the guest's first program says (`microvm_config`) is taken out of it. To the shim, its
parent, it stands for the guest; the machine's process dies with it.

    <folder>/machine.json   pid, start_ticks of the machine, accel: written before its start is reported
    <folder>/guest.json     how the guest ended: `microvm_config.note_of`

Standard library and nouns only, as for a shim. Not for: bounds and deadlines (`microvm_shim`), what is asked (`microvm`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from typing import Any, NoReturn

from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.acting import acting_as, actor_from, open_regular
from tenure.runtimes.become import become_user, die_with_parent, limit_self
from tenure.runtimes.confine import Confinement
from tenure.runtimes.microvm_config import RELAYED, Console, KernelWords, Said, note_of, start_archive
from tenure.runtimes.microvm_machine import firecracker_config, qemu_command
from tenure.runtimes.state import read_json, write_json

READY_MAX_S = 15.0
"""Bound of waiting for the machine's process to have taken its files and ports."""
BOOTS = 2
"""How often a guest is started whose first program does not report within the bound: until then nothing of the job has run."""
_MAX_ERROR_BYTES = 4096
_MAX_RELAY_BYTES = 1 << 20
_MAX_EARLY_BYTES = 1 << 16
"""Kept of what the kernel says before the first program speaks: it goes to the log when that one never does."""
_LAST = {"exit", "noexec"}
"""After these words the console has nothing of the job's any more."""


def attend(plan: dict[str, Any], failure: int) -> NoReturn:
    """Start the plan's guest, see it to its end, and exit; tell on `failure` why it does not start."""
    attendant = None
    step = "confine"
    try:
        confinement = Confinement.from_plan(plan["confinement"])
        confinement.join()
        # Guest memory is one reservation: where no group holds memory, the shim looks at it, and nothing bounds reservations.
        limit_self(confinement if confinement.enforced else Confinement("v1"), Envelope(**plan["spec"]["envelope"]))
        step = "machine"
        attendant = _Attendant(plan)
        attendant.boot()
    except (OSError, ValueError, _NotReady) as error:
        report = {"error": str(error)[:_MAX_ERROR_BYTES], "errno": getattr(error, "errno", None), "step": step}
        os.write(failure, json.dumps(report).encode())
        os._exit(1)
    os.close(failure)
    attendant.follow()
    os._exit(0)


class _NotReady(Exception):
    """The machine's process ended, or did not take its files and ports in time."""


class _Attendant:
    """One guest: its plan, its machine, and what it has said."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._plan, self._folder, self._asked = plan, plan["folder"], plan["microvm"]
        self._token: str = self._asked["token"]
        self._actor = actor_from(plan.get("acting"))
        with acting_as(self._actor):
            self._log = open_regular(plan["spec"]["log_path"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._complaints = os.memfd_create("complaints", os.MFD_CLOEXEC)
        self._boots = 0
        self._pid = 0
        self._said: dict[str, Said] = {}
        self._kernel = KernelWords()
        self._asked_to_leave = False
        self._wakeup, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._note_term)

    def _note_term(self, _number: int, _frame: object) -> None:
        self._asked_to_leave = True

    # --- start ---

    def boot(self) -> None:
        """Start the machine, and return once it has taken its files and ports. Raises OSError, _NotReady."""
        self._boots += 1
        self._console, self._early = Console(self._token), b""
        self._up_by_s = time.monotonic() + self._asked["boot_max_s"]
        self._kernel_fd = os.open(self._asked["kernel"], os.O_RDONLY | os.O_CLOEXEC)
        root_fd = os.open(self._asked["root"], os.O_RDONLY | os.O_CLOEXEC)
        initrd_fd = self._initrd()
        ours, theirs = socket.socketpair()
        typed, self._typed = os.pipe2(os.O_CLOEXEC)
        self._output, output = os.pipe2(os.O_CLOEXEC)
        handed = [self._kernel_fd, root_fd, initrd_fd, theirs.fileno()]
        self._pid = os.fork()
        if self._pid == 0:
            self._become_machine(handed, typed, output)
        for fd in (self._kernel_fd, root_fd, initrd_fd, typed, output):
            os.close(fd)
        theirs.close()
        with ours:
            ticks = procfs.start_ticks(self._pid)
            write_json(f"{self._folder}/machine.json", {"pid": self._pid, "start_ticks": ticks, "accel": self._asked["accel"]})
            self._wait_ready(ours)

    def _initrd(self) -> int:
        """Return a file in memory with the image's archive and this start's: the latter holds secrets, and touches no disk."""
        spec, asked = self._plan["spec"], self._asked
        control = read_json(f"{self._folder}/control.json") or {}
        with acting_as(self._actor):
            lease = read_json(f"{spec['worker_dir']}/lease.json") or {}
        # The guest counts from its own boot, which is now.
        left_s = float(control["deadline_boot_s"]) - time.clock_gettime(time.CLOCK_BOOTTIME)
        lease |= {"deadline_boot_s": left_s, "boot_id": ""}
        archive = start_archive(
            token=self._token,
            argv=spec["argv"],
            env=self._plan["env"],
            workdir=asked["workdir"],
            root_type=asked["root_type"],
            modules=asked["modules"],
            lease=json.dumps(lease).encode(),
            network=asked["vmm"] == "qemu",
            pids_max=int(spec["pids_max"]),
        )
        fd = os.memfd_create("initrd", os.MFD_CLOEXEC)
        with open(asked["initrd"], "rb") as stream:
            parts = memoryview(stream.read() + archive)
        while parts:
            parts = parts[os.write(fd, parts) :]
        return fd

    def _become_machine(self, handed: list[int], typed: int, output: int) -> NoReturn:
        """In the child: become the machine's process. Its files are open already: whom it runs as need not reach them."""
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.setsid()  # a signal to the attendant's group is not one to the guest
            for fd, number in ((typed, 0), (output, 1), (self._complaints, 2)):
                os.dup2(fd, number)
            for fd in handed:
                os.set_inheritable(fd, True)
            kernel, root, initrd, qmp = handed
            asked = dict(self._asked, kernel=f"/proc/self/fd/{kernel}", root=f"/proc/self/fd/{root}")
            initrd_path = f"/proc/self/fd/{initrd}"
            if asked["vmm"] == "firecracker":
                config = os.memfd_create("config", 0)
                os.write(config, firecracker_config(asked, initrd=initrd_path).encode())
                argv = [asked["firecracker"], "--no-api", "--config-file", f"/proc/self/fd/{config}"]
            else:
                argv = qemu_command(asked, accel=asked["accel"], initrd=initrd_path, qmp_fd=qmp)
            parent = os.getppid()
            become_user(self._plan["spec"]["user"] or "nobody", asked["uid"], asked["gid"])
            die_with_parent()
            if os.getppid() == parent:
                os.execve(argv[0], argv, {"PATH": os.defpath})
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(127)

    def _wait_ready(self, channel: socket.socket) -> None:
        """Return once QEMU greets on its control channel (QMP), or Firecracker's console says anything."""
        qemu = self._asked["vmm"] == "qemu"
        readable, _, _ = select.select([channel if qemu else self._output], [], [], READY_MAX_S)
        if readable and (not qemu or b"QMP" in channel.recv(4096)):
            return
        if not readable:
            os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        raise _NotReady(self._complaint() or f"{self._asked['vmm']} was not ready within {READY_MAX_S:g} s")

    def _complaint(self) -> str:
        size = os.fstat(self._complaints).st_size
        text = os.pread(self._complaints, _MAX_ERROR_BYTES, max(0, size - _MAX_ERROR_BYTES)).decode("utf-8", "replace")
        return " ".join(text.split())

    # --- console ---

    def follow(self) -> None:
        """Copy the output until the machine has ended; note how the guest did."""
        while True:
            status = self._follow_one()
            if "up" in self._said or self._asked_to_leave or status is None or self._boots >= BOOTS:
                break
            os.close(self._output)
            os.close(self._typed)
            try:
                self.boot()
            except (OSError, ValueError, _NotReady) as error:
                os.write(self._complaints, str(error).encode())
                break
        note = note_of(self._said, self._kernel, boots=self._boots, accel=self._asked["accel"], complaint=self._complaint())
        write_json(f"{self._folder}/guest.json", note)

    def _follow_one(self) -> int | None:
        """Follow one boot to its end; return the wait status of a machine that was too late, else None."""
        told = False
        while True:
            started = "program" in self._said
            wait_s = 3600.0 if "up" in self._said else max(0.0, self._up_by_s - time.monotonic())
            readable, _, _ = select.select([self._output, self._wakeup], [], [], wait_s)
            if self._wakeup in readable:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup, 4096)
            if self._output in readable:
                data = os.read(self._output, 1 << 16)
                if not data:
                    self._put(self._console.rest() if "up" in self._said else self._early)
                    _, status = os.waitpid(self._pid, 0)
                    return None if "up" in self._said or self._said.get("broken") else status
                self._take(data)
                started = "program" in self._said
            if self._asked_to_leave and started and not told:
                told = True
                with contextlib.suppress(OSError):
                    os.write(self._typed, f"\n{self._token} term\n".encode())
            late = "up" not in self._said and time.monotonic() >= self._up_by_s
            if late or (self._asked_to_leave and not started):  # before its start the program has nothing to save
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                self._put(b"" if "up" in self._said else self._early)
                _, status = os.waitpid(self._pid, 0)
                return status

    def _take(self, data: bytes) -> None:
        for part in self._console.feed(data):
            if isinstance(part, bytes):
                self._kernel.feed(part)
                if "up" not in self._said:
                    self._early = (self._early + part)[-_MAX_EARLY_BYTES:]
                elif not self._said.keys() & _LAST:
                    self._put(part)
            elif part.word == "file":
                self._relay(part)
            else:
                self._said.setdefault(part.word, part)

    def _put(self, data: bytes) -> None:
        """Append to the log; on a full disk the rest is lost, as it is for any program."""
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._log, data) :]

    def _relay(self, said: Said) -> None:
        """Write a file of the guest's worker folder into ours, whole or not at all. The guest is not trusted for its name."""
        name, text = (*said.rest, "", "")[:2]
        if name not in RELAYED or len(text) > 2 * _MAX_RELAY_BYTES:
            return
        with contextlib.suppress(OSError, ValueError), acting_as(self._actor):
            data = bytes.fromhex(text)
            if name == "endpoints.json":
                data = _from_outside(data)
            path = f"{self._plan['spec']['worker_dir']}/{name}"
            draft = f"{path}.{os.getpid()}.part"
            fd = open_regular(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
            os.rename(draft, path)


def _from_outside(data: bytes) -> bytes:
    """Return a program's addresses as this machine reaches them: the same port of the loopback. Raises ValueError."""
    found = json.loads(data)
    if not isinstance(found, dict):
        raise ValueError("endpoints are no object")
    outside = {name: f"127.0.0.1:{str(address).rpartition(':')[2]}" for name, address in found.items()}
    return json.dumps(outside).encode()
