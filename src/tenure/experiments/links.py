"""A declared link between this network namespace and another one: rate, delay and loss, by what the kernel has.

    nothing declared               veth
    netem in the kernel            veth, netem at both ends                  (rate, delay, loss)
    only a rate                    veth, TBF at both ends
    delay or loss, no netem        TUN ═ forwarder process ═ TUN, TBF at both ends for the rate

    with links.joined(parse_link("rate=1Gbit,delay=20ms")) as link:
        before = link.carried()
        ...                                   # a server on link.near, an application in link.namespace
        reasons = link.judge(before)          # empty, or why what was measured meanwhile is INVALID
        cost = link.usage()                   # of the forwarder; None where the kernel does it all

The forwarder is a party of its own: its CPU is measured, and when it falls behind, what is slow is it and not the link. Not
here: what follows from a link (`decide.links`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tenure.decide.links import WINDOW_SHARE, Connections, burst_bytes
from tenure.errors import SpecError, Unavailable
from tenure.experiments import netns
from tenure.links import DeclaredLink
from tenure.usage import Usage

START_S, ANSWER_S, END_S = 10.0, 5.0, 5.0
"""Bounds of waiting for the forwarder: until it has its devices, for what it has counted, until it has ended."""
QUEUE_S, LEAST_QUEUE_BYTES = 0.1, 1 << 20
"""What may wait for its turn at a declared rate before packets are dropped, as in a network card's own queue."""
HELD_BYTES = 256 << 20
"""What may be under way in a forwarder, each direction."""
RING_PACKETS = 4096
"""Between the kernel and the forwarder, each direction."""
MAX_BUSY = 0.85
"""Cores of a forwarder, which has one thread; above it, it counts as saturated."""
MAX_LATE, LEAST_LATE_S = 0.05, 0.0005
"""Mean lateness of packets that is let pass: a share of the delay, or this much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """What a forwarder has done since it was started, both directions together."""

    at_s: float
    """Monotonic."""
    packets: int
    """As the kernel hands them over: up to 64 KB of one TCP stream each."""
    bytes: int
    """Headers of IP and TCP included, once for each of these packets."""
    lost: int
    """Packets of the MTU that the declared loss took."""
    overflowed: int
    """Packets dropped undeclared: more than it may hold, or the kernel had no room."""
    left: int
    late_s: float
    """Sum over packets of how long after its delay each left."""
    latest_s: float
    cpu_s: float
    memory_bytes: int
    peak_memory_bytes: int


class Joined:
    """A namespace and the link to it."""

    def __init__(self, link: netns.Link, declared: DeclaredLink, how: str, forwarder: _Forwarder | None) -> None:
        self.namespace, self.near, self.far = link.namespace, link.near, link.far
        """As `netns.Link`: for `Command.network`; where the server listens; the application's own address."""
        self.declared, self.how = declared, how
        """how: veth, netem, tbf or forwarder."""
        self.priority = forwarder.priority if forwarder else ""
        """What the forwarder was granted: real-time, or none: then it is late when others have the CPU; empty without one."""
        self._link, self._forwarder = link, forwarder

    def usage(self) -> Usage | None:
        """Return what the forwarder has used so far; None without one. Raises Unavailable when it has died."""
        found = self.carried()
        if found is None:
            return None
        return Usage(
            at_s=time.time(),
            cpu_s=found.cpu_s,
            memory_bytes=found.memory_bytes,
            peak_memory_bytes=found.peak_memory_bytes,
            processes=1,
        )

    def carried(self) -> Carried | None:
        """Return what the forwarder has counted so far; None without one. Raises Unavailable when it has died."""
        if self._forwarder is None:
            return None
        found = self._forwarder.counted()
        return replace(found, overflowed=found.overflowed + self._ring_drops())

    def judge(self, before: Carried | None) -> tuple[str, ...]:
        """Return why what was measured since `before` is INVALID, in words; empty: the link was as declared."""
        after = self.carried()
        return judged(before, after, self.declared.delay_s) if before and after else ()

    def _ring_drops(self) -> int:
        """Packets for which the forwarder came too late: the kernel had no more room for them."""
        places = ((), self._link.near_device), (("-n", self.namespace), self._link.far_device)
        found = [json.loads(netns.run_ip(*where, "-s", "-j", "link", "show", "dev", device)) for where, device in places]
        return sum(int(device[0]["stats64"]["tx"]["dropped"]) for device in found)


