"""What a tree of processes uses, read from /proc alone: also run by interpreters that have nothing installed.

Not the meter: here nanoseconds of CPU between two calls count, and memory that several processes share counts once.
"""

from __future__ import annotations

import contextlib
import os


def tree(pid: int) -> list[int]:
    """Return the process and all its living descendants; empty when it is gone."""
    found, queue = [], [pid]
    while queue:
        one = queue.pop()
        try:
            threads = os.listdir(f"/proc/{one}/task")
        except OSError:
            continue
        found.append(one)
        for thread in threads:
            try:
                with open(f"/proc/{one}/task/{thread}/children") as file:
                    queue += [int(word) for word in file.read().split()]
            except OSError:
                continue
    return found


def born(pid: int) -> str:
    """Return when a process started, in ticks since boot: with its id it names one process for good. Empty: it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def cpu_s(pids: list[int]) -> float:
    """Return the CPU seconds of these processes' living threads (nanosecond counters of the scheduler)."""
    total_ns = 0
    for pid in pids:
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                    total_ns += int(file.read().split()[0])
            except (OSError, IndexError):
                continue
    return total_ns / 1e9


def pss_bytes(pids: list[int]) -> int:
    """Return the proportional set size of these processes together: pages shared among them count once."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                for line in file:
                    if line.startswith(b"Pss:"):
                        total += int(line.split()[1]) << 10
                        break
        except OSError:
            continue
    return total


def ask_for_real_time() -> None:
    """Run this process, and threads it starts from now on, as soon as they have something to do, where that is allowed."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
