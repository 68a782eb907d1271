"""The training function: one handler, three roles by event, behind local processes now and function services later.

    start ──► (preparation) ──► plan, first weights ──► worker events 1..N-1, goes on as worker 0
    worker ─► one slot of one worker (`slot`) ──► slot nearly over: invoke oneself with the next slot's event, leave
    combine ► what is missing of one round's sum

Whatever dies may be started again with the same event: it finds in the store what is done. Time, deadline and `invoke` come
in through the Context. Not here: where events come from (`worker`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tenure.errors import SpecError
from tenure.train.circumstances import Inputs, check_resumable, circumstances, verify
from tenure.train.context import Context as Context  # callers know this module alone
from tenure.train.context import Outcome as Outcome
from tenure.train.events import Combine, Start, TrainEvent, Work
from tenure.train.preparing import prepare
from tenure.train.rounds import Rounds
from tenure.train.slot import Slot


def handle(event: TrainEvent, context: Context) -> Outcome:
    """Play the role that the event names.

    Raises JobFailed when the training can't go on (loss not finite, a worker missing for too long, slot too short),
    SpecError for a program or data that does not fit, StaleFence when a newer grant took this worker over.
    """
    spec, program, name = context.spec, context.program(), _plan_name(event.generation)
    if isinstance(event, Combine):
        work = Work(workerno=event.worker, workers=event.workers, round=event.round, generation=event.generation)
        return Slot(work, context, Rounds(spec=spec, program=program, timer=context.timer)).combine(event.round)
    starts = isinstance(event, Start)
    if isinstance(event, Start):
        event = _first(event, context)
        if hasattr(program, "prepare"):
            _invite(event, context)  # to prepare together; they wait for the plan then
    following = prepare(event, program, context, ready=lambda: event.workerno == 0 or context.store.exists(name))
    if following is not None:
        context.invoke(following.to_dict())
        return Outcome("continue", following.round, "told to leave" if context.stopping() else "slot nearly over")
    rounds = Rounds(spec=spec, program=program, timer=context.timer)
    found = circumstances(Path(spec.folder), spec.inputs, (rounds.train, rounds.held_out))
    if starts or not context.store.exists(name):
        _start(event, context, rounds, name, found)
    plan = context.store.read_json(name) or {}
    planned = plan.get("circumstances", {})
    verify(planned, found, same_result=spec.same_result)
    return Slot(event, context, rounds, check_inputs=Inputs(planned, monotonic=context.monotonic).check).run()


def _first(event: Start, context: Context) -> Work:
    if event.workers > context.spec.shards:
        raise SpecError(f"{event.workers} workers can't share {context.spec.shards} shards; raise shards or lower workers")
    return Work(workerno=0, workers=event.workers, round=max(0, context.store.newest_sum()), generation=event.generation)


def _start(event: Work, context: Context, rounds: Rounds, name: str, found: dict[str, Any]) -> None:
    """Publish the plan and what the first round needs, and have the other workers started."""
    store = context.store
    plan = {"workers": event.workers, "shards": context.spec.shards, "seed": context.spec.seed, "circumstances": found}
    if not store.exists(name):
        earlier = store.read_json(_plan_name(event.generation - 1)) or {}
        plan["new"] = check_resumable(earlier.get("circumstances", {}), found, same_result=context.spec.same_result)
        store.begin_again(event.generation, changed=bool(plan["new"]))
    Slot(event, context, rounds).begin()
    store.publish_json(name, plan, durable=True)
    _invite(event, context)


def _invite(event: Work, context: Context) -> None:
    for worker in range(1, event.workers):
        context.invoke(replace(event, workerno=worker, slot=0, idle=0).to_dict())


def _plan_name(generation: int) -> str:
    return f"plans/{generation:04d}.json"
