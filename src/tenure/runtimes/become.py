"""What a process does to itself before it becomes a lease's command: limits, network, user, whose death it shares.

Standard library and nouns only: it runs between fork and exec. Not for: the groups a process joins (`confine`).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.confine import Confinement, cpu_mask, limit_memory

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MADV_POPULATE_WRITE = 23
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNET = 0x40000000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


def own_memory() -> None:
    """Copy what the calling process shares after a fork, about 10 MB, so that no page fault waits for it later.

    madvise(2), MADV_POPULATE_WRITE, since Linux 5.14; an older kernel refuses, and faults come one by one as ever.
    Code stays unmapped until it is used: what is mapped has to be unmapped at the end, while somebody waits for it.
    """
    for line in procfs.read_text("/proc/self/maps").splitlines():
        span, rights, _, _, _, *name = line.split()
        if rights.startswith("rw") and not (name and name[0].startswith("[v")):
            start, end = (int(word, 16) for word in span.split("-"))
            _LIBC.madvise(start, end - start, _MADV_POPULATE_WRITE)


def adopt_orphans() -> None:
    """Make the calling process the parent of all its descendants whose own parent ends (prctl(2))."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def enter_network(path: str) -> None:
    """Move the calling process into the network namespace at `path` (setns(2)). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if _LIBC.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns to {path}: {os.strerror(number)}")
    os.close(fd)


def limit_self(confinement: Confinement, envelope: Envelope) -> None:
    """Set the calling process's own limits: no core files, and memory and CPUs where no cgroup holds them. Raises OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if not confinement.holds_cpus:
        os.sched_setaffinity(0, cpu_mask(envelope.cpus))
    if not confinement.enforced:
        limit_memory(envelope)


def become_user(user: str, uid: int | None, gid: int | None) -> None:
    """Give up root for a user, with that user's groups; nothing for None. Raises OSError."""
    if uid is not None and gid is not None:
        os.initgroups(user, gid)
        os.setgid(gid)
        os.setuid(uid)


def die_with_parent() -> None:
    """Have the kernel kill the calling process when its parent dies. To be called after any change of user."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Filter the system calls of the calling thread and of all that it starts, for good (seccomp(2)); nothing for an empty one.

    program: struct sock_filter, eight bytes each (`seccomp.compiled`). It gets no new privileges from then on. Raises OSError.
    """
    if not program:
        return
    wanted = _Program(len(program) // 8, program)
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or (
        _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(wanted), 0, 0) != 0
    ):
        number = ctypes.get_errno()
        raise OSError(number, f"the kernel refused the filter of system calls: {os.strerror(number)}")
