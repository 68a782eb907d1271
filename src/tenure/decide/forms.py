"""Which form of an image to run: the cheapest that meets a goal, and why each other is ruled out.

    what is known of each form ──► can it run here? apart enough? quick enough? small enough? ──► the one that costs least

Cheapest is what needs the least memory, which a lease holds as long as it lives; where that is not known of each, or is within
`APART` of each other, what adds the least between program and machine: nothing, a container, a kernel. What was never measured
meets no bound surely: such a form is taken only where none does surely, and then it is said.
Pure. Not here: measuring, and what can run where (`experiments.image_forms`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tenure.errors import SpecError
from tenure.forms import Form
from tenure.resources import parse_bytes, parse_duration, show_bytes

APART = 0.05
"""Share by which memory must differ to count: less is a matter of the moment."""
ORDER = (Form.ROOT, Form.OCI, Form.MICROVM)
"""By what a form adds, least first."""
Isolation = Literal["process", "container", "microvm"]
ISOLATION: dict[Form, Isolation] = {Form.ROOT: "process", Form.OCI: "container", Form.MICROVM: "microvm"}
"""How far a form keeps its program apart, least first: a process of the machine, a container, a kernel of its own."""
_BOUND = re.compile(r"(cold_start|memory)\s*<=?\s*(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormGoal:
    """What a form must meet; 0 is no bound."""

    cold_start_s: float = 0.0
    """Most seconds from start to ready."""
    memory_bytes: int = 0
    """Most memory that it may need."""
    isolation: Isolation = "process"
    """Least that keeps the program apart."""

    def __str__(self) -> str:
        bounds = [f"cold_start<{self.cold_start_s:g}s"] if self.cold_start_s else []
        bounds += [f"memory<{show_bytes(self.memory_bytes)}"] if self.memory_bytes else []
        bounds += [f"isolation at least {self.isolation}"] if self.isolation != "process" else []
        return ", ".join(bounds) or "least cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFacts:
    """What is known of one form of an image on one node; None: never measured."""

    form: Form
    size_bytes: int
    cold_start_s: float | None = None
    memory_floor_bytes: int | None = None
    """Smallest memory in which it was seen to answer."""
    peak_memory_bytes: int | None = None
    """Most that it was seen to use: an upper end of what it needs."""
    cannot: str = ""
    """Why it does not run on the node; empty: it does."""

    @property
    def memory_bytes(self) -> int | None:
        """Return what is known of the memory that it needs: the floor, else the peak."""
        return self.peak_memory_bytes if self.memory_floor_bytes is None else self.memory_floor_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RuledOut:
    """A form that is not taken."""

    form: Form
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FormChoice:
    """The form to run."""

    form: Form | None
    """None: none may meet the goal."""
    why: str
    ruled_out: tuple[RuledOut, ...] = ()
    """Every other form, in `ORDER`."""
    thin: str = ""
    """What is not known of the form that was chosen, and might break the goal; empty: it meets it by what was measured."""

    def describe(self) -> str:
        """Return all of it in one line for people."""
        parts = [self.why, *([f"not sure: {self.thin}"] if self.thin else [])]
        return "; ".join([*parts, *(f"not {out.form}: {out.why}" for out in self.ruled_out)])


def parse_form_goal(text: str) -> FormGoal:
    """Return the goal of a text such as ``cold_start<2s, memory<256MiB``; empty: none. Raises SpecError, with what is known."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _BOUND.fullmatch(part)
        if match is None:
            raise SpecError(
                f"a form's goal reads like cold_start<2s or memory<256MiB, with commas between them; found {part!r}"
            )
        if match[1] in found:
            raise SpecError(f"{match[1]} is bounded twice: by {found[match[1]]} and {match[2]}; give one")
        found[match[1]] = match[2].strip()
    goal = FormGoal(
        cold_start_s=parse_duration(found["cold_start"]) if "cold_start" in found else 0.0,
        memory_bytes=parse_bytes(found["memory"]) if "memory" in found else 0,
    )
    if zero := [
        name
        for name, value in (("cold_start", goal.cold_start_s), ("memory", goal.memory_bytes))
        if name in found and not value
    ]:
        raise SpecError(f"a bound must be above 0; found {zero[0]}<{found[zero[0]]}")
    return goal


