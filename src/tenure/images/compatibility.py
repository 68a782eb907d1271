"""What each form can and can't run, judged by a program's system calls, names and flags, and why.

A table per kernel says which calls it answers, which it answers without doing anything, and so for their flags; the tables are
data (`tenure.data/compat`), each with source, revision and date. Judged is what was observed: a path that no exercise took may
need more, and a call that a table names may still behave otherwise. So the best verdict is "nothing speaks against it".
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from tenure.closures import SystemCall
from tenure.images.system_calls import FALLBACKS, makes_processes


class Effect(StrEnum):
    """What a kernel does with a call or a flag that it does not do."""

    MISSING = "missing"
    """The call is refused, whatever its arguments."""
    REFUSED = "refused"
    """The call is refused with this flag."""
    IGNORED = "ignored"
    """Success is said and nothing done."""


class Weight(StrEnum):
    """What follows for the program."""

    BLOCKS = "blocks"
    """It needs the call, as far as anybody knows: it fails there."""
    CHANGES = "changes"
    """It runs, and something it asked for does not happen."""
    HARMLESS = "harmless"


class Verdict(StrEnum):
    """Whether a form can run a program, as far as its system calls tell."""

    RUNS = "nothing speaks against it"
    CHANGED = "runs with differences"
    CANNOT = "can't run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One call, or one flag of it, that a kernel does not do."""

    call: str
    flag: str = ""
    """Empty: the call as such."""
    effect: Effect
    weight: Weight
    why: str

    def __str__(self) -> str:
        what = f"{self.call} with {self.flag}" if self.flag else self.call
        return f"{what}: {self.effect}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormReport:
    """What one form makes of a program's system calls."""

    form: str
    """``root``, ``oci``, ``microvm``, ``nanos``, ``unikraft``."""
    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    """The heaviest first."""
    source: str = ""
    """Where the table comes from, with revision and date; empty: the form's kernel is Linux."""

    @property
    def reasons(self) -> tuple[Finding, ...]:
        """What speaks against it: the findings that are not harmless."""
        return tuple(finding for finding in self.findings if finding.weight is not Weight.HARMLESS)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlagRules:
    """What a kernel does with the flags of one call. Names may end in ``*``."""

    acts: tuple[str, ...]
    harmless: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """No flags of this call, only words beside them."""
    other: Effect
    """What is done with one named nowhere."""
    why: str
    harmless_why: str = "without it the call does the same here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What one kernel answers."""

    name: str
    source: str
    revision: str
    date: str
    answered: frozenset[str]
    ignored: frozenset[str]
    """Answered without effect."""
    harmless: frozenset[str]
    """Of `ignored`, those whose effect nobody misses."""
    optional: Mapping[str, str] = field(default_factory=dict)
    """Call -> what must be in the image for it."""
    loader: Mapping[str, str] = field(default_factory=dict)
    """Calls that the form's own loader makes for the program, once."""
    flags: Mapping[str, FlagRules] = field(default_factory=dict)


LINUX_FORMS = ("root", "oci", "microvm")
UNIKERNELS = ("nanos", "unikraft")

_NEED_RIGHTS = frozenset(
    {
        *(
            "acct",
            "add_key",
            "bpf",
            "chroot",
            "clock_adjtime",
            "clock_settime",
            "fanotify_init",
            "keyctl",
            "mknod",
            "perf_event_open",
        ),
        *(
            "init_module",
            "finit_module",
            "delete_module",
            "ioperm",
            "iopl",
            "kexec_load",
            "open_by_handle_at",
            "reboot",
            "syslog",
        ),
        *("mount", "move_mount", "pivot_root", "umount2", "setdomainname", "sethostname", "setns", "settimeofday", "unshare"),
        *("swapon", "swapoff"),
    }
)
"""Calls that need a right which nobody has in a container of ours. Source: capabilities(7)."""


def reports(calls: Iterable[SystemCall]) -> tuple[FormReport, ...]:
    """Return the report of every form, those whose kernel is Linux first."""
    made = tuple(calls)
    return (*(_linux(form, made) for form in LINUX_FORMS), *(report(made, table(name)) for name in UNIKERNELS))


def report(calls: Iterable[SystemCall], kernel: Table) -> FormReport:
    """Return what one kernel makes of a program's calls."""
    made = tuple(calls)
    found = [finding for call in made for finding in _findings(call, kernel, forks=makes_processes(made))]
    return _report(kernel.name, found, source=f"{kernel.source}; {kernel.revision[:12]} of {kernel.date}")


