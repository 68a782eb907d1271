"""Who has reserved which part of this machine: one file for all homes and users, so that no core is promised twice.

An entry belongs to a process (pid + start time + boot) and is void once that process is dead. The file is locked while
it is read and written, readable and writable by everybody, and lies where every user looks (TENURE_SHARES_FILE names
another place, for tests). It serves agents that cooperate: a user who spoils it can make others overcommit the machine or
be refused with a reason, no more. Not for: what a node leases out of its part (`decide`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pwd
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tenure.errors import Refused, Unavailable
from tenure.resources import Capacity, show_bytes
from tenure.runtimes import procfs

_LEAST_MEMORY_BYTES = 64 << 20
_MAX_FILE_BYTES = 1 << 20
_LOCK_MAX_S = 5.0
_JSON_TYPES = {"str": ("str",), "int": ("int",), "float": ("int", "float"), "list[int]": ("list",)}


def shares_path() -> Path:
    """Return where the machine's shares lie."""
    named = os.environ.get("TENURE_SHARES_FILE")
    if named:
        return Path(named)
    return Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp") / "tenure-shares.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One agent's part of the machine."""

    home: str
    node: str
    user: str
    pid: int
    start_ticks: int
    boot_id: str
    cpus: float
    memory_bytes: int
    gpus: list[int] = field(default_factory=list)
    """Indices of the devices that it offers."""


def reserve(
    home: str,
    node: str,
    whole: Capacity,
    *,
    boot_id: str,
    cpus: float | None = None,
    memory_bytes: int | None = None,
    gpus: int | None = None,
    path: Path | None = None,
) -> Capacity:
    """Reserve a part of the machine for this process until it ends, and return it.

    cpus, memory_bytes: what is needed; one alone brings the same share of the other, neither takes what the others have
    left. gpus: so many devices; None: all that nobody offers. Of the disk comes the share that it has of the cores. Raises
    Refused, with who holds the rest, when that is less than needed or next to nothing; SpecError when more is asked than the
    machine has; Unavailable when the file cannot be used.
    """
    if cpus is not None or memory_bytes is not None:
        wanted = whole.with_part(cpus=cpus, memory_bytes=memory_bytes)
        cpus, memory_bytes = wanted.cpus, wanted.memory_bytes
    with _locked(path or shares_path()) as fd:
        others = [share for share in _read(fd) if _is_held(share, boot_id) and share.pid != os.getpid()]
        left_cpus = whole.cpus - sum(share.cpus for share in others)
        left_bytes = whole.memory_bytes - sum(share.memory_bytes for share in others)
        part_cpus = left_cpus if cpus is None else cpus
        part_bytes = left_bytes if memory_bytes is None else memory_bytes
        if (
            min(part_cpus, left_cpus) <= 1e-9
            or part_cpus > left_cpus + 1e-9
            or not _LEAST_MEMORY_BYTES <= part_bytes <= left_bytes
        ):
            raise Refused(_refusal(home, node, cpus, memory_bytes, left_cpus, left_bytes, others))
        left_gpus = [gpu.index for gpu in whole.gpus if not any(gpu.index in share.gpus for share in others)]
        if gpus is not None and gpus > len(left_gpus):
            held = "; ".join(f"node {share.node} of {share.home} offers {len(share.gpus)}" for share in others if share.gpus)
            raise Refused(
                f"node {node} of {home} refused: it needs {gpus} GPUs; this machine has {len(whole.gpus)}, of which nobody "
                f"offers {len(left_gpus)}. {held or 'Ask for fewer'}."
            )
        mine = Share(
            home=home,
            node=node,
            user=_name(os.getuid()),
            pid=os.getpid(),
            start_ticks=procfs.start_ticks(os.getpid()),
            boot_id=boot_id,
            cpus=part_cpus,
            memory_bytes=part_bytes,
            gpus=left_gpus[:gpus],
        )
        _write(fd, [*others, mine])
    return replace(
        whole.with_part(cpus=part_cpus, memory_bytes=part_bytes),
        disk_bytes=int(whole.disk_bytes * part_cpus / whole.cpus),
        gpus=tuple(gpu for gpu in whole.gpus if gpu.index in mine.gpus),
    )


