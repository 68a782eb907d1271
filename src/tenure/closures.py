"""A closure: the files that a program really needs, each with the reasons why, and the system calls that it made.

Not here: finding them (`images.trace`), the lock file (`images.lock`), what is made of a closure (`forms`).
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tenure.errors import SpecError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileKind(StrEnum):
    """What lies at a path. Sockets, pipes and devices are never part of a closure."""

    FILE = "file"
    DIRECTORY = "directory"
    SYMLINK = "symlink"


class Why(StrEnum):
    """What made a file part of a closure."""

    OPENED = "opened"
    STATTED = "statted"
    """Looked at without being opened: Python looks for ``x.py`` before it reads ``x.pyc``."""
    EXECUTED = "executed"
    NEEDED = "needed"
    """By the dynamic section (DT_NEEDED, PT_INTERP) of an ELF object, whether or not a run came to load it."""
    IMPORTED = "imported"
    """By a Python module's source, whether or not a run came to import it."""
    ADDED = "added"
    """By the user."""
    REPAIRED = "repaired"
    """Found to be missing when the image ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One reason for one file."""

    kind: Why
    detail: str = ""
    """Who or what: the process's command for what it opened, the object that needs a library, the module that imports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosureFile:
    """One path of a closure. Links along a path are entries of their own, so that every path means what it meant."""

    path: str
    """Absolute and normal, no link in its parents."""
    kind: FileKind
    mode: int
    """Permission bits, 0..0o7777; a link has 0o777."""
    size_bytes: int = 0
    """Of a file's content; 0 for directories and links."""
    sha256: str = ""
    """Of a file's content, in hex; empty for directories and links."""
    target: str = ""
    """Of a link, as it is written there; empty otherwise."""
    reasons: tuple[Reason, ...] = ()

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or posixpath.normpath(self.path) != self.path:
            raise SpecError(f"a closure's path must be absolute and normal; found {self.path!r}")
        if not 0 <= self.mode <= 0o7777:
            raise SpecError(f"{self.path}: the mode must lie in 0..0o7777; found {self.mode:#o}")
        if (self.kind is FileKind.FILE) != bool(_SHA256.fullmatch(self.sha256)):
            raise SpecError(f"{self.path}: a file, and nothing else, has a SHA-256 in hex; found {self.kind} {self.sha256!r}")
        if (self.kind is FileKind.SYMLINK) != bool(self.target):
            raise SpecError(f"{self.path}: a link, and nothing else, has a target; found {self.kind} {self.target!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemCall:
    """One system call that the program made under its exercises."""

    name: str
    count: int
    """How often, all processes and exercises together."""
    flags: tuple[str, ...] = ()
    """Symbolic flags, commands and families among its arguments, sorted: ``MAP_FIXED``, ``FUTEX_WAIT``, ``AF_INET``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """One run that drove the program while it was watched."""

    argv: tuple[str, ...]
    """What drove it; empty: the program alone, run to its end."""
    description: str = ""
    exit_code: int = 0
    """Of what drove it; negative: the signal that ended it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Closure:
    """What a program needs to run, as observed and as analysed. Its identity is `hash`."""

    program: tuple[str, ...]
    """The command, as the image will start it."""
    workdir: str
    env: Mapping[str, str] = field(default_factory=dict)
    """Only what the program is started with by intent, never the whole environment of who analysed it."""
    machine: str = ""
    """Architecture as the kernel calls it, e.g. ``x86_64``."""
    python: str = ""
    """Version of the interpreter; empty when the program is not Python."""
    exercises: tuple[Exercise, ...] = ()
    files: tuple[ClosureFile, ...] = ()
    """Sorted by path, each path once."""
    system_calls: tuple[SystemCall, ...] = ()
    """Sorted by name, each name once; empty when they could not be watched."""
    made_at_s: float = 0.0
    """UTC seconds."""

    def __post_init__(self) -> None:
        if not self.program:
            raise SpecError("a closure needs the command of its program; found none")
        paths = [file.path for file in self.files]
        if paths != sorted(set(paths)):
            raise SpecError("a closure's files must be sorted by path, each path once")

    @property
    def size_bytes(self) -> int:
        """Sum of the files' content."""
        return sum(file.size_bytes for file in self.files)

    @property
    def hash(self) -> str:
        """SHA-256 in hex of command, working directory, environment, paths, modes and content: no times, no reasons."""
        digest = hashlib.sha256()
        for part in (*self.program, "", self.workdir, *(f"{key}={value}" for key, value in sorted(self.env.items())), ""):
            digest.update(part.encode(errors="surrogateescape") + b"\0")
        digest.update(files_hash(self.files).encode())
        return digest.hexdigest()

    def file(self, path: str) -> ClosureFile | None:
        """Return the entry at exactly this path, or None."""
        return next((file for file in self.files if file.path == path), None)


def files_hash(files: Iterable[ClosureFile]) -> str:
    """Return the SHA-256 in hex of paths, kinds, modes and content, whatever the order of the files."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda item: item.path):
        line = f"{file.kind} {file.mode:04o} {file.sha256 or file.target}\0{file.path}\0"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()
