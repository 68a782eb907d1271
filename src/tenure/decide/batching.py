"""Dynamic batching: which waiting requests run together, when, and which have waited too long. A fold, not a loop.

    add(waiting) ──┐
    drop(waiting) ─┼─► BatchQueue ─► plan(free, now_s) ─► BatchPlan: batches to start now, what expired, when to ask again
    (time passes) ─┘

One queue per model. It owns no clock, timer or process: the caller says what time it is (one monotonic clock for all of
it) and starts what it is told to. Ask once per loop iteration in which something was added, whenever an instance falls
free, and at `look_again_at_s`. A request costs O(1) amortised, plus O(log waiting) for its deadline.

What is promised, each of it a property test:
- A batch holds requests of one kind and one priority, in order of arrival, and at most `max_batch_rows` rows. A request
  with more rows than that runs alone: who wants to refuse it does so before it is added.
- The highest priority (1) goes first, inside a priority the oldest. Starvation is bounded: after `max_overtakes` batches
  in a row that went past an older request of lower priority, the next one belongs to the oldest request of all. So a
  request that need not wait for company, with n older ones, runs within (n + 1) (max_overtakes + 1) batches.
- While an instance is free, a request waits for company at most `max_delay_s`, and not at all when that is half of its
  time or more, or when its batch is full. With `max_delay_s` 0 the free instances share evenly what waits: company is
  worth nothing there, so no instance idles beside a long batch.
- A request whose deadline has come is in `expired` of the next plan, once, and in no batch afterwards.
- At most `max_waiting` requests are held, and memory for as many again that have left (plus a constant).

Weighed and rejected: filling a batch up with lower priorities (the urgent request would pay for their rows), skipping a
request that does not fit into what is left of a batch (a large one could wait for ever), and a plain function of the
whole queue (a thousand waiting requests read again in every loop iteration).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from tenure.errors import SpecError

_SLACK = 64
"""Entries of requests that have left, beyond as many as still wait, before they are cleared out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """Bounds of one model's batches."""

    max_batch_rows: int = 1
    max_delay_s: float = 0.0
    """How long a request may wait for company while an instance is free."""
    max_waiting: int = 1024
    max_overtakes: int = 8
    """Batches in a row that may go past an older request of lower priority; 0: arrival alone counts."""

    def __post_init__(self) -> None:
        if self.max_batch_rows < 1 or not 0 <= self.max_delay_s < math.inf or self.max_waiting < 1 or self.max_overtakes < 0:
            raise SpecError(
                "batching needs max_batch_rows >= 1, max_delay_s >= 0, max_waiting >= 1 and max_overtakes >= 0; found "
                f"{self.max_batch_rows}, {self.max_delay_s}, {self.max_waiting}, {self.max_overtakes}"
            )


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in a queue."""

    request: Any
    """The caller's own."""
    arrived_at_s: float
    """Not before that of a request added earlier."""
    deadline_s: float = math.inf
    rows: int = 1
    """>= 1; or any other cost that adds up."""
    kind: Hashable = None
    """Equal within a batch: shapes past the first dimension, outputs wanted. A fresh object() runs alone."""
    priority: int = 1
    """1 is the highest. A caller keeps the number of different ones small."""
    queued: bool = field(default=False, init=False)
    """The queue's own: added, and neither planned nor dropped."""
    hurried: bool = field(default=False, init=False)
    """The queue's own: has no time to wait for company."""
    number: int = field(default=0, init=False)
    """The queue's own: order of arrival."""


@dataclass(slots=True)
class BatchPlan:
    """What to do now. All of it has left the queue."""

    batches: list[list[Waiting]]
    """One for each free instance that gets work, to be started in this order."""
    expired: list[Waiting]
    look_again_at_s: float
    """When a plan may be different without anything else happening; math.inf: never."""


class _Group:
    """Requests of one kind and priority, oldest first; some may have left."""

    __slots__ = ("entries", "hurried", "kind", "ready", "rows")

    def __init__(self, kind: Hashable) -> None:
        self.kind = kind
        self.entries: deque[Waiting] = deque()
        self.rows = 0
        self.hurried = 0
        self.ready = False  # is in its level's `ready`


class _Level:
    """Requests of one priority."""

    __slots__ = ("groups", "order", "ready")

    def __init__(self) -> None:
        self.groups: dict[Hashable, _Group] = {}  # with waiting requests, and emptied ones that are still in `order`
        self.order: list[tuple[int, _Group]] = []  # heap by a group's oldest number, or an older one: set right on top
        self.ready: deque[_Group] = deque()  # groups that need not wait for company, and some that have changed since

    def oldest(self) -> Waiting | None:
        """Return the oldest request, after putting its group on top of `order`."""
        order = self.order
        while order:
            number, group = order[0]
            entries = group.entries
            while entries and not entries[0].queued:
                entries.popleft()
            if not entries:
                heapq.heappop(order)
                del self.groups[group.kind]
            elif entries[0].number == number:
                return entries[0]
            else:
                heapq.heapreplace(order, (entries[0].number, group))
        return None


