"""The training function: one handler, three roles by event, behind local processes now and function services later.

    start ──► plan, first weights ──► worker events 1..N-1, goes on as worker 0
    worker ─► own shards of round r ──► all shards there? claim the combine ──► weights r+1 ──► round r+1 …
                                    └─► wait for weights r+1, or take a lapsed claim over
    slot nearly over ──► invoke oneself with the next slot's event, leave

Shard s of a round belongs to worker s mod N. Whatever dies may be started again with the same event: it finds in the
store what is done. Time, deadline and `invoke` come in through the Context. Not here: where events come from (`worker`).
Weighed and rejected: letting a waiting worker compute a straggler's shards; it would hide a lost worker and blur costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tenure.errors import CorruptData, JobFailed, SpecError, Unavailable
from tenure.train.events import Combine, Start, TrainEvent, Work
from tenure.train.programs import Program
from tenure.train.rounds import Rounds
from tenure.train.spec import TrainSpec
from tenure.train.store import Claims, Store, read_result

LEAVE_S = 0.25
"""Kept of a slot for handing over: one small file and the end of the process; and a quarter of what its start took, so
that a worker on a small CPU share keeps more."""
MARGIN = 1.5
"""A step is begun only when the slot has this many times its longest duration so far left."""


@dataclass(slots=True, kw_only=True)
class Context:
    """What the handler is handed."""

    spec: TrainSpec
    store: Store
    program: Callable[[], Program]
    """Loads the program; called at most once."""
    invoke: Callable[[dict[str, Any]], None]
    """Have a role started: publish the event under its key. Once is enough, twice does no harm."""
    remaining_s: Callable[[], float] = lambda: math.inf
    """Seconds until the slot ends, by the newest lease file."""
    stopping: Callable[[], bool] = lambda: False
    """Whether the process was told to leave."""
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    since_start_s: Callable[[], float] = lambda: 0.0
    """Seconds since this process was started, for the start-up figure."""
    poll_s: float = 0.02
    """Longest pause between two looks at the store while waiting."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a role ended. Becomes ``result.json``."""

    state: Literal["done", "continue"]
    """`done`: the stage's result is published. `continue`: more events of this worker follow."""
    round: int
    """Rounds finished, as this role saw it."""
    why: str = ""


def handle(event: TrainEvent, context: Context) -> Outcome:
    """Play the role that the event names.

    Raises JobFailed when the training can't go on (loss not finite, a worker missing for too long, slot too short),
    SpecError for a program or data that does not fit, StaleFence when a newer grant took this worker over.
    """
    rounds = Rounds(spec=context.spec, store=context.store, program=context.program())
    if isinstance(event, Combine):
        rounds.combine(event.round, waited_s=0.0, round_began=rounds.timer())
        return Outcome("continue", event.round + 1, "combined")
    if isinstance(event, Start):
        event = _start(event, context, rounds)
    return _Slot(event, context, rounds).run()


def _start(event: Start, context: Context, rounds: Rounds) -> Work:
    if event.workers > context.spec.shards:
        raise SpecError(f"{event.workers} workers can't share {context.spec.shards} shards; raise shards or lower workers")
    plan = {"workers": event.workers, "shards": context.spec.shards, "seed": context.spec.seed}
    rounds.begin()
    context.store.publish_json(f"plans/{event.generation:04d}.json", plan, durable=True)
    first = max(0, context.store.latest_round())
    for worker in range(1, event.workers):
        work = Work(workerno=worker, workers=event.workers, round=first, generation=event.generation)
        context.invoke(work.to_dict())
    return Work(workerno=0, workers=event.workers, round=first, generation=event.generation)


class _Leave(Exception):
    """The slot is over, or the process was told to leave."""


