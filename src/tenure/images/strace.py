"""Lines of ``strace -f`` as records: which process called what, with which arguments, and how it ended.

For: the trace that a closure and a system-call profile are made from. Not for starting strace, nor for following what a
relative path means (the record says which directory a call named; a process's own is the reader's to follow).

Read are the forms that strace 5 and 6 write with ``-f`` (pid first, or ``[pid N]``), with or without ``-y``/``-yy``, ``-t``
in its kinds and ``-T``. A call that strace cut in two (``<unfinished ...>``, ``<... resumed>``) is one record, given when it
ends. What can't be read is counted and kept, never guessed: see `StraceParser.unread`.

Source: strace(1), and what strace 6.1 prints.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

MAX_KEPT_UNREAD = 20
"""How many unreadable lines a parser keeps word by word; the rest are counted."""


class PathUse(StrEnum):
    """What a call does with a path."""

    OPENED = "opened"
    STATTED = "statted"
    """Asked for: stat, access, readlink and their kin."""
    EXECUTED = "executed"
    CHANGED = "changed"
    """Written, made, renamed or removed."""
    ENTERED = "entered"
    """Made the process's directory or root: chdir, chroot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathArgument:
    """One path that a call was given."""

    path: str
    """As the program wrote it (undecodable bytes as `os.fsdecode` does); empty for a descriptor alone."""
    directory: str
    """What a relative path starts from, when ``-y`` told it; empty: the process's own directory."""
    use: PathUse
    follows: bool
    """Whether a symbolic link at the end of the path is followed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One system call that has ended, or whose process has."""

    pid: int
    """0 when strace named none (without ``-f``)."""
    name: str
    arguments: tuple[str, ...]
    """As strace wrote each, e.g. ``'AT_FDCWD</srv>'``, ``'"a.py"'``, ``'O_RDONLY|O_CLOEXEC'``, ``'flags=CLONE_VM'``."""
    result: int | None
    """What it returned; None when strace saw no return (``?``)."""
    error: str = ""
    """Name of the error, e.g. ``ENOENT``; empty on success."""
    result_path: str = ""
    """File of a returned descriptor, when ``-y`` told it."""

    @property
    def failed(self) -> bool:
        """Whether it returned an error."""
        return bool(self.error)

    def paths(self) -> tuple[PathArgument, ...]:
        """Return the paths that the call was given; none for a call that takes none, or whose path strace could not read."""
        found = (_path_argument(self, *place) for place in _PATHS.get(self.name, ()))
        return tuple(argument for argument in found if argument is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The end of a process or thread."""

    pid: int
    exit_code: int | None = None
    """None when a signal ended it."""
    signal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A signal that was delivered."""

    pid: int
    name: str


Record = Call | Ended | Signal


@dataclass(slots=True)
class StraceParser:
    """Reads lines one by one; holds only the calls that have begun and not ended, at most one for each process."""

    unread_count: int = 0
    unread: list[str] = field(default_factory=list)
    """The first unreadable lines, at most `MAX_KEPT_UNREAD`."""
    _begun: dict[int, str] = field(default_factory=dict)

    def feed(self, line: str) -> Record | None:
        """Return the record that a line ends, or None: a call's first half, strace's own words, or an unreadable line."""
        line = line.rstrip("\n")
        match = _PREFIX.match(line)
        assert match is not None  # every part of the pattern may be empty
        pid = int(match["bracket"] or match["plain"] or 0)
        rest = line[match.end() :]
        if not rest or rest.startswith(("strace: ", "[ Process ")):
            return None
        if rest.startswith(("+++ ", "--- ")):
            return self._event(pid, rest, line)
        return self._call(pid, rest, line)

    def close(self) -> list[Call]:
        """Return the calls that never ended, with no result: the trace stopped, or their process did."""
        left = [self._read(pid, text + ") = ?") for pid, text in sorted(self._begun.items())]
        self._begun.clear()
        return [call for call in left if call is not None]

    def _call(self, pid: int, rest: str, line: str) -> Call | None:
        resumed = _RESUMED.match(rest)
        if resumed is not None:
            begun = self._begun.pop(pid, None)
            if begun is None or not begun.startswith(resumed[1] + "("):
                return self._refuse(line)
            rest = begun + rest[resumed.end() :]
        if rest.endswith(_UNFINISHED):
            self._begun[pid] = rest.removesuffix(_UNFINISHED).rstrip(" ")
            return None
        return self._read(pid, _KILLED_INSIDE.sub(r"\1", rest)) or self._refuse(line)

    def _read(self, pid: int, text: str) -> Call | None:
        name = _NAME.match(text)
        if name is None:
            return None
        split = split_arguments(text, name.end())
        if split is None:
            return None
        arguments, end = split
        result = _RESULT.match(text, end)
        if result is None:
            return None
        return Call(
            pid=pid,
            name=name[1],
            arguments=arguments,
            result=_number(result["number"]),
            error=result["error"] or "",
            result_path=_annotated(text[result.end("number") :]),
        )

    def _event(self, pid: int, rest: str, line: str) -> Record | None:
        ended = _ENDED.match(rest)
        if ended is not None:
            code = ended["code"]
            return Ended(pid=pid, exit_code=int(code) if code else None, signal=ended["signal"] or "")
        superseded = _SUPERSEDED.match(rest)
        if superseded is not None:  # the thread that called execve goes on under the pid of its process
            begun = self._begun.pop(int(superseded[1]), None)
            if begun is not None:
                self._begun[pid] = begun
            return None
        signal = _SIGNAL.match(rest)
        if signal is not None:
            return None if signal[1].startswith("stopped") else Signal(pid=pid, name=signal[1])
        return self._refuse(line)

    def _refuse(self, line: str) -> Call | None:
        """Count a line that can't be read; no record comes of it."""
        self.unread_count += 1
        if len(self.unread) < MAX_KEPT_UNREAD:
            self.unread.append(line)
        return None


def parse(lines: Iterable[str], parser: StraceParser | None = None) -> Iterator[Record]:
    """Yield the records of a whole trace, those that never ended last. Give a `parser` to see what could not be read."""
    parser = StraceParser() if parser is None else parser
    for line in lines:
        record = parser.feed(line)
        if record is not None:
            yield record
    yield from parser.close()


def split_arguments(text: str, start: int) -> tuple[tuple[str, ...], int] | None:
    """Return the arguments from `start` (after the bracket) on, and the place after the closing one; None: it never closes."""
    arguments: list[str] = []
    closers: list[str] = []
    begin = at = start
    while (special := _SPECIAL.search(text, at)) is not None:
        at = special.start()
        char = text[at]
        if char == '"':
            at = _after_string(text, at)
        elif char == "<":
            at = _after_annotation(text, at) if _opens_annotation(text, at) else at + 1
        elif char == "/":
            at = _after(text, "*/", at + 2)
        elif char in _CLOSER:
            closers.append(_CLOSER[char])
            at += 1
        elif closers or char not in ",)":
            if closers and char == closers[-1]:
                closers.pop()
            at += 1
        else:
            last = text[begin:at].strip()
            if last or char == ",":
                arguments.append(last)
            at = begin = at + 1
            if char == ")":
                return tuple(arguments), at
    return None


def decode_string(argument: str) -> bytes | None:
    """Return the bytes of a string argument, without what strace left out of it; None when the argument is no string."""
    if not argument.startswith('"'):
        return None
    end = _after_string(argument, 0)
    if end > len(argument) or argument[end - 1] != '"' or end < 2:
        return None
    return _unescape(argument[1 : end - 1])


def descriptor_path(argument: str) -> str:
    """Return the file that ``-y`` told behind a descriptor or AT_FDCWD; empty when it told none, or no file."""
    match = _DESCRIPTOR.match(argument)
    return _annotated(argument[match.end() :]) if match is not None else ""


def _path_argument(call: Call, directory: int | None, path: int, use: PathUse, follows: bool) -> PathArgument | None:
    if path >= len(call.arguments) or (directory is not None and directory >= len(call.arguments)):
        return None
    text = decode_string(call.arguments[path])
    if text is None:
        return None
    flags = [argument for argument in call.arguments[path + 1 :] if argument[:1] not in ('"', "[")]
    if use is PathUse.OPENED and any(_WRITES.search(flag) for flag in flags):
        use = PathUse.CHANGED
    if any("NOFOLLOW" in flag for flag in flags):
        follows = False
    told = descriptor_path(call.arguments[directory]) if directory is not None else ""
    return PathArgument(path=os.fsdecode(text), directory=told, use=use, follows=follows)


def _number(text: str) -> int | None:
    if text == "?":
        return None
    octal = len(text) > 1 and text.isdigit() and text[0] == "0"  # umask's
    return int(text, 8 if octal else 0)


def _annotated(text: str) -> str:
    """Return the path at the start of `text` if that is ``<path>`` as ``-y`` writes it, else the empty string."""
    if not text.startswith("</"):
        return ""
    inside = text[1 : _after_annotation(text, 0) - 1]
    return os.fsdecode(_unescape(_DEVICE.sub("", inside)))


def _opens_annotation(text: str, at: int) -> bool:
    """Whether ``<`` tells what a descriptor or a process id is; not in ``1<<CAP_CHOWN``."""
    return at > 0 and (text[at - 1].isdigit() or text.endswith("AT_FDCWD", 0, at)) and text[at + 1 : at + 2] != "<"


def _after_annotation(text: str, at: int) -> int:
    """Return the place after ``<...>``. Paths have their brackets escaped; sockets hold arrows (``->``) and quoted paths."""
    is_path = text.startswith("</", at)
    depth = 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 2
            continue
        if char == '"' and not is_path:
            at = _after_string(text, at)
            continue
        if char == "<":
            depth += 1
        elif char == ">" and (is_path or text[at - 1] != "-"):
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return len(text) + 1


def _after_string(text: str, at: int) -> int:
    string = _STRING.match(text, at)
    return string.end() if string is not None else len(text) + 1


def _after(text: str, what: str, at: int) -> int:
    found = text.find(what, at)
    return len(text) if found < 0 else found + len(what)


def _unescape(text: str) -> bytes:
    raw = os.fsencode(text)
    return _ESCAPE.sub(_unescaped, raw)


def _unescaped(match: re.Match[bytes]) -> bytes:
    code = match[1]
    if code[:1] in b"01234567":
        return bytes([int(code, 8) & 0xFF])
    if code[:1] == b"x":
        return bytes([int(code[1:], 16)])
    return _LETTERS.get(code, code)


_CLOSER = {"(": ")", "[": "]", "{": "}"}
_SPECIAL = re.compile(r'["<(\[{)\]},]|/\*')
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_UNFINISHED = "<unfinished ...>"
_TIME = r"(?:(?:\d+:\d\d:\d\d(?:\.\d+)?|\d+\.\d+)\s+)?"
_PREFIX = re.compile(rf"\s*(?:\[pid\s+(?P<bracket>\d+)\]\s+|(?P<plain>\d+)(?:<[^>]*>)?\s+)?{_TIME}")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\(")
_RESUMED = re.compile(r"<\.\.\. ([A-Za-z_][A-Za-z0-9_]*) resumed>\s?")
_KILLED_INSIDE = re.compile(r"\s*<unfinished \.\.\.>(\)\s+= \?)")
_RESULT = re.compile(r"\s*= (?P<number>-?0x[0-9a-f]+|-?\d+|\?)(?P<told><.*?>)?(?: (?P<error>E[A-Z0-9_]+)\b)?")
_ENDED = re.compile(r"\+\+\+ (?:exited with (?P<code>\d+)|killed by (?P<signal>\w+(?: \d+)?)(?: \(core dumped\))?) \+\+\+")
_SUPERSEDED = re.compile(r"\+\+\+ superseded by execve in pid (\d+) \+\+\+")
_SIGNAL = re.compile(r"--- (stopped by \w+|SIG\w+)")
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)(?=<)")
_DEVICE = re.compile(r"<(?:char|block) \d+:\d+>$")
_WRITES = re.compile(r"\bO_(?:WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)\b")
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"v": b"\v", b"f": b"\f", b"b": b"\b", b"a": b"\a"}

