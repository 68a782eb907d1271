"""One reading of what a process tree uses, cheap enough for ten readings a second.

Files of /proc stay open and are read with `pread` (an open file of an ended process fails, so a recycled pid is never mistaken
for it), and children are looked for only when the kernel handed out a new pid since the last reading (last field of
/proc/loadavg). Rejected: psutil, which opens each file anew and scans every process of the machine for children. Not here:
repeating and summing up (`watch`), other parties (`sample`).
"""

from __future__ import annotations

import os
import resource
import time

from tenure.usage import Usage

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SLOW_S = 1.0
"""How often a tree's disk counters, and children started by threads other than the first, are looked at."""
MAX_WATCHED = 4096
"""Processes of one tree that are watched at most; more are not counted, and `overflowed` says so."""
MAX_OPEN = max(8, min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) // 32)
"""Processes of one tree whose files stay open at most (4 each); those of further ones are opened for each reading."""
_READ = 8192
_PAGE = 2048
"""A list of children at least this long may go on: the kernel hands out long ones in pieces."""


class _Process:
    """The /proc files of one process, and what was last read of it."""

    __slots__ = ("alive", "base", "cpu_ticks", "fds", "io", "memory_bytes", "parent", "pid", "started", "threads")

    def __init__(self, pid: int, proc: str, *, keep_open: bool) -> None:
        """Raises OSError when the process is gone or may not be read."""
        self.pid, self.base = pid, f"{proc}/{pid}"
        self.fds = dict.fromkeys(("stat", "status", "io", f"task/{pid}/children"), -1)
        self.parent = self.threads = self.cpu_ticks = self.memory_bytes = 0
        self.io = (0, 0)
        self.started, self.alive = b"", True
        if keep_open:
            self._open()
        self.read()

    def _open(self) -> None:
        """Keep the files open, as far as we may: a file that stays closed is opened for each reading."""
        for name in self.fds:
            try:
                self.fds[name] = os.open(f"{self.base}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue

    def _text(self, name: str) -> bytes:
        fd = self.fds[name]
        if fd >= 0:
            return os.pread(fd, _READ, 0)
        with open(f"{self.base}/{name}", "rb") as file:
            return file.read()

    def read(self) -> None:
        """Read CPU (own and reaped children's) and memory. Raises OSError once the process is reaped."""
        try:
            stat = self._text("stat")
            fields = stat[stat.rindex(b")") + 2 :].split(b" ", 20)
            status = self._text("status")
        except OSError:
            self.close()
            raise
        if self.started and self.started != fields[19]:
            self.close()
            raise ProcessLookupError(f"process {self.pid} is another one now")
        self.parent, self.threads, self.started = int(fields[1]), int(fields[17]), fields[19]
        self.alive = fields[0] not in (b"Z", b"X")
        self.cpu_ticks = int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
        at = status.find(b"RssAnon:")
        # A zombie and a kernel thread have no memory lines.
        self.memory_bytes = (_kib(status, at) + _kib(status, status.find(b"RssShmem:", at))) << 10 if at >= 0 else 0

    def read_io(self) -> None:
        """Read the disk counters, reaped children's included. They stay as they were where we may not."""
        try:
            values = dict(line.split(b": ") for line in self._text("io").splitlines())
        except OSError:
            return
        if b"read_bytes" in values:
            self.io = (int(values[b"read_bytes"]), int(values[b"write_bytes"]))

    def children(self, proc: str, every_thread: bool) -> list[int]:
        """Return the pids that this process's first thread started, or all its threads did."""
        name = f"task/{self.pid}/children"
        text = self._text(name)
        if len(text) >= _PAGE and (fd := self.fds[name]) >= 0:
            text += _rest(fd, len(text))
        found = [int(pid) for pid in text.split()]
        if every_thread and self.threads > 1:
            for thread in _names(f"{proc}/{self.pid}/task"):
                if thread != str(self.pid):
                    found += [int(pid) for pid in _bytes(f"{proc}/{self.pid}/task/{thread}/children").split()]
        return found

    def close(self) -> None:
        for name, fd in self.fds.items():
            if fd >= 0:
                os.close(fd)
                self.fds[name] = -1


class ProcessTreeSampler:
    """A process and all that came of it, also what was reparented after it had been seen once.

    cpu_s holds ended children too, and never falls. memory_bytes is anonymous + shared memory, summed over the processes: pages
    that several of them share count once for each (an upper figure). peak_memory_bytes is the highest sum that was read.
    processes counts those alive: 0 when all have ended and one still waits to be reaped.
    """

    def __init__(self, root_pid: int, *, proc: str = "/proc") -> None:
        self.root_pid = root_pid
        self.lost = ""
        self.overflowed = False
        self._proc = proc
        self._known: dict[int, _Process] = {}
        self._fork_fd = os.open(f"{proc}/loadavg", os.O_RDONLY | os.O_CLOEXEC)
        self._last_pid, self._looked = b"", False
        self._slow_at_s = 0.0
        self._scan_all = True
        self._retired_ticks, self._retired_io = 0, (0, 0)
        self._cpu_ticks, self._peak_bytes, self._io = 0, 0, (0, 0)
        self._add(root_pid)
        self._has_children_file = os.path.exists(f"{proc}/thread-self/children")

    def sample(self) -> Usage | None:
        """Return the tree's usage now; None when no process of it is left (`lost` says so)."""
        now_s = time.monotonic()
        slow = now_s - self._slow_at_s >= SLOW_S
        if slow:
            self._slow_at_s = now_s
        newest = os.pread(self._fork_fd, 128, 0).rsplit(b" ", 1)[-1] if self._fork_fd >= 0 else b""
        # A pid is handed out just before its process is listed as a child: look once more after the last change.
        fresh = newest != self._last_pid
        look, self._looked, self._last_pid = fresh or self._looked, fresh, newest
        self._scan_all |= look  # threads' children are looked for at the next slow reading
        ended: list[_Process] = []
        # Parents stand before their children in the dict: a child reaped meanwhile is missed once, never counted twice.
        for process in list(self._known.values()):
            self._read(process, ended, io=slow)
        if (look and self._has_children_file) or (slow and self._scan_all):
            self._find_children(ended, every_thread=slow)
            self._scan_all &= not slow
        self._retire(ended)
        return self._usage()

    def pids(self) -> tuple[int, ...]:
        """Return the processes seen at the last reading."""
        return tuple(self._known)

    def close(self) -> None:
        """Let go of all open files."""
        for process in self._known.values():
            process.close()
        self._known.clear()
        if self._fork_fd >= 0:
            os.close(self._fork_fd)
            self._fork_fd = -1
        self.lost = self.lost or "closed"

    def _usage(self) -> Usage | None:
        if not self._known:
            self.lost = self.lost or f"process {self.root_pid} and all it started are gone"
            return None
        memory = 0
        ticks, read, written = self._retired_ticks, *self._retired_io
        for process in self._known.values():
            memory += process.memory_bytes
            ticks += process.cpu_ticks
            read += process.io[0]
            written += process.io[1]
        self._cpu_ticks = max(self._cpu_ticks, ticks)
        self._io = (max(self._io[0], read), max(self._io[1], written))
        self._peak_bytes = max(self._peak_bytes, memory)
        return Usage(
            at_s=time.time(),
            cpu_s=self._cpu_ticks / TICKS_PER_S,
            memory_bytes=memory,
            peak_memory_bytes=self._peak_bytes,
            read_bytes=self._io[0],
            write_bytes=self._io[1],
            processes=sum(process.alive for process in self._known.values()),
        )

    def _read(self, process: _Process, ended: list[_Process], *, io: bool) -> None:
        try:
            process.read()
        except OSError:
            ended.append(process)
            return
        if io:
            process.read_io()

    def _add(self, pid: int) -> _Process | None:
        if len(self._known) >= MAX_WATCHED:
            self.overflowed = True
            return None
        try:
            process = _Process(pid, self._proc, keep_open=len(self._known) < MAX_OPEN)
        except OSError:
            return None  # ended between being listed and being opened: its parent's counters hold it
        self._known[pid] = process
        return process

    def _find_children(self, ended: list[_Process], *, every_thread: bool) -> None:
        gone = {process.pid for process in ended}
        by_parent = {} if self._has_children_file else _children_by_parent(self._proc)
        queue = [process for process in self._known.values() if process.pid not in gone]
        for process in queue:  # grows while it is walked: children of children
            try:
                found = (
                    process.children(self._proc, every_thread) if self._has_children_file else by_parent.get(process.pid, [])
                )
            except OSError:
                continue  # it ended; the next reading notices
            for pid in found:
                if pid in gone:  # the number was handed out again
                    gone.discard(pid)
                    self._retire([other for other in ended if other.pid == pid])
                    ended[:] = [other for other in ended if other.pid != pid]
                if pid not in self._known and (child := self._add(pid)) is not None:
                    self._read(child, ended, io=True)
                    queue.append(child)

    def _retire(self, ended: list[_Process]) -> None:
        """Forget ended processes. What they used is in the counters of a watched parent, or is kept here when there is none."""
        for process in ended:
            if self._known.get(process.pid) is process:
                del self._known[process.pid]
            process.close()
        for process in ended:
            if process.parent not in self._known:
                self._retired_ticks += process.cpu_ticks
                self._retired_io = (self._retired_io[0] + process.io[0], self._retired_io[1] + process.io[1])


def _kib(text: bytes, at: int) -> int:
    """Return the number of a status line that starts at `at`."""
    return int(text[text.index(b":", at) + 1 : text.index(b"\n", at)].split()[0]) if at >= 0 else 0


def _rest(fd: int, offset: int) -> bytes:
    """Read on: the kernel hands out long lists of children in pages."""
    parts = []
    while part := os.pread(fd, 1 << 16, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _names(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _bytes(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _children_by_parent(proc: str) -> dict[int, list[int]]:
    """Return parent -> children of the whole machine: for kernels without /proc/<pid>/task/<tid>/children."""
    found: dict[int, list[int]] = {}
    for name in _names(proc):
        if name.isdigit() and (stat := _bytes(f"{proc}/{name}/stat")):
            found.setdefault(int(stat[stat.rindex(b")") + 2 :].split(b" ", 2)[1]), []).append(int(name))
    return found
