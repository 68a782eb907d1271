"""The training function: one handler, three roles by event, behind local processes now and function services later.

    start ──► plan, first weights ──► worker events 1..N-1, goes on as worker 0
    worker ─► one slot of one worker (`slot`) ──► slot nearly over: invoke oneself with the next slot's event, leave
    combine ► what is missing of one round's sum

Whatever dies may be started again with the same event: it finds in the store what is done. Time, deadline and `invoke` come
in through the Context. Not here: where events come from (`worker`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tenure.errors import SpecError
from tenure.train.circumstances import Inputs, check_resumable, circumstances, verify
from tenure.train.context import Context as Context  # callers know this module alone
from tenure.train.context import Outcome as Outcome
from tenure.train.events import Combine, Start, TrainEvent, Work
from tenure.train.rounds import Rounds
from tenure.train.slot import Slot


def handle(event: TrainEvent, context: Context) -> Outcome:
    """Play the role that the event names.

    Raises JobFailed when the training can't go on (loss not finite, a worker missing for too long, slot too short),
    SpecError for a program or data that does not fit, StaleFence when a newer grant took this worker over.
    """
    spec = context.spec
    rounds = Rounds(spec=spec, program=context.program(), timer=context.timer)
    if isinstance(event, Combine):
        work = Work(workerno=event.worker, workers=event.workers, round=event.round, generation=event.generation)
        return Slot(work, context, rounds).combine(event.round)
    found = circumstances(Path(spec.folder), spec.inputs, (rounds.train, rounds.held_out))
    if isinstance(event, Start):
        event = _start(event, context, rounds, found)
    plan = context.store.read_json(_plan_name(event.generation)) or {}
    planned = plan.get("circumstances", {})
    verify(planned, found, same_result=spec.same_result)
    return Slot(event, context, rounds, check_inputs=Inputs(planned, monotonic=context.monotonic).check).run()


def _start(event: Start, context: Context, rounds: Rounds, found: dict[str, Any]) -> Work:
    if event.workers > context.spec.shards:
        raise SpecError(f"{event.workers} workers can't share {context.spec.shards} shards; raise shards or lower workers")
    store, name = context.store, _plan_name(event.generation)
    plan = {"workers": event.workers, "shards": context.spec.shards, "seed": context.spec.seed, "circumstances": found}
    if not store.exists(name):
        earlier = store.read_json(_plan_name(event.generation - 1)) or {}
        plan["new"] = check_resumable(earlier.get("circumstances", {}), found, same_result=context.spec.same_result)
        store.begin_again(event.generation, changed=bool(plan["new"]))
    work = Work(workerno=0, workers=event.workers, round=max(0, store.newest_sum()), generation=event.generation)
    Slot(work, context, rounds).begin()
    store.publish_json(name, plan, durable=True)
    for worker in range(1, event.workers):
        following = Work(workerno=worker, workers=event.workers, round=work.round, generation=event.generation)
        context.invoke(following.to_dict())
    return work


def _plan_name(generation: int) -> str:
    return f"plans/{generation:04d}.json"