_Place = tuple[int | None, int, PathUse, bool]
"""Index of the directory's descriptor (None: the call takes none), of the path, the use, whether a last link is followed."""


def _paths_of(use: PathUse, follows: bool, **names: tuple[int | None, int]) -> dict[str, tuple[_Place, ...]]:
    return {name: ((place[0], place[1], use, follows),) for name, place in names.items()}


_PATHS: dict[str, tuple[_Place, ...]] = {
    **_paths_of(PathUse.OPENED, True, open=(None, 0), openat=(0, 1), openat2=(0, 1), open_tree=(0, 1), uselib=(None, 0)),
    **_paths_of(PathUse.STATTED, True, stat=(None, 0), newfstatat=(0, 1), fstatat64=(0, 1), statx=(0, 1), statfs=(None, 0)),
    **_paths_of(PathUse.STATTED, True, access=(None, 0), faccessat=(0, 1), faccessat2=(0, 1), inotify_add_watch=(None, 1)),
    **_paths_of(PathUse.STATTED, True, getxattr=(None, 0), listxattr=(None, 0), name_to_handle_at=(0, 1)),
    **_paths_of(PathUse.STATTED, False, lstat=(None, 0), readlink=(None, 0), readlinkat=(0, 1)),
    **_paths_of(PathUse.STATTED, False, lgetxattr=(None, 0), llistxattr=(None, 0)),
    **_paths_of(PathUse.EXECUTED, True, execve=(None, 0), execveat=(0, 1)),
    **_paths_of(PathUse.ENTERED, True, chdir=(None, 0), chroot=(None, 0)),
    **_paths_of(PathUse.CHANGED, True, creat=(None, 0), truncate=(None, 0), chmod=(None, 0), chown=(None, 0)),
    **_paths_of(PathUse.CHANGED, True, fchmodat=(0, 1), fchmodat2=(0, 1), fchownat=(0, 1), utimensat=(0, 1), futimesat=(0, 1)),
    **_paths_of(PathUse.CHANGED, True, utime=(None, 0), utimes=(None, 0), setxattr=(None, 0), removexattr=(None, 0)),
    **_paths_of(PathUse.CHANGED, False, mkdir=(None, 0), mkdirat=(0, 1), rmdir=(None, 0), mknod=(None, 0), mknodat=(0, 1)),
    **_paths_of(
        PathUse.CHANGED, False, unlink=(None, 0), unlinkat=(0, 1), lchown=(None, 0), symlink=(None, 1), symlinkat=(1, 2)
    ),
    **_paths_of(PathUse.CHANGED, False, lsetxattr=(None, 0), lremovexattr=(None, 0)),
    "rename": ((None, 0, PathUse.CHANGED, False), (None, 1, PathUse.CHANGED, False)),
    "renameat": ((0, 1, PathUse.CHANGED, False), (2, 3, PathUse.CHANGED, False)),
    "renameat2": ((0, 1, PathUse.CHANGED, False), (2, 3, PathUse.CHANGED, False)),
    "link": ((None, 0, PathUse.STATTED, False), (None, 1, PathUse.CHANGED, False)),
    "linkat": ((0, 1, PathUse.STATTED, False), (2, 3, PathUse.CHANGED, False)),
    "mount": ((None, 1, PathUse.CHANGED, True),),
    "umount2": ((None, 0, PathUse.CHANGED, True),),
}
