"""A trace of system calls read as what a program did with files, other programs and the network.

Not here: starting the program (`trace`), what a line of strace means (`strace`), which of the files matter (`closure`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from tenure.closures import Why
from tenure.images.strace import Call, PathArgument, PathUse, Record, descriptor_path

_FORKS = frozenset({"clone", "clone3", "fork", "vfork"})
_MAKES = frozenset(
    {"mkdir", "mkdirat", "mknod", "mknodat", "symlink", "symlinkat", "link", "linkat", "rename", "renameat", "renameat2"}
)
_LINK_READS = frozenset({"readlink", "readlinkat"})
_WHY = {PathUse.OPENED: Why.OPENED, PathUse.STATTED: Why.STATTED, PathUse.EXECUTED: Why.EXECUTED, PathUse.ENTERED: Why.STATTED}
_INET = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)")')
_LOOPBACK = re.compile(r"127\.|::1$|::ffff:127\.|0\.0\.0\.0$|::$")


@dataclass(frozen=True, slots=True)
class Sighting:
    """A path that the program named and that was there."""

    path: str
    """Absolute, as named: links in it not yet followed."""
    why: Why
    follows: bool
    """Whether a link at its end was followed."""


@dataclass(slots=True)
class Watched:
    """What programs did under watch, all lives together. Each thing once, with the process that did it first."""

    sightings: dict[Sighting, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Paths named that were not there."""
    made: set[str] = field(default_factory=set)
    """Paths that did not have to be there: the program made them."""
    changed: dict[str, str] = field(default_factory=dict)
    started: dict[str, str] = field(default_factory=dict)
    """Programs executed by the program, after the one it is."""
    connected: dict[str, str] = field(default_factory=dict)
    """Addresses beyond this machine, as ``address:port``."""
    programs: list[str] = field(default_factory=list)
    """Paths executed, in order."""

    def was_made(self, path: str) -> bool:
        """Whether the program made a path, or a folder above it."""
        while path not in ("/", ""):
            if path in self.made:
                return True
            path = os.path.dirname(path)
        return False


@dataclass(slots=True)
class TraceReader:
    """Reads the records of one life into `watched`.

    root: of a life that a ``chroot`` began: only what happens inside counts, and paths are those inside.
    every: is given each record that counts.
    """

    watched: Watched
    workdir: str
    root: str = ""
    _folders: dict[int, list[str]] = field(default_factory=dict)
    """Working directory of each process; threads share the list."""
    _labels: dict[int, str] = field(default_factory=dict)
    _inside: set[int] = field(default_factory=set)
    _first: int = 0

    def take(self, record: Record) -> None:
        """Read one record."""
        if not isinstance(record, Call):
            return
        pid = record.pid
        if not self._first:
            self._first = pid
        if self.root and pid not in self._inside and record.name in _FORKS | {"chroot"} and not record.failed:
            if record.name == "chroot":
                self._inside.add(pid)
                self._folders[pid] = ["/"]
            return
        if self.root and pid not in self._inside and not self._is_child(pid):
            return
        self._follow(record)
        for argument in record.paths():
            if argument.path:
                self._path(record, argument)
        if record.name == "connect":
            self._connect(record)

    def _is_child(self, pid: int) -> bool:
        """Whether a process that was never seen was started inside: outside there is but one, which is to go in."""
        return bool(self._inside) and pid != self._first

    def _follow(self, call: Call) -> None:
        """Keep up with where a process is and who it is."""
        pid = call.pid
        if call.name in _FORKS and call.result and not call.failed:
            shares = any("CLONE_FS" in argument for argument in call.arguments)
            folder = self._folder(pid)
            self._folders.setdefault(call.result, folder if shares else list(folder))
            self._labels.setdefault(call.result, self._label(pid))
            if pid in self._inside:
                self._inside.add(call.result)
        elif call.arguments and (call.arguments[0].startswith("AT_FDCWD<") or (call.name == "fchdir" and not call.failed)):
            self._move(pid, self._inside_path(descriptor_path(call.arguments[0])))

    def _move(self, pid: int, folder: str) -> None:
        if folder:
            self._folder(pid)[0] = folder

    def _folder(self, pid: int) -> list[str]:
        return self._folders.setdefault(pid, [self.workdir])

    def _label(self, pid: int) -> str:
        return self._labels.get(pid, "the program")

    def _inside_path(self, path: str) -> str:
        if self.root and (path == self.root or path.startswith(self.root + "/")):
            return path[len(self.root) :] or "/"
        return path

    def _absolute(self, pid: int, argument: PathArgument) -> str:
        base = self._inside_path(argument.directory) or self._folder(pid)[0]
        return _plain(os.path.join(base, argument.path))

    def _path(self, call: Call, argument: PathArgument) -> None:
        path, who, watched = self._absolute(call.pid, argument), self._label(call.pid), self.watched
        is_no_link = call.name in _LINK_READS and call.error == "EINVAL"
        if call.failed and not is_no_link:
            if call.error == "ENOENT":
                watched.absent.setdefault(path, who)
            return
        if call.result is None and call.name != "execve":
            return
        if argument.use is PathUse.CHANGED:
            self._change(call, argument, path, who)
            return
        if argument.use is PathUse.EXECUTED:
            self._execute(call, path, who)
        elif argument.use is PathUse.ENTERED and call.name == "chdir":
            self._move(call.pid, path)
        watched.sightings.setdefault(
            Sighting(path, _WHY[argument.use], argument.follows and not is_no_link), self._label(call.pid)
        )

    def _execute(self, call: Call, path: str, who: str) -> None:
        words = [word.strip('"') for word in call.arguments[1].strip("[]").split(", ")] if len(call.arguments) > 1 else []
        script = next((word for word in words[1:] if not word.startswith("-")), "")
        self._labels[call.pid] = " ".join(filter(None, (os.path.basename(path), os.path.basename(script))))
        if self.watched.programs and call.pid != self._first:
            self.watched.started.setdefault(path, who)
        self.watched.programs.append(path)

    def _change(self, call: Call, argument: PathArgument, path: str, who: str) -> None:
        watched = self.watched
        watched.changed.setdefault(path, who)
        seen = any(Sighting(path, why, follows) in watched.sightings for why in _WHY.values() for follows in (True, False))
        was_there = seen and path not in watched.absent
        flags = " ".join(call.arguments[1:])
        if call.name in _MAKES:
            made = argument == call.paths()[-1]  # the other one is what is renamed or linked
        else:
            made = call.name == "creat" or any(flag in flags for flag in ("O_TRUNC", "O_EXCL", "O_APPEND", "O_TMPFILE"))
            made = made or ("O_CREAT" in flags and path in watched.absent)
        if made and not was_there:
            watched.made.add(path)
        elif not made and call.name.startswith("open"):
            watched.sightings.setdefault(Sighting(path, Why.OPENED, argument.follows), who)

    def _connect(self, call: Call) -> None:
        address = _INET.search(" ".join(call.arguments[1:]))
        if address is None or (call.failed and call.error != "EINPROGRESS"):
            return
        host = address[2] or address[3]
        if not _LOOPBACK.match(host):
            self.watched.connected.setdefault(f"{host}:{address[1]}", self._label(call.pid))


def _plain(path: str) -> str:
    """Return an absolute path without doubled slashes and ``.``; ``..`` stays, for a link may stand before it."""
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))