def choose_form(known: Sequence[FormFacts], goal: FormGoal) -> FormChoice:
    """Return the cheapest form that meets the goal, in whatever order they are given; each at most once."""
    known = sorted(known, key=lambda facts: ORDER.index(facts.form))
    broken = {facts.form: _broken(facts, goal) for facts in known}
    open_ = {facts.form: _open(facts, goal) for facts in known}
    meeting = [facts for facts in known if not broken[facts.form]]
    sure = [facts for facts in meeting if not open_[facts.form]]
    if not meeting:
        ruled = tuple(RuledOut(form=form, why=why) for form, why in broken.items())
        return FormChoice(form=None, why=f"no form meets {goal}", ruled_out=ruled)
    best, how = _cheapest(sure or meeting)
    ruled_out = []
    for facts in known:
        if facts.form is best.form:
            continue
        why = broken[facts.form] or (open_[facts.form] if sure else "") or _dearer(facts, best)
        ruled_out.append(RuledOut(form=facts.form, why=why))
    return FormChoice(
        form=best.form,
        why=f"{best.form} {'meets' if sure else 'may meet'} {goal}{how}",
        ruled_out=tuple(ruled_out),
        thin=open_[best.form],
    )


# --- helpers ---


def _broken(facts: FormFacts, goal: FormGoal) -> str:
    """Return why a form cannot meet the goal; empty: it may."""
    if facts.cannot:
        return facts.cannot
    levels = list(ISOLATION.values())
    if levels.index(ISOLATION[facts.form]) < levels.index(goal.isolation):
        return f"it keeps the program apart as a {ISOLATION[facts.form]} only, and {goal.isolation} was asked for"
    if goal.cold_start_s and facts.cold_start_s is not None and facts.cold_start_s > goal.cold_start_s:
        return f"its start takes {facts.cold_start_s:.2f} s; the bound is {goal.cold_start_s:g} s"
    if goal.memory_bytes and facts.memory_floor_bytes is not None and facts.memory_floor_bytes > goal.memory_bytes:
        return f"it needs {show_bytes(facts.memory_floor_bytes)} of memory; the bound is {show_bytes(goal.memory_bytes)}"
    return ""


def _open(facts: FormFacts, goal: FormGoal) -> str:
    """Return what is not known of a form, and may break the goal."""
    if goal.cold_start_s and facts.cold_start_s is None:
        return "its start was never measured here"
    if goal.memory_bytes and facts.memory_bytes is None:
        return "its memory was never measured here"
    if goal.memory_bytes and facts.memory_floor_bytes is None and (facts.peak_memory_bytes or 0) > goal.memory_bytes:
        return f"it was seen to use {show_bytes(facts.peak_memory_bytes or 0)}; the bound is {show_bytes(goal.memory_bytes)}"
    return ""


def _cheapest(meeting: Sequence[FormFacts]) -> tuple[FormFacts, str]:
    """Return the cheapest of at least one, in `ORDER`, and by what."""
    if len(meeting) == 1:
        return meeting[0], ""
    needs = [facts.memory_bytes for facts in meeting if facts.memory_bytes is not None]
    if len(needs) < len(meeting):
        return meeting[0], ", and adds the least (not all were seen in their memory)"
    least = min(needs)
    near = [facts for facts in meeting if (facts.memory_bytes or 0) <= least * (1 + APART)]
    if len(near) > 1:
        return near[0], f", and adds the least of those that need about {show_bytes(least)} of memory"
    return near[0], f" with the least memory, {show_bytes(least)}"


def _dearer(facts: FormFacts, best: FormFacts) -> str:
    mine, its = facts.memory_bytes, best.memory_bytes
    adds_more = ORDER.index(facts.form) > ORDER.index(best.form)
    if mine is not None and its is not None and (mine > its * (1 + APART) or not adds_more):
        return f"it needs more memory, {show_bytes(mine)}"
    return f"it adds {'a container' if facts.form is Form.OCI else 'a kernel'}"
