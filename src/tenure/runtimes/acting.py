"""Touching files with another user's rights, in the calling thread alone.

For: what root does below folders that a job may write (its log, `lease.json`, its results). With the job's own rights a link,
a renamed folder or a hard link that the job has put there leads only where the job itself could go. The rights that count for
files are fsuid, fsgid and the thread's supplementary groups (setfsuid(2), credentials(7)); signals, /proc and control groups
stay root's. What blocks (a FIFO where a file is expected) is the caller's to avoid: `open_regular`.
Not for: becoming a user for good (`become`). Standard library only: shims use it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import pwd
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_SETGROUPS = {"x86_64": 116, "aarch64": 159, "riscv64": 159, "ppc64le": 81, "s390x": 206}
"""setgroups(2) by its number: the C library's own function would change every thread of the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Whose rights."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def to_plan(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def actor_of(user: str) -> Actor | None:
    """Return a user of this machine when we are root and it is not: None where nobody else's rights can or need be taken.

    Raises KeyError for a user that does not exist.
    """
    if not user or os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(user)
    if entry.pw_uid == 0:
        return None
    return Actor(uid=entry.pw_uid, gid=entry.pw_gid, groups=tuple(os.getgrouplist(user, entry.pw_gid)))


def actor_from(plan: Mapping[str, Any] | None) -> Actor | None:
    """Return the actor that `to_plan` described, None for None."""
    if plan is None:
        return None
    return Actor(uid=int(plan["uid"]), gid=int(plan["gid"]), groups=tuple(int(group) for group in plan["groups"]))


def owner_of(path: str | os.PathLike[str]) -> Actor | None:
    """Return the owner of a folder that lies in one of ours; None when it is ours, or gone."""
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return None if info.st_uid == os.geteuid() or os.geteuid() != 0 else Actor(uid=info.st_uid, gid=info.st_gid)


@contextlib.contextmanager
def acting_as(actor: Actor | None) -> Iterator[None]:
    """Have the calling thread touch files with an actor's rights within; nothing changes for None.

    Nothing may be awaited within: another task of the thread would have these rights too. Raises OSError when the kernel
    refuses, with the thread as it was.
    """
    if actor is None:
        yield
        return
    groups = os.getgroups()
    try:
        _set_groups(actor.groups)
        _set("setfsgid", actor.gid)
        _set("setfsuid", actor.uid)  # last: with it go the rights to do the others
        yield
    finally:
        _set("setfsuid", os.geteuid())
        _set("setfsgid", os.getegid())
        _set_groups(groups)


def _set(function: str, number: int) -> None:
    call = getattr(_LIBC, function)
    call(number)
    if call(-1) != number:  # it says what holds, and never fails otherwise
        raise PermissionError(f"{function}({number}) was refused")


def _set_groups(groups: tuple[int, ...] | list[int]) -> None:
    number = _SETGROUPS.get(platform.machine())
    if number is None:
        raise PermissionError(f"the rights of other users cannot be taken on a machine of the kind {platform.machine()}")
    found = (ctypes.c_uint32 * max(1, len(groups)))(*groups)
    if _LIBC.syscall(ctypes.c_long(number), ctypes.c_size_t(len(groups)), found) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setgroups: {os.strerror(error)}")


def open_regular(path: str | os.PathLike[str], flags: int, mode: int = 0o600) -> int:
    """Return a descriptor of a regular file: never one that follows a last link or waits for a FIFO's other end.

    Raises OSError, also for what is no regular file.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{os.fspath(path)} is no regular file")
    os.set_blocking(descriptor, True)
    return descriptor
