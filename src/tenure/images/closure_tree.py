"""The files of a closure as they gather: each path followed from the root on, with every link on the way kept as a link."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from tenure.closures import ClosureFile, FileKind, Reason, Why
from tenure.images.closure_rules import Rules

MAX_LINKS = 40
"""Links followed in one path, as in Linux."""
MAX_REASONS = 4
"""Reasons kept for one file: the first that came, and those of kinds not there yet."""


@dataclass(slots=True)
class Tree:
    """What was added so far. Reads the file system as it is when a path is added, and content when `files` is called."""

    rules: Rules = field(default_factory=Rules)
    left_out: dict[str, str] = field(default_factory=dict)
    """Path that was named, as it really is, to why it does not belong."""
    _reasons: dict[str, dict[Reason, None]] = field(default_factory=dict)
    _stats: dict[str, os.stat_result | None] = field(default_factory=dict)

    def add(self, path: str, reason: Reason, *, follows: bool = True) -> str | None:
        """Add what an absolute path names, its parents and the links on the way; return where it really is.

        follows: whether a link at the end is followed. None: nothing is there, or a rule leaves it out.
        """
        found, ways = self.walk(path, follows=follows)
        if found is None:
            return None
        why = self.rules.left_out(found)
        if why:
            self.left_out[found] = why
            return None
        for way in ways:
            self._reasons.setdefault(way, {})
            self._add_parents(way)
        self._note(found, reason)
        self._add_parents(found)
        return found

    def walk(self, path: str, *, follows: bool = True) -> tuple[str | None, list[str]]:
        """Return where a path leads, and the links on the way there; None when nothing is there."""
        at = "/"
        links: list[str] = []
        left = deque(path.split("/"))
        while left:
            part = left.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                at = os.path.dirname(at)
                continue
            here = os.path.join(at, part)
            status = self._lstat(here)
            if status is None:
                return None, links
            if stat.S_ISLNK(status.st_mode) and (follows or any(left)):
                if len(links) >= MAX_LINKS:
                    return None, links
                links.append(here)
                target = os.readlink(here)
                at = "/" if target.startswith("/") else at
                left.extendleft(reversed(target.split("/")))
                continue
            if any(left) and not stat.S_ISDIR(status.st_mode):
                return None, links
            at = here
        return at, links

    def __contains__(self, path: str) -> bool:
        return path in self._reasons

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._reasons))

    def forget(self, path: str) -> None:
        """Take one file out again."""
        self._reasons.pop(path, None)

    def files(self) -> tuple[ClosureFile, ...]:
        """Return all that was added, sorted and hashed; without what has gone since, sockets, pipes and devices."""
        found = (self._file(path, tuple(reasons)) for path, reasons in sorted(self._reasons.items()) if path != "/")
        return tuple(file for file in found if file is not None)

    def _note(self, path: str, reason: Reason) -> None:
        reasons = self._reasons.setdefault(path, {})
        if reason.kind is Why.STATTED and reasons:
            return  # whatever else it is there for says more
        if reason.kind is not Why.STATTED:
            for weaker in [other for other in reasons if other.kind is Why.STATTED]:
                del reasons[weaker]
        kinds = {other.kind for other in reasons}
        if reason.kind not in kinds or len(reasons) < MAX_REASONS:
            reasons[reason] = None

    def _add_parents(self, path: str) -> None:
        parent = os.path.dirname(path)
        while parent != "/" and parent not in self._reasons:
            self._reasons[parent] = {}
            parent = os.path.dirname(parent)

    def _lstat(self, path: str) -> os.stat_result | None:
        if path not in self._stats:
            try:
                self._stats[path] = os.lstat(path)
            except OSError:
                self._stats[path] = None
        return self._stats[path]

    def _file(self, path: str, reasons: tuple[Reason, ...]) -> ClosureFile | None:
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                return ClosureFile(path=path, kind=FileKind.SYMLINK, mode=0o777, target=os.readlink(path), reasons=reasons)
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISDIR(status.st_mode):
                return ClosureFile(path=path, kind=FileKind.DIRECTORY, mode=mode, reasons=reasons)
            if not stat.S_ISREG(status.st_mode):
                self.left_out[path] = "a socket, pipe or device"
                return None
            size, sha256 = content_hash(path)
        except FileNotFoundError:
            return None
        except PermissionError:
            self.left_out[path] = "not readable by who analyses"
            return None
        return ClosureFile(path=path, kind=FileKind.FILE, mode=mode, size_bytes=size, sha256=sha256, reasons=reasons)


def content_hash(path: str) -> tuple[int, str]:
    """Return a file's size in bytes and the SHA-256 of its content in hex. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()
