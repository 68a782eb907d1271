"""One network namespace joined to this one by a virtual cable, for the distributed architecture.

    this namespace                         namespace NAME
    [ server ]  198.18.x.1/30  <==veth==>  198.18.x.2/30  [ application ]

Addresses come from 198.18.0.0/15, set aside for such measurements (RFC 2544), so that no real network is hidden.
Needs iproute2 and the right to make namespaces; `available` says in words what is missing. Nothing here delays or
loses packets: it is a real second network stack, not a slow network. That is `links`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import Unavailable

FORWARDER = "tenure.experiments.tun_forwarder"
"""The module whose processes carry a declared link's packets, and die with their maker; stopped ones are found by it."""
_PREFIX = "tenure-"
_TIMEOUT_S = 10.0
_SUBNETS = 1 << 15
"""Number of /30 networks in 198.18.0.0/15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Both ends of the cable."""

    namespace: str
    """For `Command.network`: ``netns:<namespace>``."""
    near: str
    """IPv4 address in this namespace: the server listens here."""
    far: str
    """IPv4 address inside the namespace."""
    near_device: str
    far_device: str


def available() -> str:
    """Return "" when a namespace can be made here, or the reason why not. Makes and removes one to find out."""
    if shutil.which("ip") is None:
        return 'the program "ip" (iproute2) is not installed'
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        run_ip("netns", "add", probe)
    except Unavailable as error:
        return f"no right to make network namespaces ({error})"
    try:
        run_ip("-n", probe, "link", "set", "lo", "up")
    except Unavailable as error:
        return f"a network namespace cannot be configured ({error})"
    finally:
        try_ip("netns", "del", probe)
    return ""


@contextlib.contextmanager
def namespace(index: int = 0) -> Iterator[Link]:
    """Make the namespace and its cable, and remove both at the end, whatever happened inside.

    index: tells several namespaces of one process apart. What processes that are dead left behind is removed first.
    Raises Unavailable with iproute2's own words when a step fails.
    """
    with bare(index) as link, cable(link):
        yield link


@contextlib.contextmanager
def bare(index: int = 0) -> Iterator[Link]:
    """Make the namespace alone, with addresses that are free but no device's yet; see `namespace`."""
    remove_stale()
    pid = os.getpid()
    name = f"{_PREFIX}{pid}-{index}"
    link = _free_link(name, f"tn{pid}-{index}", start=(pid * 31 + index) % _SUBNETS)
    try:
        run_ip("netns", "add", name)
        run_ip("-n", name, "link", "set", "lo", "up")
        yield link
    finally:
        try_ip("netns", "del", name)


@contextlib.contextmanager
def cable(link: Link, *, mtu: int = 1500) -> Iterator[None]:
    """Join a bare namespace to this one by a pair of virtual Ethernet devices."""
    near, far = link.near_device, link.far_device
    try:
        size = ("mtu", str(mtu))
        run_ip("link", "add", near, *size, "type", "veth", "peer", "name", far, *size, "netns", link.namespace)
        raise_devices(link)
        yield
    finally:
        try_ip("link", "del", near)


def raise_devices(link: Link) -> None:
    """Give both devices, which exist, their addresses and set them up."""
    for where, device, address in (((), link.near_device, link.near), (("-n", link.namespace), link.far_device, link.far)):
        run_ip(*where, "addr", "add", f"{address}/30", "dev", device)
        run_ip(*where, "link", "set", device, "up")


def remove_stale(root: Path = Path("/run/netns"), processes: Path = Path("/proc")) -> tuple[str, ...]:
    """Remove namespaces and end forwarders of ours whose maker no longer lives; return their names.

    Their devices go with them. A forwarder ends by itself when its maker does, unless it is stopped.
    """
    removed = []
    for path in sorted(root.glob(f"{_PREFIX}*")):
        maker = path.name.removeprefix(_PREFIX).split("-")[0]
        if maker.isdigit() and not (processes / maker).exists():
            try_ip("netns", "del", path.name)
            removed.append(path.name)
    for path in processes.glob("[0-9]*"):
        maker = maker_of(path)
        if maker and not (processes / maker).exists():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(path.name), signal.SIGKILL)
                removed.append(f"forwarder {path.name}")
    return tuple(removed)


def maker_of(process: Path) -> str:
    """Return the process that made this forwarder, or "" when it is none."""
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
        return str(json.loads(words[words.index(FORWARDER.encode()) + 1])["maker"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return ""


def _free_link(name: str, device: str, *, start: int) -> Link:
    """Return the first /30 network from `start` on that no device here uses."""
    taken = _run("ip", "-4", "-o", "addr", "show").stdout
    for offset in range(_SUBNETS):
        base = (198 << 24) + (18 << 16) + ((start + offset) % _SUBNETS) * 4
        near, far = _dotted(base + 1), _dotted(base + 2)
        if f" {near}/" not in taken:
            return Link(namespace=name, near=near, far=far, near_device=f"{device}a", far_device=f"{device}b")
    raise Unavailable("every /30 network of 198.18.0.0/15 is in use on this machine; remove some with: ip addr")


def _dotted(address: int) -> str:
    return ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))


def run_ip(*words: str, program: str = "ip") -> str:
    """Run `ip`, or iproute2's `tc`, and return what it printed. Raises Unavailable with its own words."""
    try:
        done = _run(program, *words)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{program} {' '.join(words)}: {error}") from error
    if done.returncode:
        raise Unavailable(f"{program} {' '.join(words)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout


def try_ip(*words: str) -> None:
    """Run a removal; what is already gone is no error."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        _run("ip", *words)


def _run(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((program, *words), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
