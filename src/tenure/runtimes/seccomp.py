"""A profile of system calls as a filter that the kernel runs: read, checked and compiled to BPF.

The format is the one of Docker and Podman, so that one file serves a container and a plain process. The filter is made where
the runtime plans an attempt; the process that becomes the command puts it on as its last act (`become.filter_calls`).
Not here: which calls a program needs (`images.seccomp`). Containers get the profile itself: the engine compiles it.

Source: seccomp(2), the kernel's include/uapi/linux/{filter,seccomp,audit}.h, and Docker's documentation of seccomp profiles.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenure.data.system_calls import numbers
from tenure.errors import SpecError, Unsupported
from tenure.protocols import StartSpec
from tenure.runtimes.acting import acting_as, actor_of, open_regular
from tenure.runtimes.rooted import read_image

MAX_PROFILE_BYTES = 1 << 20
_STARTS = (
    *("fstatfs", "getdents64", "ioctl", "kill", "openat", "rt_sigtimedwait", "setpgid", "wait4"),
    *("epoll_pwait", "fcntl", "nanosleep", "newfstatat", "sched_yield"),
)
"""What an engine's own start of a container calls behind the filter: the first line was found by leaving out all others one by
one (runc 1.1.5 and docker-init of Docker 20.10), the second is what the Go runtime below runc may call besides."""
_NAMESPACES = 0x7E020000
"""Flags of clone that make namespaces."""
_OPEN = ("SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY")
_NEVER = frozenset(
    {
        *("acct", "add_key", "bpf", "chroot", "clock_adjtime", "clock_settime", "clone3", "delete_module", "fanotify_init"),
        *("finit_module", "fsconfig", "fsmount", "fsopen", "fspick", "init_module", "io_uring_enter", "io_uring_register"),
        *("io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl", "lookup_dcookie", "mount"),
        *("mount_setattr", "move_mount", "nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "pivot_root"),
        *("process_madvise", "quotactl", "quotactl_fd", "reboot", "request_key", "setdomainname", "sethostname", "setns"),
        *("settimeofday", "stime", "swapoff", "swapon", "syslog", "umount", "umount2", "unshare", "userfaultfd", "vhangup"),
    }
)
"""What no container may call, whatever its profile says. Source: Docker's documentation of its own profile."""
_MAX_INSTRUCTIONS = 4096
"""BPF_MAXINSNS."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_GO_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
"""Docker's names, for rules that hold on some machines only."""
_X32 = 0x40000000
"""Bit of the calls of x86-64's 32-bit ABI: none is let through."""
_LD, _JEQ, _JGT, _JGE, _AND, _RET = 0x20, 0x15, 0x25, 0x35, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data."""
_ACTIONS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_ERRNO": 0x00050000,
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_LOG": 0x7FFC0000,
}
_KILL_PROCESS = _ACTIONS["SCMP_ACT_KILL_PROCESS"]
_EPERM = 1
_OPERATORS = ("SCMP_CMP_EQ", "SCMP_CMP_NE", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_GT", "SCMP_CMP_GE", "SCMP_CMP_LT", "SCMP_CMP_LE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What one argument must be."""

    index: int
    operator: str
    value: int
    mask: int = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is done with a call whose arguments meet all conditions."""

    names: tuple[str, ...]
    action: int
    """As the kernel takes it, with the error's number."""
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Rules, the first that fits counts, and what is done with every other call."""

    default: int
    rules: tuple[Rule, ...]


def profile_of(spec: StartSpec) -> str:
    """Return the text of the profile that an attempt runs behind: the one it names, else its image's own; empty: neither.

    Read with the rights of the attempt's user. Raises SpecError.
    """
    path = profile_path(spec)
    if not path:
        return ""
    with acting_as(actor_of(spec.user)):
        return read_profile(path, whose=f"lease {spec.lease_id}")


def profile_path(spec: StartSpec) -> str:
    """Return where the profile of an attempt lies; empty: there is none. Raises SpecError for an image without a manifest."""
    if not spec.seccomp and os.path.isabs(spec.image) and (name := str(read_image(spec.image).get("seccomp", ""))):
        return os.path.join(spec.image, name)
    return spec.seccomp


def read_profile(path: str, *, whose: str) -> str:
    """Return the text of a profile's file, checked. whose: for the message. Raises SpecError, Unsupported."""
    if not os.path.isabs(path):
        raise SpecError(f"{whose}: seccomp must be the absolute path of a profile; found {path!r}")
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as stream:
            data = stream.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{whose}: the profile of system calls {path} can't be read: {error.strerror or error}") from error
    if len(data) > MAX_PROFILE_BYTES:
        raise SpecError(f"{whose}: the profile of system calls {path} has more than {MAX_PROFILE_BYTES} bytes")
    text = data.decode("utf-8", "replace")
    try:
        parse_profile(text, os.uname().machine)
    except SpecError as error:
        raise SpecError(f"{whose}: {path}: {error}") from error
    return text


