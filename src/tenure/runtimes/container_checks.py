"""Whether a container can honour a start spec, and which of this machine's folders one may see. Nothing is started here."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterable, Mapping

from tenure.errors import SpecError, Unsupported
from tenure.protocols import StartSpec
from tenure.tenants import check_name

_SEALED = (
    *("/proc", "/sys", "/dev", "/run", "/var/run", "/boot", "/etc", "/root/.ssh"),
    *(f"/var/lib/{engine}" for engine in ("docker", "containerd", "containers", "kubelet")),
)
"""Folders of this machine of which no container sees anything: engines' sockets and data, devices, accounts, other leases."""
_REMEDY = "Mount a folder with your own data."
_LEAST_MEMORY_BYTES = 6 << 20
"""Docker's own least; below it a container cannot be started."""


def check_container_spec(spec: StartSpec, boot_id: str, *, sealed: Iterable[str] = ()) -> None:
    """Raise Unsupported for what a container of Tenure cannot honour, SpecError for what is wrong.

    sealed: further folders of which no container may see anything.
    """
    if spec.boot_id != boot_id:
        raise SpecError(
            f"lease {spec.lease_id}: its deadline counts from boot {spec.boot_id!r}, but this machine's boot is "
            f"{boot_id!r}; ask the node for its boot time and send the deadline again"
        )
    if spec.capabilities:
        raise Unsupported("capabilities", "containers run without any, and not as root", "Leave it empty.")
    tenant_of(spec)
    user_of(spec)
    if spec.envelope.memory_bytes < _LEAST_MEMORY_BYTES:
        raise Unsupported(
            "envelope.memory_bytes",
            f"a container needs at least {_LEAST_MEMORY_BYTES} bytes; found {spec.envelope.memory_bytes}",
            "Ask for more.",
        )
    for field in ("workdir", "worker_dir", "log_path"):
        if not os.path.isabs(getattr(spec, field)):
            raise SpecError(f"lease {spec.lease_id}: {field} must be absolute; found {getattr(spec, field)!r}")
    if spec.workdir != spec.worker_dir:
        check_source(spec.workdir, sealed=sealed)
    for source, inside in spec.mounts.items():
        check_source(source, sealed=sealed)
        check_target(inside.removesuffix(":ro"))
        if not os.path.exists(source):
            raise SpecError(f"mount {source!r} does not exist on this machine")


def tenant_of(spec: StartSpec) -> str:
    """Return whose network a container is in; empty: in none. Raises Unsupported."""
    if spec.network == "none":
        return ""
    kind, _, name = spec.network.partition(":")
    if kind != "tenant" or not name:
        raise Unsupported(
            "network",
            f"a container is in its tenant's network or in none; found {spec.network!r}",
            "Say tenant:NAME or none, or use the process runtime for this machine's own network.",
        )
    return check_name("tenant", name)


def user_of(spec: StartSpec) -> tuple[int, int] | None:
    """Return the user and group that a spec names; None when it names nobody. Raises Unsupported, SpecError."""
    if not spec.user:
        return None
    try:
        entry = pwd.getpwnam(spec.user)
    except KeyError as error:
        raise SpecError(f"lease {spec.lease_id}: no user {spec.user!r} on this machine") from error
    if entry.pw_uid == 0:
        raise Unsupported("user", "nobody is root in a container", "Name another user, or leave it empty.")
    if os.geteuid() not in (0, entry.pw_uid):
        raise Unsupported("user", f"only root can run a job as {spec.user!r}", "Run the agent as root, or leave it empty.")
    return entry.pw_uid, entry.pw_gid


def check_source(path: str, *, sealed: Iterable[str] = ()) -> None:
    """Refuse a path of this machine of which no container may see anything, links followed. Raises Unsupported, SpecError."""
    if not os.path.isabs(path) or "\0" in path or ":" in path:
        raise SpecError(f"a mount must be an absolute path without ':'; found {path!r}")
    real = os.path.realpath(path)
    for folder in (*_SEALED, *sealed):
        closed = os.path.realpath(folder)
        if real == closed or real.startswith(f"{closed}/") or closed.startswith(f"{real.rstrip('/')}/"):
            raise Unsupported("mounts", f"{path} would show a container what lies in {folder}", _REMEDY)
    try:
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SpecError(f"mount {path!r} cannot be looked at: {error}") from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise Unsupported("mounts", f"{path} is neither a folder nor a file", _REMEDY)


def check_target(path: str) -> None:
    """Refuse a place inside that is the container's own. Raises SpecError."""
    plain = os.path.normpath(path)
    own = ("/", "/proc", "/sys", "/dev", "/etc", "/usr", "/bin", "/lib", "/lib64", "/sbin", "/tmp", "/run")
    if not os.path.isabs(path) or ":" in path or plain in own or plain.startswith(("/proc/", "/sys/", "/dev/")):
        raise SpecError(f"a mount's place inside must be an absolute path of its own, such as /data; found {path!r}")


def mounts_of(spec: StartSpec, extra: Mapping[str, str]) -> list[dict[str, object]]:
    """Return all mounts as the engine wants them: the folders of the attempt, those asked for, then `extra`."""
    wanted = {spec.worker_dir: spec.worker_dir, spec.workdir: spec.workdir, **spec.mounts}
    inside = {place.removesuffix(":ro") for place in wanted.values()}
    wanted |= {source: place for source, place in extra.items() if place.removesuffix(":ro") not in inside}
    return [
        {
            "Type": "bind",
            "Source": os.path.realpath(source),
            "Target": place.removesuffix(":ro"),
            "ReadOnly": place.endswith(":ro"),
            "BindOptions": {"Propagation": "rprivate"},
        }
        for source, place in wanted.items()
    ]
