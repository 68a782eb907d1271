"""What a program has to do before its data is there, step by step, so that a slot's end loses no more than a step.

A program may have a method ``prepare(inputs)``: a generator that yields a `Step` before each thing it does. The worker leaves
there when its slot is nearly over or it was told to, and its next slot begins `prepare` again, which then finds on disk what is
done. All workers do so at once; how they share the work is the program's concern (`features`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenure.errors import JobFailed
from tenure.train.context import Context
from tenure.train.events import Work
from tenure.train.pace import LEAVE_SHARE
from tenure.train.programs import Program

LEAVE_S = 0.1
"""Kept of a slot for the next slot's event and the end of the process, beside the share of its start that `pace` keeps."""
MARGIN = 1.5
"""A step is begun only when so many times what it may take is left."""
POLL_S = 0.05
"""Between two looks while others do what is left."""


@dataclass(frozen=True, slots=True)
class Step:
    """What comes next."""

    done: int
    """Pieces that are there, whoever made them."""
    total: int
    next_s: float
    """Seconds that the step may take; 0 when nothing is known."""
    wait: bool = False
    """Whether there is nothing to do but to wait for others."""


def prepare(event: Work, program: Program, context: Context, *, ready: Callable[[], bool]) -> Work | None:
    """Do what the program wants done first. Returns None, or the event of the next slot when this one ended before.

    ready: whether the stage may begin; waited for as well. The time that this takes does not count as start-up. Raises
    JobFailed when nothing came of it for more than `max_idle_slots` slots.
    """
    make: Any = getattr(program, "prepare", None)
    startup_s, began_s = context.since_start_s(), context.since_start_s
    first, step = -1, Step(0, 0, 0.0)
    for step in make(context.spec.inputs) if make else ():
        first = step.done if first < 0 else first
        if _over(context, startup_s, step.next_s):
            return _following(event, context, step, advanced=step.done > first)
        if step.wait:
            context.sleep(POLL_S)
    while not ready():
        if _over(context, startup_s, 0.0):
            return _following(event, context, step, advanced=step.done > first)
        context.sleep(context.poll_s)
    prepared_s = began_s() - startup_s
    if make:
        context.since_start_s = lambda: began_s() - prepared_s
    return None


def _over(context: Context, startup_s: float, step_s: float) -> bool:
    return context.stopping() or context.remaining_s() < LEAVE_S + LEAVE_SHARE * startup_s + MARGIN * step_s


def _following(event: Work, context: Context, step: Step, *, advanced: bool) -> Work:
    idle = 0 if advanced else event.idle + 1
    if idle > context.spec.max_idle_slots:
        raise JobFailed(
            f'in {idle} slots the preparation of "{context.spec.program}" did not get further than {step.done} of '
            f"{step.total} pieces: the slot is too short for one, or those who claimed the rest have ended. Raise the slot."
        )
    return Work(
        workerno=event.workerno,
        workers=event.workers,
        round=event.round,
        slot=event.slot + 1,
        generation=event.generation,
        idle=idle,
    )