def parse_profile(text: str, machine: str) -> Profile:
    """Return a profile in Docker's format as it holds on a machine for a process without capabilities. Raises SpecError.

    Nothing of the text is repeated in an error: it may be of a file that its reader should not see.
    """
    try:
        document = json.loads(text)
        default = _action(document["defaultAction"], document.get("defaultErrnoRet"))
        rules = [
            Rule(
                names=tuple(_names(entry)),
                action=_action(entry["action"], entry.get("errnoRet")),
                conditions=tuple(_condition(argument) for argument in entry.get("args") or []),
            )
            for entry in document.get("syscalls") or []
            if _holds(entry, machine)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError("it is no profile in Docker's format: defaultAction, and syscalls with names and action") from error
    return Profile(default=default, rules=tuple(rules))


def _action(name: str, errno: int | None) -> int:
    if name not in _ACTIONS:
        raise SpecError(f"an action of it is not known here; known: {', '.join(_ACTIONS)}")
    if name != "SCMP_ACT_ERRNO":
        return _ACTIONS[name]
    number = _EPERM if errno is None else int(errno)
    if not 0 <= number < 4096:
        raise SpecError("an errnoRet of it does not lie in 0..4095")
    return _ACTIONS[name] | number


def _condition(argument: Mapping[str, Any]) -> Condition:
    operator, index, value = argument["op"], int(argument["index"]), int(argument["value"])
    if operator not in _OPERATORS or not 0 <= index < 6:
        raise SpecError(f"a condition of it is not known here; known: index 0..5 and {', '.join(_OPERATORS)}")
    if operator == "SCMP_CMP_MASKED_EQ":
        return Condition(index=index, operator=operator, value=int(argument.get("valueTwo") or 0), mask=value)
    return Condition(index=index, operator=operator, value=value)


def _holds(entry: Mapping[str, Any], machine: str) -> bool:
    """Whether a rule is meant for this machine, and for a process that has no capability."""
    arch, (includes, excludes) = _GO_ARCH.get(machine, machine), (entry.get("includes") or {}, entry.get("excludes") or {})
    if includes.get("caps") or (includes.get("arches") and arch not in includes["arches"]):
        return False
    return arch not in (excludes.get("arches") or [])


def for_container(text: str, *, whose: str) -> str:
    """Return a profile's text with what the engine itself needs to start a container and to pass signals on.

    A profile may only take away: one that lets through what no container of ours may do is refused. whose: for the message.
    Raises SpecError.
    """
    document = json.loads(text)
    rules = [rule for rule in document.get("syscalls") or [] if not (rule.get("includes") or {}).get("caps")]
    opened = [rule for rule in rules if rule["action"] in _OPEN]
    too_much = sorted({name for rule in opened for name in _names(rule)} & _NEVER)
    if document["defaultAction"] in _OPEN or too_much:
        found = f"it lets through {', '.join(too_much[:8])}" if too_much else "it refuses only what it names"
        raise SpecError(f"{whose}: the profile of system calls is too wide for a container: {found}. Make it from a trace.")
    closed = {"index": 0, "value": _NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
    free = {name for rule in opened if not rule.get("args") for name in _names(rule)}
    kept = [rule for rule in rules if _names(rule) != ["clone"] or rule not in opened]
    kept = [dict(rule, names=[name for name in _names(rule) if name != "clone" or rule not in opened]) for rule in kept]
    document["syscalls"] = [
        *(rule for rule in kept if rule["names"]),
        {"names": sorted(set(_STARTS) - free), "action": "SCMP_ACT_ALLOW"},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [closed]},  # the engine's init makes a process
    ]
    return json.dumps(document)


def _names(rule: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in rule.get("names") or [rule["name"]]]


# --- compiled ---


def compile_profile(profile: Profile, machine: str) -> bytes:
    """Return the filter as the kernel takes it: struct sock_filter, eight bytes each. Raises Unsupported, SpecError.

    A call of another architecture ends the process; names that this one does not have are left out, as engines do.
    """
    known = numbers(machine)
    out = [_op(_LD, _ARCH), _op(_JEQ, _AUDIT_ARCH[machine], 1, 0), _op(_RET, _KILL_PROCESS), _op(_LD, _NUMBER)]
    if machine == "x86_64":
        out += [_op(_JGE, _X32, 0, 1), _op(_RET, profile.default)]
    by_name: dict[str, list[Rule]] = {}
    for rule in profile.rules:
        for name in rule.names:
            by_name.setdefault(name, []).append(rule)
    for number, name in sorted((known[name], name) for name in by_name if name in known):
        block = _block(by_name[name], profile.default)
        if len(block) > 255:
            raise SpecError(f"the profile has too many conditions for {name}: {len(block)} instructions; the limit is 255")
        out += [_op(_JEQ, number, 0, len(block)), *block]
    out.append(_op(_RET, profile.default))
    if len(out) > _MAX_INSTRUCTIONS:
        raise SpecError(f"the profile makes {len(out)} instructions; the kernel takes {_MAX_INSTRUCTIONS}")
    return b"".join(out)


def _block(rules: Sequence[Rule], default: int) -> list[bytes]:
    """Return what decides over one call: the first rule whose conditions all hold, else the default."""
    out: list[bytes] = []
    for rule in rules:
        if not rule.conditions:
            return [*out, _op(_RET, rule.action)]
        out += _checked(rule.conditions, [_op(_RET, rule.action)])
    return [*out, _op(_RET, default)]


def _checked(conditions: Sequence[Condition], then: list[bytes]) -> list[bytes]:
    """Return `then` behind the conditions: whichever fails jumps past it."""
    for condition in reversed(conditions):
        then = [*_test(condition, len(then)), *then]
    return then


def _test(condition: Condition, skip: int) -> list[bytes]:
    """Return what goes on when the condition holds, and past `skip` further instructions when it does not.

    An argument has 64 bits and BPF loads 32: the high half first, and the low one where the high one does not decide.
    """
    low = _ARGUMENTS + 8 * condition.index
    high_value, low_value = condition.value >> 32 & 0xFFFFFFFF, condition.value & 0xFFFFFFFF
    name = condition.operator.removeprefix("SCMP_CMP_")
    if name in ("EQ", "MASKED_EQ"):
        high_mask, low_mask = condition.mask >> 32 & 0xFFFFFFFF, condition.mask & 0xFFFFFFFF
        tail = [_op(_LD, low), _op(_AND, low_mask), _op(_JEQ, low_value, 0, skip)]
        return [_op(_LD, low + 4), _op(_AND, high_mask), _op(_JEQ, high_value, 0, len(tail) + skip), *tail]
    if name == "NE":
        return [_op(_LD, low + 4), _op(_JEQ, high_value, 0, 2), _op(_LD, low), _op(_JEQ, low_value, skip, 0)]
    above = name in ("GT", "GE")
    last = {"GT": _op(_JGT, low_value, 0, skip), "GE": _op(_JGE, low_value, 0, skip)}
    last |= {"LT": _op(_JGE, low_value, skip, 0), "LE": _op(_JGT, low_value, skip, 0)}
    decided = (3, 0) if above else (3 + skip, 0)
    undecided = (0, 2 + skip) if above else (0, 2)
    return [
        _op(_LD, low + 4),
        _op(_JGT, high_value, *decided),
        _op(_JEQ, high_value, *undecided),
        _op(_LD, low),
        last[name],
    ]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    if if_true > 255 or if_false > 255:
        raise SpecError("the profile has too many conditions for one call")
    return struct.pack("=HBBI", code, if_true, if_false, value)


def compiled(text: str) -> bytes:
    """Return the filter of a profile's text for this machine. Raises SpecError, Unsupported."""
    machine = os.uname().machine
    if machine not in _AUDIT_ARCH:
        raise Unsupported("seccomp", f"no filter can be made on {machine}; it can on {', '.join(_AUDIT_ARCH)}")
    return compile_profile(parse_profile(text, machine), machine)
