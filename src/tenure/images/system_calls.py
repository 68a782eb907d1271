"""The system calls of a trace: which, how often, and with which flags.

Flags are what strace writes in capitals where a call takes them: ``MAP_FIXED``, ``FUTEX_WAIT_PRIVATE``, ``AF_INET``. Only the
arguments that hold them are read, so that a path or a message is never taken for one. A clone's exit signal (``SIGCHLD``) is
among them: a clone has it when it makes a process, and not when it makes a thread.
Not here: what follows for a form (`compatibility`), the profile that is made of them (`seccomp`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tenure.closures import SystemCall
from tenure.images.strace import Call, Record

PROCESS_FLAG = "SIGCHLD"
"""A flag of clone and clone3 that made a process; without it they made a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """What is done when the kernel says that it has no such call (ENOSYS)."""

    why: str
    """Who does without, and how."""
    calls: tuple[str, ...] = ()
    """What is called instead."""


FALLBACKS: dict[str, Fallback] = {
    "clone3": Fallback(why="the C library calls clone instead", calls=("clone",)),
    "close_range": Fallback(why="CPython and the C library close descriptors one by one", calls=("getdents64",)),
    "get_mempolicy": Fallback(why="OpenBLAS leaves memory where the kernel puts it"),
    "io_uring_enter": Fallback(why="never called without io_uring_setup"),
    "io_uring_register": Fallback(why="never called without io_uring_setup"),
    "io_uring_setup": Fallback(why="libuv, below uvloop, goes on with epoll and threads", calls=("epoll_ctl",)),
    "mbind": Fallback(why="OpenBLAS leaves memory where the kernel puts it"),
    "rseq": Fallback(why="the C library goes on without restartable sequences"),
    "set_mempolicy": Fallback(why="OpenBLAS leaves memory where the kernel puts it"),
    "set_robust_list": Fallback(why="the C library goes on; only locks between processes that die are lost"),
}
"""Calls that Python, its C library and the engines make and do not need. Source: glibc 2.36 (clone-internal.c, nptl),
CPython 3.11 (_posixsubprocess.c), libuv 1.48 (linux.c), OpenBLAS 0.3 (memory.c). The profile of system calls refuses them."""

_ALL = ()
_FLAGS_IN: dict[str, tuple[int, ...]] = {
    "accept4": (3,),
    "arch_prctl": (0,),
    "bpf": (0,),
    "clock_getres": (0,),
    "clock_gettime": (0,),
    "clock_nanosleep": (0, 1),
    "clone": _ALL,
    "clone3": (0,),
    "close_range": (2,),
    "dup3": (2,),
    "epoll_create1": (0,),
    "epoll_ctl": (1, 3),
    "eventfd2": (1,),
    "faccessat2": (3,),
    "fadvise64": (3,),
    "fallocate": (1,),
    "fcntl": (1, 2),
    "flock": (1,),
    "futex": (1,),
    "getrandom": (2,),
    "getsockopt": (1, 2),
    "inotify_init1": (0,),
    "io_uring_setup": (1,),
    "ioctl": (1,),
    "lseek": (2,),
    "madvise": (2,),
    "mbind": (2, 5),
    "membarrier": (0, 1),
    "memfd_create": (1,),
    "mlockall": (0,),
    "mmap": (2, 3),
    "mprotect": (2,),
    "mremap": (3,),
    "msync": (2,),
    "newfstatat": (3,),
    "open": (1,),
    "openat": (2,),
    "openat2": (2,),
    "pidfd_open": (1,),
    "pipe2": (1,),
    "prctl": (0,),
    "prlimit64": (1,),
    "recvfrom": (3,),
    "recvmmsg": (3,),
    "recvmsg": (2,),
    "renameat2": (4,),
    "rt_sigprocmask": (0,),
    "sched_setscheduler": (1,),
    "seccomp": (0, 1),
    "sendmmsg": (3,),
    "sendmsg": (2,),
    "sendto": (3,),
    "setsockopt": (1, 2),
    "shutdown": (1,),
    "signalfd4": (3,),
    "socket": (0, 1, 2),
    "socketpair": (0, 1, 2),
    "splice": (5,),
    "statx": (2, 3),
    "timer_create": (0,),
    "timerfd_create": (0, 1),
    "timerfd_settime": (1,),
    "unlinkat": (2,),
    "unshare": (0,),
    "wait4": (2,),
    "waitid": (0, 3),
}
"""Indices of the arguments that hold flags, commands or families. Source: the calls' pages in section 2 of the manual."""

_WORD = re.compile(r"\b(?:[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|[A-Z][A-Z0-9]{2,})\b")
_UNKNOWN = re.compile(r"\b0x[0-9a-f]+(?= /\* [A-Z_]+\?\?\? \*/)")
"""A flag that strace has no name for, as in ``0x10000 /* IORING_SETUP_??? */``."""
_NO_FLAGS = frozenset(("NULL", "AT_FDCWD"))


def system_calls(records: Iterable[Record]) -> tuple[SystemCall, ...]:
    """Return the calls of a trace, sorted by name. Those that failed count too: a program may need the refusal."""
    counts: Counter[str] = Counter()
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        if isinstance(record, Call):
            counts[record.name] += 1
            seen[record.name].update(flags_of(record))
    return tuple(SystemCall(name=name, count=counts[name], flags=tuple(sorted(seen[name]))) for name in sorted(counts))


def flags_of(call: Call) -> frozenset[str]:
    """Return the symbolic flags of one call; those without a name as a hexadecimal number."""
    places = _FLAGS_IN.get(call.name)
    if places is None:
        return frozenset()
    arguments = call.arguments if places is _ALL else [call.arguments[place] for place in places if place < len(call.arguments)]
    text = " ".join(argument for argument in arguments if not argument.startswith('"'))
    return frozenset([*_WORD.findall(text), *_UNKNOWN.findall(text)]) - _NO_FLAGS


def merged(groups: Iterable[Iterable[SystemCall]]) -> tuple[SystemCall, ...]:
    """Return the calls of several traces as those of one, sorted by name."""
    counts: Counter[str] = Counter()
    seen: defaultdict[str, set[str]] = defaultdict(set)
    for group in groups:
        for call in group:
            counts[call.name] += call.count
            seen[call.name].update(call.flags)
    return tuple(SystemCall(name=name, count=counts[name], flags=tuple(sorted(seen[name]))) for name in sorted(counts))


def makes_processes(calls: Iterable[SystemCall]) -> bool:
    """Return whether the program made processes of its own, threads apart."""
    return any(
        call.name in ("fork", "vfork") or (call.name in ("clone", "clone3") and PROCESS_FLAG in call.flags) for call in calls
    )
