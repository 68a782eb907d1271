"""The training function: one handler, three roles by event, behind local processes now and function services later.

    start ──► plan, first weights ──► worker events 1..N-1, goes on as worker 0
    worker ─► one slot of one worker (`slot`) ──► slot nearly over: invoke oneself with the next slot's event, leave
    combine ► what is missing of one round's sum

Whatever dies may be started again with the same event: it finds in the store what is done. Time, deadline and `invoke` come
in through the Context. Not here: where events come from (`worker`).
"""

from __future__ import annotations

from tenure.errors import SpecError
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
    rounds = Rounds(spec=context.spec, program=context.program(), timer=context.timer)
    if isinstance(event, Combine):
        work = Work(workerno=event.worker, workers=event.workers, round=event.round, generation=event.generation)
        return Slot(work, context, rounds).combine(event.round)
    if isinstance(event, Start):
        event = _start(event, context, rounds)
    return Slot(event, context, rounds).run()


def _start(event: Start, context: Context, rounds: Rounds) -> Work:
    if event.workers > context.spec.shards:
        raise SpecError(f"{event.workers} workers can't share {context.spec.shards} shards; raise shards or lower workers")
    store = context.store
    plan = {"workers": event.workers, "shards": context.spec.shards, "seed": context.spec.seed}
    work = Work(workerno=0, workers=event.workers, round=max(0, store.newest_sum()), generation=event.generation)
    Slot(work, context, rounds).begin()
    store.publish_json(f"plans/{event.generation:04d}.json", plan, durable=True)
    for worker in range(1, event.workers):
        following = Work(workerno=worker, workers=event.workers, round=work.round, generation=event.generation)
        context.invoke(following.to_dict())
    return work
