"""Starts a server, waits until it is ready, and ends it with all it started. Ours and others' alike.

Not here: what each one needs (the peers' modules).
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from benchmarks.harness import Skip
from benchmarks.peers.programs.procs import born, tree

_LIBC = ctypes.CDLL(None)
READY_S = 90.0
END_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Which models a server is to serve, and how."""

    models: Mapping[str, Path]
    """Name to ONNX file."""
    folder: Path
    """Scratch of this server alone: repositories, settings, its log."""
    threads: int = 2
    """Of one run of the model; ONNX Runtime's spinning is off on every side."""
    max_batch_rows: int = 32
    """Rows that a server with dynamic batching may join."""
    quiet: bool = False
    """Without the lines of log per request that a server writes unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start one server."""

    argv: tuple[str, ...]
    addresses: Mapping[str, str]
    """Door to host:port."""
    env: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/v2/health/ready"
    """Answers 200 over HTTP once requests are welcome."""


@dataclass(slots=True, eq=False)
class Served:
    """A server that runs. `end`, or leaving the `with`, ends it and everything it started."""

    name: str
    process: subprocess.Popen[bytes]
    addresses: Mapping[str, str]
    log: Path

    @property
    def pid(self) -> int:
        """The first process of its tree."""
        return self.process.pid

    def last_words(self) -> str:
        """Return the end of what it wrote."""
        return self.log.read_text(errors="replace").strip()[-600:]

    def end(self) -> None:
        """SIGTERM, then SIGKILL after some seconds, to every process of the tree by its id."""
        known = {pid: born(pid) for pid in tree(self.pid)}
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        for pid, since in {**{pid: born(pid) for pid in tree(self.pid)}, **known}.items():
            if since and born(pid) == since:  # else the id may be somebody else's by now
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(END_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.end()


def start(name: str, launch: Launch, folder: Path) -> Served:
    """Start a server and wait until it is ready. Raises Skip with its last words when it isn't within 90 s."""
    folder.mkdir(parents=True, exist_ok=True)
    # No session of its own: the kernel shares cores by session first (autogroup), and a server in another session than the
    # load beside it would be given twice the share of the calls it is compared with.
    log = folder / f"{name}.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            launch.argv,
            env={**os.environ, **launch.env},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            preexec_fn=_die_with_parent,
        )
    served = Served(name, process, launch.addresses, log)
    try:
        _wait_ready(served, launch.ready_path)
    except BaseException:
        served.end()
        raise
    return served


@contextlib.contextmanager
def together(*starts: Callable[[], Served]) -> Iterator[tuple[Served, ...]]:
    """Start several servers one after the other, hold them, and end them all, also when one of them did not start."""
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(begin()) for begin in starts)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody had on the loopback a moment ago."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


def _die_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the benchmark ends, however it ends (prctl(2), PR_SET_PDEATHSIG = 1)."""
    _LIBC.prctl(1, signal.SIGTERM)


def _wait_ready(served: Served, path: str) -> None:
    until_s = time.monotonic() + READY_S
    while time.monotonic() < until_s:
        if served.process.poll() is not None:
            raise Skip(f"{served.name} ended with {served.process.returncode} while starting: {served.last_words()}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(served.addresses["http"], timeout=5)
            try:
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            finally:
                connection.close()
        time.sleep(0.05)
    raise Skip(f"{served.name} was not ready within {READY_S:g} s: {served.last_words()}")
