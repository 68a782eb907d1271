"""One node of an experiment: the processes that share one lease, alive together, of which one cell at a time makes work.

    ──orders (FIFO)──► node ──stdin──► application 1 … n
    ◄─answers (FIFO)──      ◄─stdout──
                       └──starts──► server, where this node has it

Applications stay alive so that the cells of all settings can be drawn in any order; those that are not asked wait in a read
and use nothing. Not here: which cells (`tenure.experiments.sweep`), what a cell is (`standing`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

import msgspec

from tenure.errors import CorruptData, JobFailed, TenureError
from tenure.meter import cgroups
from tenure.serve.load.orders import (
    ANSWERS,
    ORDERS,
    READY,
    Cell,
    NodeReady,
    NodeSpec,
    Order,
    Standing,
    copies,
    read,
    standing_command,
    together,
    write,
)
from tenure.serve.processes import worker_dir, write_json

T = TypeVar("T")
LEAVE_S = 5.0
"""How long what runs here may take to leave before it is killed."""
MAX_LINE_BYTES = 8 << 20
MAX_SHARES, MAX_WEIGHT = 262_144, 10_000
"""The kernel's highest CPU weights, of control groups v1 and v2; 1024 and 100 are usual."""


class Left(Exception):
    """Raised by SIGTERM: the lease ends."""


def main(argv: Sequence[str]) -> int:
    """Run a node until SIGTERM; exit code 0, 1 when it could not be started, 2 for wrong use."""
    folder = worker_dir(os.environ)
    if len(argv) != 1 or folder is None:
        sys.stderr.write("usage: TENURE_WORKER_DIR=DIR python -m tenure.serve.load.node SPEC.json\n")
        return 2
    signal.signal(signal.SIGTERM, _leave)
    node = Node(folder)
    try:
        try:
            ready = node.start(msgspec.json.decode(Path(argv[0]).read_bytes(), type=NodeSpec))
        except (TenureError, OSError, msgspec.MsgspecError) as error:
            sys.stderr.write(f"tenure.serve.load.node: {error}\n")
            write_json(folder / READY, {"error": f"{error}"})
            return 1
        write_json(folder / READY, msgspec.to_builtins(ready))
        if ready.endpoints:
            write_json(folder / "endpoints.json", ready.endpoints)
        node.serve()
    except Left:
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        node.stop()
    return 0


def _leave(number: int, frame: object) -> None:
    raise Left


