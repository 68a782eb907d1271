"""One network namespace joined to this one by a virtual cable, for the distributed architecture.

    this namespace                         namespace NAME
    [ server ]  198.18.x.1/30  <==veth==>  198.18.x.2/30  [ application ]

Addresses come from 198.18.0.0/15, set aside for such measurements (RFC 2544), so that no real network is hidden.
Needs iproute2 and the right to make namespaces; `available` says in words what is missing. Nothing here delays or
loses packets: it is a real second network stack, not a slow network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tenure.errors import Unavailable

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


def available() -> str:
    """Return "" when a namespace can be made here, or the reason why not. Makes and removes one to find out."""
    if shutil.which("ip") is None:
        return 'the program "ip" (iproute2) is not installed'
    probe = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
    except Unavailable as error:
        return f"no right to make network namespaces ({error})"
    try:
        _ip("-n", probe, "link", "set", "lo", "up")
    except Unavailable as error:
        return f"a network namespace cannot be configured ({error})"
    finally:
        _quietly("netns", "del", probe)
    return ""


@contextlib.contextmanager
def namespace(index: int = 0) -> Iterator[Link]:
    """Make the namespace and its cable, and remove both at the end, whatever happened inside.

    index: tells several namespaces of one process apart. What processes that are dead left behind is removed first.
    Raises Unavailable with iproute2's own words when a step fails.
    """
    remove_stale()
    pid = os.getpid()
    name = f"{_PREFIX}{pid}-{index}"
    link = _free_link(name, start=(pid * 31 + index) % _SUBNETS)
    near_device, far_device = f"tn{pid}-{index}a", f"tn{pid}-{index}b"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", near_device, "type", "veth", "peer", "name", far_device, "netns", name)
        _ip("addr", "add", f"{link.near}/30", "dev", near_device)
        _ip("link", "set", near_device, "up")
        _ip("-n", name, "addr", "add", f"{link.far}/30", "dev", far_device)
        _ip("-n", name, "link", "set", far_device, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield link
    finally:
        _quietly("link", "del", near_device)
        _quietly("netns", "del", name)


def remove_stale(root: Path = Path("/run/netns")) -> tuple[str, ...]:
    """Remove namespaces of ours whose maker no longer lives; return their names. Their cables go with them."""
    removed = []
    for path in sorted(root.glob(f"{_PREFIX}*")):
        maker = path.name.removeprefix(_PREFIX).split("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            _quietly("netns", "del", path.name)
            removed.append(path.name)
    return tuple(removed)


def _free_link(name: str, *, start: int) -> Link:
    """Return the first /30 network from `start` on that no device here uses."""
    taken = _run("-4", "-o", "addr", "show").stdout
    for offset in range(_SUBNETS):
        base = (198 << 24) + (18 << 16) + ((start + offset) % _SUBNETS) * 4
        near, far = _dotted(base + 1), _dotted(base + 2)
        if f" {near}/" not in taken:
            return Link(namespace=name, near=near, far=far)
    raise Unavailable("every /30 network of 198.18.0.0/15 is in use on this machine; remove some with: ip addr")


def _dotted(address: int) -> str:
    return ".".join(str(address >> shift & 255) for shift in (24, 16, 8, 0))


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(("ip", *words), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)


def _ip(*words: str) -> None:
    try:
        done = _run(*words)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"ip {' '.join(words)}: {error}") from error
    if done.returncode:
        raise Unavailable(f"ip {' '.join(words)}: {done.stderr.strip() or f'exit {done.returncode}'}")


def _quietly(*words: str) -> None:
    """Run a removal; what is already gone is no error."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        _run(*words)
