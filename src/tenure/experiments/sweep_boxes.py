"""A server of an experiment in a lease of its own, in a process or in a container: where it answers, and its processes.

    near node ──loopback──► published port ──► [ container: server ]       from the far node: to the container's own address,
                                                                           by a route through the cable's near end

Servers in the same lease as their node are `sweep_nodes`'.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tenure.errors import JobFailed, Unavailable
from tenure.experiments import links, netns
from tenure.experiments.architectures import server_command
from tenure.meter.sample import CgroupSampler
from tenure.protocols import Launched, LaunchRequest
from tenure.resources import Envelope
from tenure.sockets import free_port

if TYPE_CHECKING:
    from tenure.experiments.sweep_nodes import Bench

FIND_S = 10.0
"""Bound of finding the processes of a server that listens."""
REACH_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A server that listens."""

    launched: Launched
    pid: int
    """Of its first process, as this machine numbers it."""
    near: Mapping[str, str]
    """Transport -> address for who is on this machine."""
    far: Mapping[str, str]
    """The same for who is at the other end of the cable; empty without one."""
    start_s: float
    """From asking for its lease until it listened."""
    sampler: CgroupSampler

    def memory_bytes(self) -> float:
        """Return what the bound of its lease counts now: of a container, the memory inside it."""
        found = self.sampler.sample()
        return float(found.memory_bytes) if found else 0.0


@contextlib.contextmanager
def boxed(bench: Bench, runtime: str, envelope: Envelope, joined: links.Joined | None) -> Iterator[Box]:
    """Start the server in a lease of its own and end it. Raises JobFailed, Refused, Unavailable where no container can be."""
    inside, began_s = runtime == "container", time.monotonic()
    ports = {transport: free_port() for transport in ("http", "grpc")}
    near = joined.near if joined and not inside else "127.0.0.1"
    options = replace(bench.options, host="0.0.0.0" if inside else near)
    command = server_command(bench.model, name=bench.name, ports=ports, options=options)
    if inside:
        command = replace(command, runtime="container", mounts={str(bench.model): f"{bench.model}:ro"})
    else:
        command = replace(command, argv=(*command.argv, "--shared-memory=on"))
    launched = bench.launch(LaunchRequest(name=f"server-{runtime}", command=command, envelope=envelope))
    try:
        start_s, pid = time.monotonic() - began_s, _found(ports["http"])
        with contextlib.closing(CgroupSampler.of(pid)) as sampler:
            far = near
            if joined and inside:
                far = _address(pid)
                _reach(joined, far, ports["http"])
            yield Box(
                launched=launched,
                pid=pid,
                near={transport: f"{near}:{port}" for transport, port in ports.items()},
                far={transport: f"{far}:{port}" for transport, port in ports.items()} if joined else {},
                start_s=start_s,
                sampler=sampler,
            )
    finally:
        launched.stop()


def _found(port: int, proc: Path = Path("/proc")) -> int:
    """Return the first process of the server that was told to listen at a port. Raises JobFailed when there is none."""
    end_s = time.monotonic() + FIND_S
    while time.monotonic() < end_s:
        matching = {}
        for entry in proc.glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if f"--http-port={port}".encode() in words and b"tenure.serve" in words:
                    matching[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        if first := [pid for pid, parent in matching.items() if parent not in matching]:
            return first[0]
        time.sleep(0.05)
    raise JobFailed(f"the server at port {port} listens, but its processes cannot be found on this machine")


def _address(pid: int, proc: Path = Path("/proc")) -> str:
    """Return the address of the network that a process is in, of another than this machine's. Raises Unavailable."""
    last = ""
    for line in (proc / str(pid) / "net/fib_trie").read_text().splitlines():
        if "|--" in line:
            last = line.split()[-1]
        elif "/32 host LOCAL" in line and not last.startswith("127."):
            return last
    raise Unavailable("the container has no address in a network of its own, so that the far node cannot reach it")


def _reach(joined: links.Joined, address: str, port: int) -> None:
    """Lead the far node's packets to a container through the cable, and see that they get there. Raises Unavailable."""
    netns.run_ip("-n", joined.namespace, "route", "replace", f"{address}/32", "via", joined.near)
    told = f"import socket; socket.create_connection(({address!r}, {port}), {REACH_S}).close()"
    try:
        netns.run_ip("netns", "exec", joined.namespace, sys.executable, "-c", told)
    except Unavailable as error:
        raise Unavailable(
            f"the far node cannot reach the container at {address}:{port}: this machine's packet filter or engine lets nothing "
            f"through. Leave distributed or container out (architectures, runtimes): {error}"
        ) from error