def _linux(form: str, calls: tuple[SystemCall, ...]) -> FormReport:
    why = "nobody is root in a container, and none has capabilities"
    found = [
        Finding(call=call.name, effect=Effect.MISSING, weight=Weight.BLOCKS, why=why)
        for call in calls
        if form == "oci" and call.name in _NEED_RIGHTS
    ]
    return _report(form, found, source="")


def _report(form: str, found: list[Finding], *, source: str) -> FormReport:
    order = tuple(Weight)
    findings = tuple(sorted(found, key=lambda finding: (order.index(finding.weight), finding.call, finding.flag)))
    heaviest = findings[0].weight if findings else Weight.HARMLESS
    verdict = {Weight.BLOCKS: Verdict.CANNOT, Weight.CHANGES: Verdict.CHANGED, Weight.HARMLESS: Verdict.RUNS}[heaviest]
    return FormReport(form=form, verdict=verdict, findings=findings, source=source)


def _findings(call: SystemCall, kernel: Table, *, forks: bool) -> list[Finding]:
    missing = _missing(call, kernel, forks=forks)
    if missing is not None:
        return [missing]
    if call.name in kernel.ignored:
        weight = Weight.HARMLESS if call.name in kernel.harmless else Weight.CHANGES
        return [Finding(call=call.name, effect=Effect.IGNORED, weight=weight, why="success is said and nothing done")]
    rules = kernel.flags.get(call.name)
    return [] if rules is None else [found for flag in call.flags if (found := _of_flag(call.name, flag, rules)) is not None]


def _missing(call: SystemCall, kernel: Table, *, forks: bool) -> Finding | None:
    name, effect = call.name, Effect.MISSING
    if name in kernel.loader:
        if not forks:  # as often as the program was started to be watched
            return None
        why = "there is one program and one process: nothing else can be started"
        return Finding(call=name, effect=effect, weight=Weight.BLOCKS, why=why)
    if name in kernel.answered or name in kernel.ignored:
        return None
    if name in kernel.optional:
        return Finding(call=name, effect=effect, weight=Weight.CHANGES, why=kernel.optional[name])
    if name in ("fork", "vfork"):
        return Finding(call=name, effect=effect, weight=Weight.BLOCKS, why="there is one process: no other can be made")
    if name in FALLBACKS:
        return Finding(call=name, effect=effect, weight=Weight.HARMLESS, why=FALLBACKS[name].why)
    return Finding(
        call=name, effect=effect, weight=Weight.BLOCKS, why="the kernel has no such call, and no way around is known"
    )


def _of_flag(call: str, flag: str, rules: FlagRules) -> Finding | None:
    plain = flag.removesuffix("_PRIVATE") if flag.startswith("FUTEX_") else flag
    if _among(plain, rules.acts) or _among(plain, rules.words):
        return None
    if _among(plain, rules.harmless):
        return Finding(call=call, flag=flag, effect=Effect.IGNORED, weight=Weight.HARMLESS, why=rules.harmless_why)
    effect = rules.other
    if _among(plain, rules.ignored):
        effect = Effect.IGNORED
    if _among(plain, rules.refused):
        effect = Effect.REFUSED
    weight = Weight.CHANGES if effect is Effect.IGNORED else Weight.BLOCKS
    return Finding(call=call, flag=flag, effect=effect, weight=weight, why=rules.why)


def _among(flag: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(flag, pattern) for pattern in patterns)


@cache
def table(name: str) -> Table:
    """Return a table that ships with Tenure: ``nanos`` or ``unikraft``."""
    text = resources.files("tenure.data").joinpath("compat", f"{name}.toml").read_text()
    document = tomllib.loads(text)
    return Table(
        name=document["name"],
        source=document["source"],
        revision=document["revision"],
        date=str(document["date"]),
        answered=frozenset(document["answered"].split()),
        ignored=frozenset(document["ignored"].split()),
        harmless=frozenset(document["harmless"].split()),
        optional=document.get("optional", {}),
        loader=document.get("loader", {}),
        flags={call: _rules(rules) for call, rules in document["flags"].items()},
    )


def _rules(document: Mapping[str, Any]) -> FlagRules:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}
    return FlagRules(**fields | {"other": Effect(document["other"])})
