"""Whether a plain process can honour a start spec. Nothing is started or changed here."""

from __future__ import annotations

import os
import pwd

from tenure.errors import SpecError, Unsupported
from tenure.protocols import StartSpec


def check_spec(spec: StartSpec, boot_id: str) -> None:
    """Raise Unsupported for what a plain process cannot honour, SpecError for what is wrong."""
    remedy = "Use the container runtime."
    in_image = os.path.isabs(spec.image)  # it has a root of its own, only to be read, and places for mounts (`rooted`)
    for field, empty in (("image", ""), ("mounts", {}), ("read_only_root", False), ("capabilities", ())):
        if getattr(spec, field) == empty or (in_image and field != "capabilities"):
            continue
        if field == "image":
            why = f"the process runtime runs the root form of an image of Tenure, given by its folder; found {spec.image!r}"
        else:
            why = "the process runtime runs commands in this machine's own file system and rights"
        raise Unsupported(field, why, remedy)
    if spec.network != "host":
        kind, _, name = spec.network.partition(":")
        if kind != "netns" or not name or "/" in name:
            raise Unsupported("network", f"it must be host or netns:NAME; found {spec.network!r}")
        if os.geteuid() != 0:
            raise Unsupported("network", "entering a network namespace needs root", "Run the agent as root, or use host.")
        if not netns_path(name):
            raise SpecError(f"lease {spec.lease_id}: no network namespace {name!r} in /run/netns; make it first")
    if spec.user:
        try:
            uid = pwd.getpwnam(spec.user).pw_uid
        except KeyError as error:
            raise SpecError(f"lease {spec.lease_id}: no user {spec.user!r} on this machine") from error
        if os.geteuid() not in (0, uid):
            raise Unsupported("user", f"only root can run a job as {spec.user!r}", "Run the agent as root, or leave it empty.")
    if spec.boot_id != boot_id:
        raise SpecError(
            f"lease {spec.lease_id}: its deadline counts from boot {spec.boot_id!r}, but this machine's boot is "
            f"{boot_id!r}; ask the node for its boot time and send the deadline again"
        )
    for field in ("workdir", "worker_dir", "log_path"):
        if not os.path.isabs(getattr(spec, field)):
            raise SpecError(f"lease {spec.lease_id}: {field} must be absolute; found {getattr(spec, field)!r}")


def netns_path(name: str) -> str:
    """Return where a named network namespace lies; empty when there is none."""
    return next((path for base in ("/run/netns", "/var/run/netns") if os.path.exists(path := f"{base}/{name}")), "")