class BatchQueue:
    """The waiting requests of one model."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self.rows = 0
        """Rows waiting."""
        self._count = 0
        self._number = 0
        self._levels: dict[int, _Level] = {}
        self._deadlines: list[tuple[float, int, Waiting]] = []
        self._left = 0  # upper bound of what has left and may still be held in groups
        self._overtakes = 0

    def __len__(self) -> int:
        return self._count

    def add(self, waiting: Waiting) -> bool:
        """Queue a request; False (and nothing is held) when `max_waiting` wait already."""
        policy = self.policy
        if self._count >= policy.max_waiting:
            return False
        level = self._levels.get(waiting.priority)
        if level is None:
            level = self._levels[waiting.priority] = _Level()
        self._number = waiting.number = self._number + 1
        group = level.groups.get(waiting.kind)
        if group is None:
            group = level.groups[waiting.kind] = _Group(waiting.kind)
            heapq.heappush(level.order, (waiting.number, group))
        if waiting.deadline_s != math.inf:
            heapq.heappush(self._deadlines, (waiting.deadline_s, waiting.number, waiting))
            if waiting.deadline_s - waiting.arrived_at_s <= 2 * policy.max_delay_s:
                waiting.hurried = True
                group.hurried += 1
        waiting.queued = True
        group.entries.append(waiting)
        group.rows += waiting.rows
        self.rows += waiting.rows
        self._count += 1
        self._line_up(level, group)
        return True

    def drop(self, waiting: Waiting) -> bool:
        """Forget a request that nobody waits for any more; False when it has left the queue already."""
        if not waiting.queued:
            return False
        self._leave(waiting, self._levels[waiting.priority].groups[waiting.kind])
        self._left += 1
        self._clear_out_if_worth_it()
        return True

    def plan(self, free: int, now_s: float) -> BatchPlan:
        """Return what to start on `free` instances (or places in front of them), and what has expired by `now_s`."""
        expired: list[Waiting] = []
        self._expire(now_s, expired)
        batches: list[list[Waiting]] = []
        while free > 0 and self._count:
            batch = self._next_batch(free, now_s)
            if not batch:
                break
            batches.append(batch)
            free -= 1
        self._expire(now_s, expired)  # none, but deadlines of what has just left are not looked at again
        self._clear_out_if_worth_it()
        again_s = self._deadlines[0][0] if self._deadlines else math.inf
        if free > 0 and self._count:
            heads = [head for level in self._levels.values() if (head := level.oldest()) is not None]
            again_s = min(again_s, min(head.arrived_at_s for head in heads) + self.policy.max_delay_s)
        return BatchPlan(batches, expired, again_s)

    def _next_batch(self, free: int, now_s: float) -> list[Waiting]:
        """Take the batch whose turn it is, or none when all that wait may still wait for company."""
        turns = [(priority, level, head) for priority, level in self._levels.items() if (head := level.oldest()) is not None]
        if len(turns) > 1:
            overtaken = self._overtakes >= self.policy.max_overtakes
            turns.sort(key=lambda turn: turn[2].number if overtaken else turn[0])
        for priority, level, head in turns:
            group = self._runnable(level, head, now_s)
            if group is not None:
                batch = self._take(level, group, free)
                number = batch[0].number
                passed = len(turns) > 1 and any(lower > priority and old.number < number for lower, _, old in turns)
                self._overtakes = self._overtakes + 1 if passed else 0
                return batch
        return []

    def _runnable(self, level: _Level, head: Waiting, now_s: float) -> _Group | None:
        """Return the group to run now: the oldest if it has waited long enough, else one that need not wait."""
        if head.arrived_at_s + self.policy.max_delay_s <= now_s:
            return level.order[0][1]
        while level.ready:
            group = level.ready[0]
            if group.hurried or group.rows >= self.policy.max_batch_rows:
                return group
            level.ready.popleft().ready = False
        return None

    def _take(self, level: _Level, group: _Group, free: int) -> list[Waiting]:
        room = self.policy.max_batch_rows
        if free > 1 and self.policy.max_delay_s == 0:
            room = min(room, -(-self.rows // free))
        batch: list[Waiting] = []
        entries = group.entries
        while entries:
            waiting = entries[0]
            if waiting.queued:
                if batch and waiting.rows > room:
                    break
                room -= waiting.rows
                batch.append(waiting)
                self._leave(waiting, group)
            entries.popleft()
        if not entries:
            self._left += 1  # the group itself
        if level.ready and level.ready[0] is group:
            level.ready.popleft().ready = False
            self._line_up(level, group)
        return batch

    def _line_up(self, level: _Level, group: _Group) -> None:
        if not group.ready and self.policy.max_delay_s and (group.hurried or group.rows >= self.policy.max_batch_rows):
            group.ready = True
            level.ready.append(group)

    def _leave(self, waiting: Waiting, group: _Group) -> None:
        waiting.queued = False
        group.rows -= waiting.rows
        group.hurried -= waiting.hurried
        self.rows -= waiting.rows
        self._count -= 1

    def _expire(self, now_s: float, expired: list[Waiting]) -> None:
        deadlines = self._deadlines
        while deadlines and (deadlines[0][0] <= now_s or not deadlines[0][2].queued):
            waiting = heapq.heappop(deadlines)[2]
            if waiting.queued:
                self._leave(waiting, self._levels[waiting.priority].groups[waiting.kind])
                self._left += 1
                expired.append(waiting)

    def _clear_out_if_worth_it(self) -> None:
        """Forget what has left, everywhere, once that is most of what is held: O(1) amortised."""
        most = self._count + _SLACK
        if self._left <= most and len(self._deadlines) <= self._count + most:
            return
        self._left = 0
        self._deadlines = [item for item in self._deadlines if item[2].queued]
        heapq.heapify(self._deadlines)
        for priority, level in list(self._levels.items()):
            for group in list(level.groups.values()):
                group.entries = deque(waiting for waiting in group.entries if waiting.queued)
                if not group.entries:
                    del level.groups[group.kind]
            level.order = [item for item in level.order if item[1].entries]
            heapq.heapify(level.order)
            level.ready = deque(group for group in level.ready if group.entries)
            if not level.groups:
                del self._levels[priority]