def release(path: Path | None = None) -> None:
    """Give this process's part back."""
    with _locked(path or shares_path()) as fd:
        _write(fd, [share for share in _read(fd) if share.pid != os.getpid()])


def _refusal(
    home: str, node: str, cpus: float | None, memory_bytes: int | None, left_cpus: float, left_bytes: int, others: list[Share]
) -> str:
    asked = " and ".join(
        ([] if cpus is None else [f"{cpus:g} cpus"]) + ([] if memory_bytes is None else [show_bytes(memory_bytes)])
    )
    holders = "; ".join(
        f"node {share.node} of {share.home} (user {share.user}, pid {share.pid}) holds {share.cpus:g} cpus, "
        f"{show_bytes(share.memory_bytes)}"
        for share in others
    )
    return (
        f"node {node} of {home} refused: it needs {asked or 'a part of this machine'}, but {max(0.0, left_cpus):g} cpus and "
        f"{show_bytes(max(0, left_bytes))} are not reserved; {holders or 'nobody holds the rest'}. "
        "Offer less of the machine there or here, or end the other."
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Open and lock the file for one change. Raises Unavailable when another user or program spoilt it or sits on it."""
    fd = -1
    try:
        fd = _open(path)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Unavailable(_spoilt(path, "it is no regular file"))
        _lock(fd, path)
        yield fd
    except OSError as error:
        raise Unavailable(_spoilt(path, error.strerror or str(error))) from error
    finally:
        if fd >= 0:
            os.close(fd)


def _open(path: Path) -> int:
    # Without O_CREAT first: in a sticky folder the kernel refuses O_CREAT on another user's file (fs.protected_regular).
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        with contextlib.suppress(FileExistsError):  # another agent was quicker
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            os.fchmod(fd, 0o666)  # whatever the umask
            return fd
    raise Unavailable(_spoilt(path, "it comes and goes"))


def _lock(fd: int, path: Path) -> None:
    end_s = time.monotonic() + _LOCK_MAX_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise Unavailable(_spoilt(path, f"a program has kept it locked for {_LOCK_MAX_S:g} s")) from None
            time.sleep(0.01)


def _spoilt(path: Path, why: str) -> str:
    owner = ""
    with contextlib.suppress(OSError):
        owner = f" (it belongs to user {_name(os.lstat(path).st_uid)})"
    return (
        f"{path}, where the agents of all users note what they use of this machine, cannot be used: {why}{owner}. Remove it or "
        "have its owner do so; agents make it anew. TENURE_SHARES_FILE names another file, which then knows nothing of others."
    )


def _read(fd: int) -> list[Share]:
    """Return the entries; what is not one (a torn or foreign write) holds nothing."""
    try:
        data: Any = json.loads(os.pread(fd, _MAX_FILE_BYTES, 0) or b"[]")
    except (ValueError, RecursionError):
        return []
    found = []
    for entry in data if isinstance(data, list) else []:
        with contextlib.suppress(TypeError):
            share = Share(**entry)
            if all(type(getattr(share, part.name)).__name__ in _JSON_TYPES[str(part.type)] for part in fields(Share)) and (
                0 < share.cpus < math.inf and share.memory_bytes > 0
            ):
                found.append(share)
    return found


def _write(fd: int, shares: list[Share]) -> None:
    text = json.dumps([asdict(share) for share in shares]).encode()
    os.posix_fallocate(fd, 0, len(text))  # on a full disk this fails, and nobody's entry is lost
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))


def _is_held(share: Share, boot_id: str) -> bool:
    return share.boot_id == boot_id and procfs.is_alive(share.pid, share.start_ticks)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
