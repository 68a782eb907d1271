"""A network of its own for every tenant, out of which the machine's services cannot be reached.

The engine keeps its networks apart from each other; that a container may talk to the machine it runs on is left open by
engines, and closed here with two rules of the machine's packet filter (iptables(8)): nothing that begins in a tenant's network
gets to this machine, or to the address at which clouds keep a machine's credentials.
Not for: what a container may reach outside, which is everything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import shutil
import subprocess
import threading
import time

from tenure.errors import Unavailable
from tenure.runtimes.container_engine import Engine, EngineError

BRIDGE_PREFIX = "tn-"
"""Of the names of our networks' bridges, by which the rules know them."""
LABEL = "tenure.state"
METADATA = "169.254.0.0/16"
_RULES = (
    ("INPUT", "-i", f"{BRIDGE_PREFIX}+", "-m", "conntrack", "!", "--ctstate", "ESTABLISHED,RELATED", "-j", "DROP"),
    ("FORWARD", "-i", f"{BRIDGE_PREFIX}+", "-d", METADATA, "-j", "DROP"),
)
_TABLES = ("iptables", "ip6tables")
OURS = ipaddress.IPv4Network("10.213.0.0/16")
"""Where networks lie that the engine has no addresses left for: it has some thirty."""
_SUBNETS = tuple(OURS.subnets(new_prefix=26))
_TRIED = 64
"""Of them, before it is given up."""
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
_ANSWER_S = 15.0
_LOOK_EVERY_S = 10.0


class TenantNetworks:
    """The networks of one node's tenants. `owner` tells them from those of another node or home."""

    def __init__(self, engine: Engine, owner: str) -> None:
        self._engine, self._owner = engine, owner
        self._lock = threading.Lock()
        self._next_look_s = 0.0

    def name_of(self, tenant: str) -> str:
        """Return the name of a tenant's network."""
        return f"tenure-{self._owner}-{tenant}"

    def ensure(self, tenant: str) -> str:
        """Return the name of the tenant's network, after making it where it is missing, and the rules with it.

        Raises Unavailable when the engine does not make it.
        """
        name = self.name_of(tenant)
        with self._lock:
            if time.monotonic() >= self._next_look_s:  # whoever loads rules of their own may have thrown ours out
                close_machine()
                self._next_look_s = time.monotonic() + _LOOK_EVERY_S
            try:
                self._engine.call("GET", f"/networks/{name}")
                return name
            except EngineError as error:
                if error.status != 404:
                    raise Unavailable(f"the engine does not tell of network {name}: {error}") from error
            try:
                self._make(name)
            except EngineError:
                self._drop_unused()  # an engine has addresses for about thirty
                try:
                    self._make(name)
                except EngineError as error:
                    self._make_among_ours(name, error)
        return name

    def _make_among_ours(self, name: str, refused: EngineError) -> None:
        """Make a network of addresses that we choose, where neither this machine nor another network has them.

        refused: what the engine said when it was to choose.
        """
        first = int(hashlib.sha256(name.encode()).hexdigest()[:4], 16) % len(_SUBNETS)
        taken = routed()
        free = [subnet for subnet in (*_SUBNETS[first:], *_SUBNETS[:first]) if not any(map(subnet.overlaps, taken))]
        for subnet in free[:_TRIED]:
            try:
                self._make(name, subnet=str(subnet))
                return
            except EngineError as error:
                refused = error
                if "overlap" not in str(error).lower():
                    break
        raise Unavailable(f"the engine did not make network {name}: {refused}") from refused

    def _make(self, name: str, *, subnet: str = "") -> None:
        bridge = BRIDGE_PREFIX + hashlib.sha256(name.encode()).hexdigest()[:10]
        body = {
            "Name": name,
            "CheckDuplicate": True,
            "Driver": "bridge",
            "Labels": {LABEL: self._owner},
            "Options": {"com.docker.network.bridge.name": bridge},
            **({"IPAM": {"Config": [{"Subnet": subnet}]}} if subnet else {}),
        }
        try:
            self._engine.call("POST", "/networks/create", body)
        except EngineError as error:
            if error.status != 409:
                raise

    def _drop_unused(self) -> None:
        with contextlib.suppress(EngineError):
            for network in self._engine.call("GET", "/networks", filters=f'{{"label":["{LABEL}={self._owner}"]}}') or []:
                with contextlib.suppress(EngineError):  # one with containers is refused
                    self._engine.call("DELETE", f"/networks/{network['Id']}")


def routed(table: str = "/proc/net/route") -> list[ipaddress.IPv4Network]:
    """Return the networks that this machine has routes to, but for the one to everywhere."""
    found = []
    try:
        with open(table) as lines:
            for line in list(lines)[1:]:
                words = line.split()
                address, mask = (int.from_bytes(bytes.fromhex(words[at]), "little") for at in (1, 7))
                if mask:
                    found.append(ipaddress.IPv4Network((address, str(ipaddress.IPv4Address(mask)))))
    except (OSError, ValueError, IndexError):
        return found
    return found


def close_machine() -> bool:
    """See that the rules stand; return whether they do. Only root may write them."""
    if os.geteuid() != 0:
        return False
    return all(_stands(table, rule) for table in _TABLES for rule in _rules_of(table))


def _rules_of(table: str) -> tuple[tuple[str, ...], ...]:
    return _RULES if table == "iptables" else _RULES[:1]


def _stands(table: str, rule: tuple[str, ...]) -> bool:
    program = shutil.which(table, path=_PATH)
    if program is None:
        return False
    return _ran(program, "-C", rule) or _ran(program, "-I", rule)


def _ran(program: str, verb: str, rule: tuple[str, ...]) -> bool:
    try:
        return not subprocess.run(
            [program, "-w", "5", verb, *rule], capture_output=True, timeout=_ANSWER_S, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
