"""The profile of system calls of a program: what it was seen to call and what any Python needs, and nothing else.

In Docker's format, so that Docker, Podman and the process runtime take the same file. What is not in it is refused with EPERM,
and calls younger than the C libraries about with ENOSYS, as by a kernel that does not have them: a library that only tries one
goes on with an older one. So calls that are tried and not needed (`system_calls.FALLBACKS`) are left out, and what is called
instead is let in.

Arguments are held where a trace is enough to know them: a clone makes no namespace, and no process either when none was seen
to; sockets are of the families seen; prctl does what it was seen to do. Commands of ioctl are not held: a filter sees their
number, which a program may write in more ways than one.
Not here: compiling and putting it on (`runtimes`), the trace (`strace`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tenure.closures import SystemCall
from tenure.images.system_calls import FALLBACKS, makes_processes

ENOSYS = 38
ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}

ALWAYS = (
    *("brk", "clock_gettime", "clock_nanosleep", "close", "execve", "exit", "exit_group", "futex", "getpid", "getrandom"),
    *("gettid", "madvise", "mmap", "mprotect", "mremap", "munmap", "read", "restart_syscall", "rt_sigaction"),
    *("rt_sigprocmask", "rt_sigreturn", "sched_yield", "tgkill", "write"),
)
"""What a C library and CPython may need without a trace showing it: memory, the end of threads and of the process, the return
from a signal's handler, a call that goes on after a stop, abort(3), the clock where the kernel maps no vDSO, a lock that was
free while it was traced, a list that grew no further then."""
ALIKE = (
    ("accept", "accept4"),
    ("dup2", "dup3"),
    ("epoll_pwait", "epoll_wait"),
    ("fork", "vfork"),
    ("fstat", "lstat", "newfstatat", "stat"),
    ("open", "openat"),
    ("pipe", "pipe2"),
    ("poll", "ppoll", "pselect6", "select"),
    ("recvfrom", "recvmsg"),
    ("sendmsg", "sendto"),
)
"""Calls of the same power, of which a library takes one or another: uvloop waits by epoll_pwait, asyncio without it by
epoll_wait, and an image may be made without uvloop. Who may do one may do all."""

_YOUNG = (
    *(
        "statx",
        "io_pgetevents",
        "rseq",
        "pidfd_send_signal",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "openat2",
    ),
    *(
        "open_tree",
        "move_mount",
        "fsopen",
        "fsconfig",
        "fsmount",
        "fspick",
        "pidfd_open",
        "clone3",
        "close_range",
        "pidfd_getfd",
    ),
    *(
        "faccessat2",
        "process_madvise",
        "epoll_pwait2",
        "mount_setattr",
        "quotactl_fd",
        "landlock_create_ruleset",
        "memfd_secret",
    ),
    *("landlock_add_rule", "landlock_restrict_self", "process_mrelease", "futex_waitv", "set_mempolicy_home_node", "cachestat"),
    *("fchmodat2", "map_shadow_stack", "futex_wake", "futex_wait", "futex_requeue", "preadv2", "pwritev2", "copy_file_range"),
)
"""Calls of Linux 4.5 and later, which programs try and do without. An engine leaves out those that it does not know."""

_CLONE_THREAD = 0x00010000
_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
_FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16, "AF_PACKET": 17, "AF_VSOCK": 40}
_PRCTL = {
    "PR_SET_PDEATHSIG": 1,
    "PR_GET_PDEATHSIG": 2,
    "PR_GET_DUMPABLE": 3,
    "PR_SET_DUMPABLE": 4,
    "PR_SET_NAME": 15,
    "PR_GET_NAME": 16,
    "PR_CAPBSET_READ": 23,
    "PR_SET_TIMERSLACK": 29,
    "PR_GET_TIMERSLACK": 30,
    "PR_SET_CHILD_SUBREAPER": 36,
    "PR_SET_NO_NEW_PRIVS": 38,
    "PR_GET_NO_NEW_PRIVS": 39,
    "PR_SET_VMA": 0x53564D41,
}
"""Numbers of include/uapi/linux/{socket,prctl,sched}.h."""


def profile(calls: Iterable[SystemCall], *, machine: str) -> dict[str, Any]:
    """Return the profile of a program from its traced calls. machine: as the kernel calls it, e.g. ``x86_64``."""
    made = {call.name: call for call in calls}
    names = allowed(made.values())
    conditions = {
        name: rules
        for name, rules in (
            ("clone", [_clone(makes_processes(made.values()))]),
            ("socket", _equals(_families(made.get("socket")))),
            ("socketpair", _equals(_families(made.get("socketpair")))),
            ("prctl", _equals(_numbers(made.get("prctl"), _PRCTL))),
        )
        if name in names and rules
    }
    plain = [name for name in names if name not in conditions]
    rules: list[dict[str, Any]] = [{"names": plain, "action": "SCMP_ACT_ALLOW"}]
    rules += [
        {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]}
        for name, arguments in sorted(conditions.items())
        for argument in arguments
    ]
    refused = sorted({*FALLBACKS, *_YOUNG} - set(names))
    rules.append({"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": [ARCHITECTURES[machine]] if machine in ARCHITECTURES else [],
        "syscalls": rules,
    }


def profile_json(calls: Iterable[SystemCall], *, machine: str) -> str:
    """Return the profile as text that is the same for the same calls, and reads well in a diff."""
    return json.dumps(profile(calls, machine=machine), indent=1) + "\n"


def allowed(calls: Iterable[SystemCall]) -> tuple[str, ...]:
    """Return the names that the profile lets through, with or without conditions, sorted."""
    made = {call.name for call in calls}
    made |= {other for group in ALIKE if made & set(group) for other in group}
    instead = {other for name in made for other in (FALLBACKS[name].calls if name in FALLBACKS else ())}
    return tuple(sorted((made | set(ALWAYS) | instead) - (set(FALLBACKS) - instead)))


def _clone(makes_process: bool) -> dict[str, Any]:
    mask, value = (_NAMESPACES, 0) if makes_process else (_NAMESPACES | _CLONE_THREAD, _CLONE_THREAD)
    return {"index": 0, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def _families(call: SystemCall | None) -> list[int]:
    """Return the families of a call's sockets; both of the internet for either: which one, an address decides at run time."""
    found = _numbers(call, _FAMILIES)
    internet = {_FAMILIES["AF_INET"], _FAMILIES["AF_INET6"]}
    return sorted({*found, *internet}) if internet & set(found) else found


def _numbers(call: SystemCall | None, known: Mapping[str, int]) -> list[int]:
    """Return the numbers of a call's first argument; none when one of its names is not known here: then nothing is held."""
    if call is None:
        return []
    prefixes = ("0x", *{name.partition("_")[0] + "_" for name in known})
    names = [flag for flag in call.flags if flag.startswith(prefixes)]
    return sorted({known[name] for name in names}) if names and all(name in known for name in names) else []


def _equals(numbers: Iterable[int]) -> list[dict[str, Any]]:
    return [{"index": 0, "value": number, "valueTwo": 0, "op": "SCMP_CMP_EQ"} for number in numbers]