class Node:
    """The processes of one node."""

    def __init__(self, folder: Path) -> None:
        """folder: where the FIFOs are made and logs are written."""
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        self._children: dict[str, Child] = {}
        for name in (ORDERS, ANSWERS):
            os.mkfifo(folder / name, 0o600)
        # Open at both ends: reading then waits for orders whoever has come and gone, and costs nothing meanwhile.
        self._orders = os.fdopen(os.open(folder / ORDERS, os.O_RDWR | os.O_CLOEXEC), "rb", buffering=0)
        self._answers = os.open(folder / ANSWERS, os.O_RDWR | os.O_CLOEXEC)

    def start(self, spec: NodeSpec) -> NodeReady:
        """Start the server, then the applications; they prepare one after the other. Raises JobFailed."""
        end_s = time.monotonic() + spec.start_s
        disturbed = go_first(os.environ.get("TENURE_LEASE_ID", "")) if spec.undisturbed else ""
        endpoints: dict[str, str] = {}
        began_s = time.monotonic()
        if spec.server:
            self._server = self._popen(spec.server, "server", stdin=subprocess.DEVNULL)
            assert self._server.stdout is not None
            line = _line(self._server.stdout, end_s)
            if not line:
                raise JobFailed(f"the server did not listen within {spec.start_s:g} s, or ended (exit {self._server.poll()})")
            endpoints = _addresses(line)
        server_start_s = time.monotonic() - began_s
        for each in spec.applications:
            process = self._popen(standing_command(), each.name, stdin=subprocess.PIPE)
            self._children[each.name] = Child(each.name, process)
        for child in self._children.values():  # all have loaded their code before the first prepares its model, which is timed
            self._started(child, end_s, dict)
        standing = []
        for each in spec.applications:
            child = self._children[each.name]
            child.send(write(each.at(endpoints)))
            standing.append(self._started(child, end_s, Standing))
        return NodeReady(
            pid=os.getpid(),
            server_pid=self._server.pid if self._server else 0,
            endpoints=endpoints,
            server_start_s=server_start_s if spec.server else 0.0,
            applications=tuple(standing),
            disturbed=disturbed,
        )

    def _started(self, child: Child, end_s: float, kind: type[T]) -> T:
        try:
            return read(child.answer(max(0.1, end_s - time.monotonic())), kind)
        except CorruptData as error:
            raise JobFailed(f"application {child.name} could not be prepared: {error}") from error

    def serve(self) -> None:
        """Hand on orders and answers, one at a time, for ever."""
        held = b""
        while True:
            held += self._orders.read(1 << 16)
            *lines, held = held.split(b"\n")
            for line in lines:
                _write_all(self._answers, self.answer(line))

    def answer(self, line: bytes) -> bytes:
        """Return what came of one order, one line; a refusal too."""
        try:
            order = msgspec.json.decode(line, type=Order)
        except msgspec.MsgspecError as error:
            return write({"error": f"{line[:200]!r} is no order: {error}"})
        asked: list[Child] = []
        for name in copies(order.application, order.copies):
            if (child := self._children.get(name)) is None:
                known = ", ".join(self._children)
                return write({"error": f"there is no application {name!r} here; there are {known}"})
            asked.append(child)
        for child in asked:
            child.send(line + b"\n")
        end_s = time.monotonic() + order.bound_s
        answers = [asked[0].answer(order.bound_s), *(child.answer(max(0.0, end_s - time.monotonic())) for child in asked[1:])]
        if len(answers) == 1:
            return answers[0]
        try:
            return write(together([read(answer, Cell) for answer in answers]))
        except CorruptData as error:
            return write({"error": str(error)})

    def _popen(self, argv: Sequence[str], name: str, *, stdin: int) -> subprocess.Popen[bytes]:
        # Not the node's own worker folder: what these write there would pass for the node's.
        environment = {key: value for key, value in os.environ.items() if key != "TENURE_WORKER_DIR"}
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE, env=environment, cwd=folder)

    def stop(self) -> None:
        """End everything: applications at the end of their orders, the server by SIGTERM, what stays by SIGKILL."""
        processes = [child.process for child in self._children.values()]
        for child in self._children.values():
            child.close()
        if self._server is not None:
            self._server.terminate()
            processes.append(self._server)
        end_s = time.monotonic() + LEAVE_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, end_s - time.monotonic()))
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


class Child:
    """One application, by its pipes."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.name, self.process = name, process
        self._in, self._out = process.stdin, process.stdout

    def send(self, line: bytes) -> None:
        """Hand in a line; that it is gone is told by `answer`."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(line)
            self._in.flush()

    def answer(self, timeout_s: float) -> bytes:
        """Return its next line, or one that says why there is none. One that is silent for too long is killed."""
        if line := _line(self._out, time.monotonic() + timeout_s):
            return line
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)  # its output ends a moment before it does
        if self.process.poll() is not None:
            return write({"error": f"application {self.name} ended (exit {self.process.returncode}); its output is in the log"})
        self.process.kill()
        return write({"error": f"application {self.name} gave no answer within {timeout_s:g} s and was killed"})

    def close(self) -> None:
        """End its orders; it leaves by itself."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()


def go_first(lease_id: str, paths: Mapping[str, Path] | None = None) -> str:
    """Give the lease's own control group the highest CPU weight; return "" or why that could not be done.

    Its quota stays: what it may use at all is the lease's affair. paths: see `cgroups.own_paths`; default: this process's.
    """
    found = cgroups.own_paths() if paths is None else paths
    folder = found.get("cpu") or found.get("unified")
    if folder is None or not lease_id or lease_id not in str(folder):
        return "the lease has no control group of its own"
    name, weight = ("cpu.shares", MAX_SHARES) if "cpu" in found else ("cpu.weight", MAX_WEIGHT)
    try:
        (folder / name).write_text(str(weight))
    except OSError as error:
        return f"{name} of the lease's control group cannot be written: {error.strerror}"
    return ""


def _addresses(line: bytes) -> dict[str, str]:
    try:
        found = json.loads(line)
        return {str(name): str(address) for name, address in found["listening"].items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise JobFailed(f"the server's first line is no JSON object of addresses: {line[:200]!r}") from error


def _line(pipe: IO[bytes], end_s: float) -> bytes:
    """Return the next line; nothing at the end of the pipe, or when none comes in time."""
    held = b""
    while not held.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, end_s - time.monotonic()))
        part = os.read(pipe.fileno(), 1 << 16) if ready else b""
        held += part
        if not part or len(held) > MAX_LINE_BYTES:
            return b""
    return held


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
