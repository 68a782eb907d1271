"""What a closure is made of, in numbers: by kind, by part, the largest. Not here: how it is printed (`cli.imaging`)."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tenure.closures import Closure, ClosureFile, FileKind, Why

LARGEST = 10
_SITE = re.compile(r"/(?:site|dist)-packages/([^/]+)")
_STDLIB = re.compile(r"/lib(?:64)?/python3\.\d+/")
_LIBRARY = re.compile(r"\.so(?:\.[\w.]+)?$")
_SYSTEM = ("/usr/lib", "/usr/share", "/usr/bin", "/usr/sbin", "/usr/libexec", "/lib", "/bin", "/sbin", "/etc", "/opt/lib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How much of a closure something is."""

    name: str
    files: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosureReport:
    """A closure in numbers."""

    files: int
    """Entries that are files; links and folders apart."""
    links: int
    folders: int
    size_bytes: int
    opened: int
    """Files opened or executed under watch."""
    looked_at: int
    """Files that were looked at and never opened: without them the program fails all the same."""
    kinds: tuple[Share, ...]
    """Shared objects, Python sources, all else."""
    parts: tuple[Share, ...]
    """Python packages, Python itself, the system, the program; the largest first."""
    largest: tuple[ClosureFile, ...]
    system_calls: tuple[str, ...]


def report(closure: Closure) -> ClosureReport:
    """Return the closure in numbers."""
    files = [file for file in closure.files if file.kind is FileKind.FILE]
    kinds = {file: {reason.kind for reason in file.reasons} for file in files}
    return ClosureReport(
        files=len(files),
        links=sum(file.kind is FileKind.SYMLINK for file in closure.files),
        folders=sum(file.kind is FileKind.DIRECTORY for file in closure.files),
        size_bytes=closure.size_bytes,
        opened=sum(bool(found & {Why.OPENED, Why.EXECUTED}) for found in kinds.values()),
        looked_at=sum(found == {Why.STATTED} for found in kinds.values()),
        kinds=_shares((_kind_of(file.path), file) for file in files),
        parts=_shares((part_of(file.path), file) for file in files),
        largest=tuple(sorted(files, key=lambda file: (-file.size_bytes, file.path))[:LARGEST]),
        system_calls=tuple(call.name for call in closure.system_calls),
    )


def part_of(path: str) -> str:
    """Return which part of a program a file belongs to: a package of Python, Python, the system, or the program itself."""
    site = _SITE.search(path)
    if site:
        return _package(site[1])
    name = os.path.basename(path)
    if _STDLIB.search(path) or re.match(r"(?:lib)?python3?(?:\.|$|\d)", name) or name == "pyvenv.cfg":
        return "Python"
    return "the system" if path.startswith(_SYSTEM) else "the program"


def _package(folder: str) -> str:
    if folder.endswith((".dist-info", ".egg-info")):
        return re.split(r"-\d", folder)[0].lower()
    return folder.removesuffix(".libs").partition(".")[0].lower()


def _kind_of(path: str) -> str:
    if _LIBRARY.search(path):
        return "shared objects"
    return "Python sources" if path.endswith(".py") else "other files"


def _shares(pairs: Iterable[tuple[str, ClosureFile]]) -> tuple[Share, ...]:
    counts: defaultdict[str, int] = defaultdict(int)
    sizes: defaultdict[str, int] = defaultdict(int)
    for name, file in pairs:
        counts[name] += 1
        sizes[name] += file.size_bytes
    shares = [Share(name=name, files=counts[name], size_bytes=sizes[name]) for name in counts]
    return tuple(sorted(shares, key=lambda share: (-share.size_bytes, share.name)))
