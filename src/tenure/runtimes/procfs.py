"""What /proc says about processes: identity, descent, memory. Standard library only, so that a shim can use it.

For: the shim and the process runtime, which must find and count whole process trees. Not for: metering with a
schedule, GPUs or other parties (`meter`). A process that vanishes while it is read counts as gone, never as an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
MAX_PROCESSES = 65536
"""Bound of one walk over a tree."""


def read_text(path: str, max_bytes: int = 1 << 20) -> str:
    """Return a small file's text. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while max_bytes > 0 and (part := os.read(fd, min(max_bytes, 65536))):
            parts.append(part)
            max_bytes -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts).decode("utf-8", "replace")


def _stat_fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from the third on (proc(5)), or None when the process is gone."""
    try:
        text = read_text(f"/proc/{pid}/stat")
    except OSError:
        return None
    return text[text.rfind(")") + 2 :].split()


def environment(pid: int) -> dict[str, str]:
    """Return the environment a process was started with; empty when it is gone or not ours to see."""
    try:
        pairs = read_text(f"/proc/{pid}/environ", 4 << 20).split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def start_ticks(pid: int) -> int:
    """Return field 22 of /proc/<pid>/stat, the start time in clock ticks since boot; 0 when the process is gone."""
    fields = _stat_fields(pid)
    return int(fields[19]) if fields and len(fields) > 19 else 0


def is_alive(pid: int, ticks: int) -> bool:
    """Return whether the process with this pid *and* start time still runs. A zombie does not."""
    fields = _stat_fields(pid) if pid > 0 else None
    return fields is not None and len(fields) > 19 and int(fields[19]) == ticks and fields[0] not in "ZX"


def _children_by_task(pid: int) -> list[int] | None:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    children: list[int] = []
    for task in tasks:
        try:
            children.extend(int(word) for word in read_text(f"/proc/{pid}/task/{task}/children").split())
        except FileNotFoundError:
            if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
                return None  # kernel without CONFIG_PROC_CHILDREN
        except OSError:
            continue
    return children


def _children_by_scan() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat_fields(int(name))):
            children.setdefault(int(fields[1]), []).append(int(name))
    return children


def descendants(pid: int) -> list[int]:
    """Return the pids of all processes below `pid` (not itself), nearest first, at most `MAX_PROCESSES`."""
    found: list[int] = []
    seen = {pid}
    queue = [pid]
    by_parent: dict[int, list[int]] | None = None
    while queue and len(found) < MAX_PROCESSES:
        parent = queue.pop(0)
        children = _children_by_task(parent) if by_parent is None else by_parent.get(parent, [])
        if children is None:
            by_parent = _children_by_scan()
            children = by_parent.get(parent, [])
        for child in children:
            if child not in seen:
                seen.add(child)
                found.append(child)
                queue.append(child)
    return found


@dataclass(frozen=True, slots=True)
class TreeUse:
    """Sums over living processes."""

    memory_bytes: int = 0
    """RssAnon + RssShmem (proc_pid_status(5)); pages shared by processes count once for each."""
    cpu_s: float = 0.0
    """Own time and that of children they have waited for."""
    read_bytes: int = 0
    write_bytes: int = 0
    processes: int = 0


def tree_use(pids: Iterable[int]) -> TreeUse:
    """Return the consumption of the living processes among `pids`."""
    memory = read = written = count = ticks = 0
    for pid in pids:
        fields = _stat_fields(pid)
        if fields is None or fields[0] in "ZX":
            continue
        count += 1
        ticks += sum(int(fields[index]) for index in (11, 12, 13, 14))
        memory += resident_bytes(pid)
        pair = io_bytes(pid)
        read, written = read + pair[0], written + pair[1]
    return TreeUse(memory, ticks / _TICKS_PER_S, read, written, count)


def resident_bytes(pid: int) -> int:
    """Return RssAnon + RssShmem of one process; 0 when it is gone."""
    total = 0
    try:
        for line in read_text(f"/proc/{pid}/status").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return total


def io_bytes(pid: int) -> tuple[int, int]:
    """Return bytes read from and written to storage by a process and the children it has waited for; zeros when unknown."""
    try:
        values = dict(line.split(": ", 1) for line in read_text(f"/proc/{pid}/io").splitlines() if ": " in line)
        return int(values.get("read_bytes", "0")), int(values.get("write_bytes", "0"))
    except (OSError, ValueError):
        return 0, 0


def waited_cpu_s(pid: int) -> float:
    """Return the CPU seconds of the children that a process has waited for."""
    fields = _stat_fields(pid)
    return (int(fields[13]) + int(fields[14])) / _TICKS_PER_S if fields else 0.0


def with_environment(name: str, value: str) -> list[int]:
    """Return the pids of all living processes started with this environment variable, as far as we may look; not ourselves."""
    wanted = f"{name}={value}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as stream:
                if wanted in stream.read(1 << 20).split(b"\0"):
                    found.append(int(entry))
        except OSError:
            continue
    return found


def disk_use(folder: str, *, max_entries: int = 200_000) -> int:
    """Return the bytes that a folder's files occupy (allocated blocks, hard links once), at most `max_entries` looked at."""
    total = 0
    seen: set[tuple[int, int]] = set()
    queue = [folder]
    while queue and max_entries > 0:
        try:
            with os.scandir(queue.pop()) as entries:
                for entry in entries:
                    max_entries -= 1
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if info.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (info.st_dev, info.st_ino) in seen:
                            continue
                        seen.add((info.st_dev, info.st_ino))
                    total += info.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        queue.append(entry.path)
        except OSError:
            continue
    return total
