"""The processes of one watched life: found whoever their parent is by now, looked at, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil
from psutil import Process

from tenure.errors import Unavailable


def all_of(outer: int) -> list[Process]:
    """Return the processes below the one that was started, and all that it traces, whoever their parent is by now."""
    found: dict[int, Process] = {}
    with contextlib.suppress(psutil.Error):
        found = {process.pid: process for process in Process(outer).children(recursive=True)}
    wanted = f"\nTracerPid:\t{outer}\n"
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if pid not in found and wanted in Path(f"/proc/{pid}/status").read_text(errors="replace"):
                found[pid] = Process(pid)
    return list(found.values())


def first_pid(trace: Path) -> int:
    """Return the process of a trace's first line, which is the program: strace has trials of its own as children. 0: none."""
    with contextlib.suppress(OSError, ValueError), open(trace, "rb") as file:
        return int(file.readline(64).split(b" ", 1)[0])
    return 0


def lives(pid: int) -> bool:
    """Whether a process is there, and has not ended."""
    try:
        return bool(Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def name_of(process: Process) -> str:
    """Return what a process is called, also when it has just ended."""
    try:
        return str(process.name())
    except psutil.Error:
        return f"process {process.pid}"


def listening(pid: int) -> tuple[int, ...]:
    """Return the TCP ports on which any process below `pid`, or itself, listens."""
    ports: set[int] = set()
    for process in [*all_of(pid), *([Process(pid)] if psutil.pid_exists(pid) else [])]:
        with contextlib.suppress(psutil.Error):
            ports |= {c.laddr.port for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}
    return tuple(sorted(ports))


def end_all(outer: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a life: the watcher last, or what it watches would run on unwatched."""
    for process in all_of(outer.pid):
        with contextlib.suppress(psutil.Error):
            process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(outer.pid, signal.SIGKILL)
    try:
        outer.wait(timeout=10.0)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"process {outer.pid} did not end 10 s after it was killed") from error