def judged(before: Carried, after: Carried, delay_s: float) -> tuple[str, ...]:
    """Return why a forwarder did not carry as declared between two of its counts; empty when it did."""
    span_s, left = after.at_s - before.at_s, after.left - before.left
    busy = (after.cpu_s - before.cpu_s) / span_s if span_s > 0 else 0.0
    late_s = (after.late_s - before.late_s) / left if left else 0.0
    overflowed, let_pass_s = after.overflowed - before.overflowed, max(LEAST_LATE_S, MAX_LATE * delay_s)
    reasons = []
    if busy > MAX_BUSY:
        reasons.append(f"the link's forwarder used {busy:.2f} cores; above {MAX_BUSY:g} of its one it is the bottleneck itself")
    if overflowed:
        reasons.append(f"the link's forwarder dropped {overflowed} packets that the declared loss did not ask for")
    if late_s > let_pass_s:
        reasons.append(
            f"packets left the link's forwarder {late_s * 1e3:.2f} ms after their delay on average; up to "
            f"{let_pass_s * 1e3:.2f} ms are let pass. Something else took the CPU"
        )
    return tuple(reasons)


@contextlib.contextmanager
def joined(declared: DeclaredLink | None = None, *, index: int = 0, forwarder: bool = False) -> Iterator[Joined]:
    """Make a namespace and the link to it, and remove both at the end, whatever happened inside.

    index: tells several of one process apart. forwarder: insist on the forwarder, also where nothing is declared: so that
    a local measurement has its cost too. Raises Unavailable where the kernel or a right is missing; see `netns.available`.
    """
    declared = declared or DeclaredLink()
    how = way(declared, netem=not forwarder and declared.shapes and has_netem(), forwarder=forwarder)
    carrier: _Forwarder | None = None
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(netns.bare(index))
        if how == "forwarder":
            carrier = stack.enter_context(_forwarder(link, declared))
        else:
            stack.enter_context(netns.cable(link, mtu=declared.packet_bytes if declared.shapes or declared.mtu else 1500))
        for where, device in (((), link.near_device), (("-n", link.namespace), link.far_device)):
            for discipline in disciplines(declared, how):
                netns.run_ip(*where, "qdisc", "add", "dev", device, "root", *discipline, program="tc")
            if declared.loss and how == "netem":  # it loses what it is handed: that shall be a packet, not 64 KB of a stream
                netns.run_ip(*where, "link", "set", device, "gso_max_segs", "1")
        yield Joined(link, declared, how, carrier)


def way(declared: DeclaredLink, *, netem: bool, forwarder: bool = False) -> str:
    """Return by what a link is made: veth, netem, tbf or forwarder."""
    if forwarder:
        return "forwarder"
    if not declared.shapes:
        return "veth"
    if netem:
        return "netem"
    return "forwarder" if declared.delay_s or declared.loss else "tbf"


def disciplines(declared: DeclaredLink, how: str) -> list[tuple[str, ...]]:
    """Return the queueing disciplines of each end, in tc's words (tc-netem(8), tc-tbf(8))."""
    rate, bytes_s = f"{declared.rate_bit_s:.0f}bit", declared.rate_bit_s / 8
    if how == "netem":
        limit = 20_000
        if bytes_s:
            limit = 1000 + int(2 * bytes_s * (declared.delay_s + QUEUE_S) / declared.packet_bytes)
        words = ["netem", "limit", str(limit), "delay", f"{declared.delay_s * 1e6:.0f}us"]
        words += ["loss", f"{declared.loss * 100:.6f}%"] if declared.loss else []
        return [(*words, "rate", rate) if bytes_s else tuple(words)]
    if how not in ("tbf", "forwarder") or not bytes_s:
        return []
    limit = max(LEAST_QUEUE_BYTES, int(bytes_s * QUEUE_S))
    return [("tbf", "rate", rate, "burst", f"{burst_bytes(declared)}b", "limit", f"{limit}b")]