@dataclass(slots=True)
class _Slot:
    """One slot of one worker."""

    event: Work
    context: Context
    rounds: Rounds
    longest_s: float = 0.0
    """Longest shard so far in this slot."""
    combine_s: float = 0.0
    """Longest combine so far in this slot."""
    advanced: bool = False
    """Whether this worker published a shard, or the run finished a round, in this slot."""
    leave_s: float = LEAVE_S
    claims: Claims = field(init=False)

    def __post_init__(self) -> None:
        self.claims = Claims(self.context.store)

    def run(self) -> Outcome:
        """Work round by round until the result, the end of the slot, or a newer generation."""
        self._record_start()
        round_ = self._current()
        try:
            while True:
                ended = self._ended(round_)
                if ended is not None:
                    return ended
                round_ = self._round(round_)
        except _Leave:
            return self._hand_over(round_)

    def _round(self, round_: int) -> int:
        """Do one round's part; return the number of the next round to work on."""
        began = self.rounds.timer()
        try:
            self.rounds.weights(round_)
            self._shards(round_)
            after = self._finish(round_, began)
        except (CorruptData, FileNotFoundError):
            # Weights torn (now in quarantine) or forgotten: go on from the newest round that the store has.
            self._check_leave(0.0)
            self.context.sleep(self.context.poll_s)
            return self._current()
        self.advanced = True
        return after

    def _shards(self, round_: int) -> None:
        store, spec = self.context.store, self.context.spec
        store.open_round(round_)
        there = store.shards_there(round_)
        for shard in range(self.event.workerno, spec.shards, self.event.workers):
            if shard not in there:
                self._check_leave(self.longest_s * MARGIN)
                self.longest_s = max(self.longest_s, self.rounds.publish_gradient(round_, shard))
                self.advanced = True

    def _finish(self, round_: int, began: float) -> int:
        """Wait until the round is combined, by this worker if it gets the claim; return the next round."""
        context, store = self.context, self.context.store
        waiting_since, pause_s = context.monotonic(), 0.001
        timer_since = self.rounds.timer()
        while store.latest_round() <= round_ and self._ended(round_) is None:
            self._check_leave(self.combine_s * MARGIN)
            missing = set(range(context.spec.shards)) - store.shards_there(round_)
            if not missing and self._claim(round_):
                waited_s = self.rounds.timer() - timer_since
                self.rounds.combine(round_, waited_s=waited_s, round_began=began)
                self.combine_s = max(self.combine_s, self.rounds.timer() - timer_since - waited_s)
                continue
            if missing and context.remaining_s() == math.inf and context.monotonic() - waiting_since > context.spec.wait_s:
                raise Unavailable(self._missing(round_, f"{context.spec.wait_s:g} s"))
            if self._own(missing):
                return round_  # one of our own was torn and put into quarantine: compute it again
            context.sleep(pause_s)
            pause_s = min(pause_s * 1.5, context.poll_s)
        return max(round_, store.latest_round())

    def _claim(self, round_: int) -> bool:
        return self.claims.claim(
            f"combine-{round_:08d}",
            f"worker {self.event.workerno}, generation {self.event.generation}, slot {self.event.slot}",
            now_s=self.context.monotonic(),
            period_s=self.context.spec.claim_period_s,
        )

    def _ended(self, round_: int) -> Outcome | None:
        store = self.context.store
        try:
            result = read_result(store.root)
        except CorruptData:
            store.quarantine("result")  # its weights are computed again from the round before
            result = None
            if store.files.exists(store.root / "weights" / f"{store.latest_round():08d}") and store.latest_round() > 0:
                store.quarantine(f"weights/{store.latest_round():08d}")
        if result is not None:
            return Outcome("done", int(result.meta["rounds"]), str(result.meta["why"]))
        failure = store.read_json("failure.json")
        if failure is not None:
            raise JobFailed(failure["error"])
        if store.latest_generation() > self.event.generation:
            return Outcome("continue", round_, f"superseded by generation {store.latest_generation()}")
        return None

    def _check_leave(self, step_s: float) -> None:
        if self.context.stopping() or self.context.remaining_s() < self.leave_s + step_s:
            raise _Leave

    def _hand_over(self, round_: int) -> Outcome:
        event, spec = self.event, self.context.spec
        idle = 0 if self.advanced else event.idle + 1
        if idle > spec.max_idle_slots:
            error = self._missing(round_, f"{idle} slots")
            if self._own(set(range(spec.shards)) - self.context.store.shards_there(round_)):
                error = (
                    f"in {idle} slots worker {event.workerno} could not finish one of its own shards; "
                    "its slot is too short: raise it, or the CPU share"
                )
            raise JobFailed(f"training stands still in round {round_}: {error}")
        following = Work(
            workerno=event.workerno,
            workers=event.workers,
            round=max(round_, self.context.store.latest_round()),
            slot=event.slot + 1,
            generation=event.generation,
            idle=idle,
        )
        self.context.invoke(following.to_dict())
        return Outcome("continue", following.round, "told to leave" if self.context.stopping() else "slot nearly over")

    def _own(self, shards: set[int]) -> bool:
        return any(shard % self.event.workers == self.event.workerno for shard in shards)

    def _missing(self, round_: int, waited: str) -> str:
        missing = sorted(set(range(self.context.spec.shards)) - self.context.store.shards_there(round_))
        late = sorted({shard % self.event.workers for shard in missing})
        return (
            f"worker {self.event.workerno} waited {waited} in round {round_} for shards {missing} of workers {late}, or for "
            "the combine. Look at those workers' logs; they may have ended or be out of memory."
        )

    def _current(self) -> int:
        latest = self.context.store.latest_round()
        if latest < 0:
            self.rounds.begin()
        return max(0, latest)

    def _record_start(self) -> None:
        event, context = self.event, self.context
        startup_s = context.since_start_s()
        self.leave_s = LEAVE_S + startup_s / 4
        name = f"starts/{event.generation:04d}-{event.workerno:04d}-{event.slot:06d}.json"
        if not context.store.files.exists(context.store.root / name):
            context.store.publish_json(name, {"worker": event.workerno, "startup_s": startup_s})
