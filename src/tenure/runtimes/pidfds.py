"""Processes named without doubt: a pid together with its start time, held by a pidfd (pidfd_open(2)).

For: waiting for and signalling a process that is not our child. Not for: reading about processes (`procfs`).
"""

from __future__ import annotations

import os
import select
import signal

from tenure.runtimes import procfs


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """Return a file descriptor that becomes readable when the process ends; None when it has ended. The caller closes it."""
    try:
        fd = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        return None
    if not procfs.is_alive(pid, start_ticks):
        os.close(fd)
        return None
    return fd


def wait(pid: int, start_ticks: int, timeout_s: float) -> bool:
    """Return whether the process has ended, after at most `timeout_s`."""
    fd = open_pidfd(pid, start_ticks)
    if fd is None:
        return True
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(max(0.0, timeout_s) * 1000))
    finally:
        os.close(fd)


def send(pid: int, start_ticks: int, number: signal.Signals) -> bool:
    """Send a signal; return whether the process was still there."""
    fd = open_pidfd(pid, start_ticks)
    if fd is None:
        return False
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True