def tcp(transport: str, in_flight: int) -> Connections:
    """Return what this machine's TCP and our client allow for so many requests in flight, for `decide.links.forecast`."""
    from tenure.serve.http_client.streaming import MAX_CONNECTIONS  # asyncio comes with it
    from tenure.serve.transports.grpc import MAX_CHANNELS  # gRPC's library comes with it

    most = {"http": MAX_CONNECTIONS, "grpc": MAX_CHANNELS}
    if transport not in most:
        raise SpecError(f"over a link go http and grpc; found {transport!r}")
    settings = Path("/proc/sys/net/ipv4")
    return Connections(
        count=min(in_flight, most[transport]),
        congestion=(settings / "tcp_congestion_control").read_text().strip(),
        window_bytes=int(int((settings / "tcp_wmem").read_text().split()[2]) * WINDOW_SHARE),
    )


@functools.cache
def has_netem() -> bool:
    """Return whether this kernel delays and loses packets itself. Makes and removes a namespace to find out, once."""
    try:
        with netns.bare(index=9_999) as link:
            netns.run_ip("-n", link.namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms", program="tc")
    except Unavailable:
        return False
    return True


class _Forwarder:
    """The process, and what is asked of it."""

    def __init__(self, link: netns.Link, declared: DeclaredLink) -> None:
        told = {
            "maker": os.getpid(),
            "near": link.near_device,
            "far": link.far_device,
            "delay_s": declared.delay_s,
            "loss": declared.loss,
            "seed": 0,
            "max_bytes": HELD_BYTES,
        }
        pipe = subprocess.PIPE
        argv = (sys.executable, "-m", netns.FORWARDER, json.dumps(told))
        self._process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)
        self._asking = threading.Lock()
        self.priority = "none"

    def wait_ready(self) -> None:
        """Block until it has its devices. Raises Unavailable."""
        self.priority = str(self._answer(START_S)["priority"])

    def counted(self) -> Carried:
        """Return what it has counted. Raises Unavailable."""
        with self._asking:
            try:
                os.write(_fileno(self._process.stdin), b"\n")
            except OSError as error:
                raise self._gone() from error
            return Carried(**self._answer(ANSWER_S))

    def end(self) -> None:
        """End it, and its devices with it."""
        streams = [self._process.stdin, self._process.stdout, self._process.stderr]
        _close(streams.pop(0))
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in streams:
            _close(stream)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        out = _fileno(self._process.stdout)
        text, ends_at_s = b"", time.monotonic() + timeout_s
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([out], [], [], max(0.0, ends_at_s - time.monotonic()))
            if not ready:
                raise Unavailable(f"the link's forwarder said nothing for {timeout_s:g} s")
            more = os.read(out, 1 << 16)
            if not more:
                raise self._gone()
            text += more
        found: dict[str, Any] = json.loads(text)
        return found

    def _gone(self) -> Unavailable:
        self._process.kill()
        said = os.read(_fileno(self._process.stderr), 1 << 16).decode(errors="replace").strip().splitlines()
        return Unavailable(f"the link's forwarder has ended: {said[-1] if said else 'no reason was given'}")


def _fileno(stream: IO[bytes] | None) -> int:
    assert stream is not None
    return stream.fileno()


def _close(stream: IO[bytes] | None) -> None:
    assert stream is not None
    with contextlib.suppress(OSError):
        stream.close()


@contextlib.contextmanager
def _forwarder(link: netns.Link, declared: DeclaredLink) -> Iterator[_Forwarder]:
    """Start a forwarder, put one of its devices into the namespace, and end it."""
    carrier = _Forwarder(link, declared)
    try:
        carrier.wait_ready()
        netns.run_ip("link", "set", link.far_device, "netns", link.namespace)
        for where, device in (((), link.near_device), (("-n", link.namespace), link.far_device)):
            size = ("mtu", str(declared.packet_bytes), "txqueuelen", str(RING_PACKETS))
            netns.run_ip(*where, "link", "set", device, *size)
        netns.raise_devices(link)
        yield carrier
    finally:
        carrier.end()
