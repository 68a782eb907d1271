"""Where control groups are mounted on this machine, and where a process stands in them. Reads only; `runtimes` confines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED_BYTES = 1 << 60
"""A memory limit at or above this means none (v1 writes a page-rounded 2**63 - 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchy:
    """One mounted cgroup hierarchy."""

    version: int
    """1 or 2."""
    controllers: tuple[str, ...]
    """Controllers it drives, e.g. ``("cpu", "cpuacct")``; a v1 hierarchy made only for naming has none."""
    mount: Path
    root: str
    """The part of the hierarchy that is mounted, ``/`` outside containers."""


def hierarchies(proc: Path = Path("/proc")) -> list[Hierarchy]:
    """Return the cgroup hierarchies that this process sees mounted; none where cgroups are missing or hidden."""
    found = []
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 5 or len(rest) < 3 or rest[0] not in ("cgroup", "cgroup2"):
            continue
        mount = Path(fields[4].replace("\\040", " "))
        if rest[0] == "cgroup2":
            names: tuple[str, ...] = tuple(_text(mount / "cgroup.controllers").split())
            found.append(Hierarchy(version=2, controllers=names, mount=mount, root=fields[3]))
        else:
            known = _v1_controllers(proc)
            names = tuple(option for option in rest[2].split(",") if option in known)
            found.append(Hierarchy(version=1, controllers=names, mount=mount, root=fields[3]))
    return found


def own_paths(pid: int | str = "self", proc: Path = Path("/proc")) -> dict[str, Path]:
    """Return controller -> directory of the group that a process is in. The v2 hierarchy has the key ``unified``.

    Controllers whose hierarchy is not mounted here are left out; empty when the process is gone.
    """
    paths: dict[str, Path] = {}
    mounted = hierarchies(proc)
    for line in _lines(proc / str(pid) / "cgroup"):
        _, names, inside = line.split(":", 2)
        for hierarchy in mounted:
            if hierarchy.version == 2 and not names:
                paths["unified"] = _directory(hierarchy, inside)
            elif hierarchy.version == 1 and names:
                for name in set(names.split(",")) & set(hierarchy.controllers):
                    paths[name] = _directory(hierarchy, inside)
    return paths


def cpu_quota(proc: Path = Path("/proc")) -> float | None:
    """Return the CPU quota of this process in cores, the tightest of its group and all above; None without one."""
    paths, quotas = own_paths(proc=proc), []
    for directory in _upwards(paths.get("cpu")):
        quota, period = _text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    for directory in _upwards(paths.get("unified")):
        fields = _text(directory / "cpu.max").split()
        if len(fields) == 2 and fields[0].isdigit() and int(fields[1]):
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def memory_limit_bytes(proc: Path = Path("/proc")) -> int | None:
    """Return the memory limit of this process in bytes, the tightest of its group and all above; None without one."""
    paths, limits = own_paths(proc=proc), []
    for key, name in (("memory", "memory.limit_in_bytes"), ("unified", "memory.max")):
        for directory in _upwards(paths.get(key)):
            text = _text(directory / name)
            if text.isdigit() and int(text) < UNLIMITED_BYTES:
                limits.append(int(text))
    return min(limits, default=None)


def _directory(hierarchy: Hierarchy, inside: str) -> Path:
    """Return the visible directory of a group; the mount itself when the group lies outside of what is mounted."""
    path, root = PurePosixPath(inside), PurePosixPath(hierarchy.root)
    if root != PurePosixPath("/") and path.is_relative_to(root):
        path = PurePosixPath("/") / path.relative_to(root)
    directory = hierarchy.mount / str(path).lstrip("/")
    return directory if directory.is_dir() else hierarchy.mount


def _upwards(directory: Path | None) -> Iterator[Path]:
    """Yield a group's directory and those above it that still are groups."""
    while directory is not None and (directory / "cgroup.procs").exists():
        yield directory
        directory = directory.parent


def _v1_controllers(proc: Path) -> set[str]:
    return {line.split()[0] for line in _lines(proc / "cgroups") if not line.startswith("#")}


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()
