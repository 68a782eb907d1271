"""One node of an experiment: its lease, its applications, and the two FIFOs by which it is told what to run.

Not here: which nodes there are and which cells they run (`sweep_nodes`), what is said to one (`serve.load.orders`).
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tenure.errors import CorruptData, JobFailed
from tenure.jobs import Command
from tenure.protocols import Launched, LaunchRequest
from tenure.resources import Envelope
from tenure.serve.load.orders import (
    ANSWERS,
    ORDERS,
    READY,
    Cell,
    NodeReady,
    NodeSpec,
    Order,
    StandingSpec,
    node_command,
    read,
    write,
)

if TYPE_CHECKING:
    from tenure.experiments.sweep_nodes import Bench

START_S, START_PER_APPLICATION_S = 60.0, 10.0
"""Bound of starting a node."""
NODE_S = 10.0
"""Bound of what a node adds to the bound of its application."""
GRACE_S = 15.0
"""A server answers what it accepted, then its node leaves."""


class StandingNode:
    """One node whose applications are ready, by its lease and its two FIFOs."""

    def __init__(self, launched: Launched, ready: NodeReady) -> None:
        self.launched, self.ready = launched, ready
        self.applications = {each.name: each for each in ready.applications}
        self._orders = os.open(launched.worker_dir / ORDERS, os.O_WRONLY | os.O_NONBLOCK)
        self._answers = os.open(launched.worker_dir / ANSWERS, os.O_RDONLY | os.O_NONBLOCK)
        self._held = b""

    def ask(self, order: Order, what: str) -> Cell:
        """Hand in an order and return its answer. Raises JobFailed when there is none."""
        with contextlib.suppress(BrokenPipeError):  # that nobody reads is told below
            os.write(self._orders, write(order))  # shorter than a pipe takes at once
        end_s = time.monotonic() + order.bound_s + NODE_S
        while b"\n" not in self._held:
            ready, _, _ = select.select([self._answers], [], [], 1.0)
            part = os.read(self._answers, 1 << 20) if ready else b""
            self._held += part
            if part:
                continue
            if (ended := self.launched.wait(0.2 if ready else 0.0)) is not None:  # nothing to read: nobody writes any more
                raise JobFailed(f"{what}: the node ended {ended.kind}: {ended.witness}\n{ended.log_tail}".rstrip())
            if time.monotonic() > end_s:
                raise JobFailed(f"{what}: no answer within {order.bound_s + NODE_S:g} s")
        line, _, self._held = self._held.partition(b"\n")
        try:
            return read(line, Cell)
        except CorruptData as error:
            raise JobFailed(f"{what}: {error}") from error

    def close(self) -> None:
        """Let go of the FIFOs."""
        os.close(self._orders)
        os.close(self._answers)


@contextlib.contextmanager
def standing_node(
    bench: Bench,
    name: str,
    envelope: Envelope,
    applications: Sequence[StandingSpec],
    *,
    server: tuple[str, ...] = (),
    network: str = "host",
) -> Iterator[StandingNode]:
    """Launch one node and wait until it is ready; end it at the end."""
    start_s = START_S + START_PER_APPLICATION_S * len(applications)
    spec = NodeSpec(server=server, applications=tuple(applications), undisturbed=bench.undisturbed, start_s=start_s)
    bench.workdir.mkdir(parents=True, exist_ok=True)
    path = bench.workdir / f"{name}-node.json"
    path.write_bytes(write(spec))
    command = Command(argv=node_command(path.resolve()), network=network, grace_s=GRACE_S)
    launched = bench.launch(LaunchRequest(name=f"{name}-node", command=command, envelope=envelope))
    try:
        node = StandingNode(launched, _ready(launched, start_s + NODE_S))
        try:
            yield node
        finally:
            node.close()
    finally:
        launched.stop(GRACE_S)


def _ready(launched: Launched, timeout_s: float) -> NodeReady:
    """Wait until a node says that it is ready. Raises JobFailed, with what it says."""
    end_s = time.monotonic() + timeout_s
    path = launched.worker_dir / READY
    while not path.exists():
        ended = launched.wait(0.05)
        if path.exists():
            break
        if ended is not None:
            raise JobFailed(f"a node of the experiment ended {ended.kind}: {ended.witness}\n{ended.log_tail}".rstrip())
        if time.monotonic() > end_s:
            raise JobFailed(f"a node of the experiment was not ready within {timeout_s:g} s")
    try:
        return read(path.read_bytes(), NodeReady)
    except CorruptData as error:
        raise JobFailed(f"a node of the experiment cannot be used: {error}") from error
