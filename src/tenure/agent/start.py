"""Start a node's agent as a process of its own, detached from the caller, and wait until it answers."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from tenure import orders
from tenure.agent.__main__ import REFUSED, TAKEN
from tenure.errors import Refused, Unavailable
from tenure.sockets import LineClient

_TAIL_BYTES = 2000
_started: set[int] = set()
"""Agents that this process started: reaped when the next is started, so that none stays a zombie for long."""


def start_agent(
    home: Path,
    node: str,
    socket: Path,
    *,
    term_s: float,
    cpus: float | None = None,
    memory_bytes: int | None = None,
    gpus: int | None = None,
    gpu_model: str = "",
    gpu_memory_bytes: int = 0,
    confine: str = "auto",
    wait_s: float = 10.0,
) -> None:
    """Start the agent and return once its socket answers; one that already runs is as good.

    Raises Refused when the machine's share is taken (with who holds it), Unavailable, with the end of its log, when it does
    not answer within `wait_s`.
    """
    _reap()
    log = Path(home) / "nodes" / node / "agent.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    start_at = log.stat().st_size if log.exists() else 0
    argv = [sys.executable, "-m", "tenure.agent", "--home", str(home), "--node", node, "--socket", str(socket)]
    argv += ["--term", repr(float(term_s)), "--confine", confine]
    argv += [] if cpus is None else ["--cpus", repr(float(cpus))]
    argv += [] if memory_bytes is None else ["--memory", str(memory_bytes)]
    argv += [] if gpus is None else ["--gpus", str(gpus)]
    argv += ["--gpu-model", gpu_model] if gpu_model else []
    argv += ["--gpu-memory", str(gpu_memory_bytes)] if gpu_memory_bytes else []
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        sys.executable,
        argv,
        dict(os.environ),
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    _started.add(pid)
    deadline = time.monotonic() + wait_s
    code: int | None = None
    while not _answers(socket):
        if code is None and (ended := os.waitpid(pid, os.WNOHANG))[0]:
            _started.discard(pid)
            code = os.waitstatus_to_exitcode(ended[1])
            if code == REFUSED:
                raise Refused(_tail(log, start_at) or f"node {node} was refused a share of this machine")
        if code not in (None, TAKEN) or time.monotonic() > deadline:
            fate = "still runs" if code is None else f"ended with code {code}"
            raise Unavailable(
                f"the agent of node {node} did not answer on {socket} within {wait_s:g} s ({fate}); end of {log}: "
                f"{_tail(log, start_at) or 'empty'}"
            )
        time.sleep(0.02)


def is_agent_alive(home: Path, node: str) -> bool:
    """Return whether a process is this node's agent, answering or not: it holds the node's lock as long as it lives."""
    try:
        descriptor = os.open(Path(home) / "nodes" / node / "agent.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _answers(socket: Path) -> bool:
    try:
        LineClient(socket, orders.AGENT_OPS, who="starter", timeout_s=5.0).close()
    except Unavailable:
        return False
    return True


def _reap() -> None:
    for pid in list(_started):
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid
        if ended:
            _started.discard(pid)


def _tail(log: Path, start_at: int) -> str:
    try:
        with open(log, "rb") as stream:
            stream.seek(max(start_at, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return stream.read(_TAIL_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return ""
