"""A training gang told while it trains: one line of figures, and a sentence for each thing that happens to it.

    store's progress ┐
    broker's leases  ┴─► Following.line, Following.news, told_end

The sentences say who died, why, what was lost and what happens next: silence and wrong guesses cost people more hours than slow
training does. Snapshots and the time come in as arguments. Not for: how it is shown (`cli.display`), nor for slots that are
renewed, which are the rule (`tenure events` has them).
"""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tenure.leases import EndReason, Lease, LeaseState
from tenure.prices import PriceVector
from tenure.protocols import Exit, ExitKind
from tenure.resources import Envelope, show_bytes
from tenure.train.progress import TrainProgress
from tenure.train.spec import EXIT_FULL
from tenure.wire import LeaseView

WINDOW_S = 30.0
"""The pace that the time left is estimated by is that of so many last seconds."""
QUIET_S = 30.0
"""Without a round for so long, and for ten usual rounds, a gang is told to be quiet; again when it has lasted twice as long."""


@dataclass(slots=True, kw_only=True)
class Following:
    """One gang, from its grant on. Every method takes snapshots; `news` tells each thing once."""

    envelope: Envelope
    """Of each worker."""
    prices: PriceVector
    rounds: int
    """After which training ends: known, expected, or the most there may be."""
    rounds_are: str = "of"
    """`of`: known. `of about`: expected. `of at most`: a goal may end it sooner."""
    _exits: dict[str, int] = field(default_factory=dict)
    _torn: set[str] = field(default_factory=set)
    _waits: bool = False
    _new: str = ""
    _round: int | None = None
    """Newest round seen."""
    _pace: deque[tuple[float, int]] = field(default_factory=deque)
    """When which round was first seen, those of the last WINDOW_S."""
    _quiet_since_s: float = 0.0
    _told_quiet_s: float = QUIET_S

    def line(self, progress: TrainProgress, views: Sequence[LeaseView], now_s: float) -> str:
        """Return the figures. now_s: UTC seconds by the broker's clock, as the leases' times are."""
        began = [view.lease.starts_at_s for view in views if view.lease.starts_at_s]
        if not began:
            return f"waiting for room for {len(views)} × [{self.envelope.describe()}]"
        parts = [f"round {progress.round} {self.rounds_are} {self.rounds}"]
        parts += [f"loss {progress.loss:.4g}"] if progress.loss is not None else []
        parts += [f"accuracy {progress.accuracy:.2%}"] if progress.accuracy is not None else []
        parts.append(f"{sum(map(_works, views))} of {len(views)} workers")
        usages = [usage for view in views for usage in (view.usage, *(end.usage for end in view.exits)) if usage]
        peak = max((usage.peak_memory_bytes for usage in usages), default=0)
        parts += [f"peak {show_bytes(peak)} of {show_bytes(self.envelope.memory_bytes)}"] if peak else []
        parts.append(show_time(max(0.0, now_s - min(began))))
        left_s = self.left_s(progress.round)
        parts += [f"{'at most' if self.rounds_are == 'of at most' else 'about'} {show_time(left_s)} left"] if left_s else []
        parts.append(f"${sum(self._cost_usd(view.lease, now_s) for view in views):.6f}")
        return ", ".join(parts)

    def done(self, progress: TrainProgress) -> float | None:
        """Return the share finished, None where only the most rounds are known."""
        return None if self.rounds_are == "of at most" else min(1.0, progress.round / self.rounds)

    def left_s(self, round_: int) -> float | None:
        """Return the seconds that the rounds left take at the present pace, None before there is one."""
        if len(self._pace) < 2 or round_ >= self.rounds:
            return None
        (from_s, from_round), (to_s, to_round) = self._pace[0], self._pace[-1]
        return (self.rounds - round_) * (to_s - from_s) / (to_round - from_round)

    def news(
        self, progress: TrainProgress, views: Sequence[LeaseView], now_s: float, *, torn: Sequence[str] = (), new: str = ""
    ) -> list[str]:
        """Return one sentence for each thing that happened since the last look.

        torn: names in the store's quarantine. new: what is new in this generation's plan, as far as it is published.
        """
        told = self._waiting(views)
        if new and not self._new:
            told.append(f"the run goes on with {new}: its weights will not be those of a run that had it from the start")
        self._new = self._new or new
        for view in views:
            told += self._deaths(view)
        for name in sorted(set(torn) - self._torn):
            told.append(
                f"{name} in the store was not what was written (torn or rotten): it is kept in quarantine/ and made again. "
                "If it happens again, look at the disk."
            )
        self._torn.update(torn)
        return told + self._quiet(progress, views, now_s)

    def _waiting(self, views: Sequence[LeaseView]) -> list[str]:
        queued = any(view.lease.state in (LeaseState.REQUESTED, LeaseState.QUEUED) for view in views)
        before, self._waits = self._waits, queued
        return ["there is no room for the gang yet: it waits in the queue"] if queued and not before else []

    def _deaths(self, view: LeaseView) -> list[str]:
        lease, told = view.lease, []
        for exit_ in view.exits[self._exits.get(lease.id, 0) :]:
            if not _went_well(exit_) and not lease.ended_at_s and lease.state is not LeaseState.DRAINING:
                told.append(
                    f"worker {lease.worker} {told_exit(exit_, lease.envelope)}. What it had not published is computed again; "
                    "it is started again."
                )
        self._exits[lease.id] = len(view.exits)
        return told

    def _quiet(self, progress: TrainProgress, views: Sequence[LeaseView], now_s: float) -> list[str]:
        """Keep the pace, and tell when rounds stop coming."""
        if self._round is None or progress.round > self._round:
            if self._round is not None:  # the first round seen tells nothing: starting came before it
                self._pace.append((now_s, progress.round))
            while len(self._pace) > 2 and self._pace[-1][0] - self._pace[1][0] >= WINDOW_S:
                self._pace.popleft()
            self._round = progress.round
            self._quiet_since_s, self._told_quiet_s = now_s, QUIET_S
            return []
        if not any(view.lease.holds for view in views):
            self._quiet_since_s = now_s
        quiet_s = now_s - self._quiet_since_s
        usual_s = sorted(progress.round_s)[len(progress.round_s) // 2] if progress.round_s else 0.0
        if quiet_s < max(self._told_quiet_s, 10 * usual_s):
            return []
        self._told_quiet_s = 2 * quiet_s
        idle = [str(view.lease.worker) for view in views if not _works(view)]
        usual = f" (usual: {usual_s:.3g} s)" if usual_s else ""
        return [
            f"no round has ended for {show_time(quiet_s)}{usual}; "
            + (f"nothing runs for worker {', '.join(idle)}. " if idle else "every worker runs. ")
            + '"tenure leases" names the leases, "tenure logs LEASE" shows what one writes.'
        ]

    def _cost_usd(self, lease: Lease, now_s: float) -> float:
        held_s = lease.held_s or (max(0.0, now_s - lease.starts_at_s) if lease.starts_at_s else 0.0)
        return self.prices.cost_usd(lease.envelope, held_s)


def told_exit(end: Exit, envelope: Envelope) -> str:
    """Return how an attempt ended, to stand behind its worker's name: the cause, its witness, what to do about it."""
    said = str((end.result or {}).get("error") or "")
    last = said or next((line.strip() for line in reversed(end.log_tail.splitlines()) if line.strip()), "")
    if end.kind is ExitKind.OUT_OF_MEMORY:
        peak = f", its peak {show_bytes(end.usage.peak_memory_bytes)}" if end.usage else ""
        return f"was out of memory: its bound is {show_bytes(envelope.memory_bytes)}{peak} ({end.witness})"
    if end.kind is ExitKind.SIGNALLED:
        return f"was killed by signal {end.signal} ({_signal_name(end.signal)}), which Tenure did not send"
    if end.kind is ExitKind.OUT_OF_TIME:
        return f"was killed at the end of its slot ({end.witness})"
    if end.kind is ExitKind.OUT_OF_DISK:
        return f"wrote more than its bound of {show_bytes(envelope.disk_bytes)} ({end.witness})"
    if end.kind is ExitKind.STOPPED:
        return f"was stopped ({end.witness})"
    if end.kind is ExitKind.COMPLETED:
        return "ended with exit 0 but without the result.json that it owes"
    if end.code == EXIT_FULL:
        return "could write nothing: the disk of the run's folder is full"
    return f"failed with code {end.code}: {last[:500] or end.witness}" if end.code else f"failed: {end.witness}"


def told_end(stage: str, views: Sequence[LeaseView]) -> tuple[str, str] | None:
    """Return why a gang failed, what to do and the worker's last output, and the lease's end reason; None if it did not fail.

    The first to end is the one that failed: the others of its gang ended because of it.
    """
    for view in sorted(views, key=lambda view: view.lease.ended_at_s):
        lease = view.lease
        if lease.end_reason is EndReason.COMPLETED:
            continue
        text = f"stage {stage}: worker {lease.worker} ended {lease.end_reason}: {lease.end_detail}"
        last = view.exits[-1] if view.exits else None
        if advice := _advice(lease, last):
            text += f"\n{advice}"
        return f"{text}\n{last.log_tail if last else ''}".rstrip(), str(lease.end_reason)
    return None


def _advice(lease: Lease, last: Exit | None) -> str:
    envelope, words = lease.envelope, f"{lease.end_detail}\n{last.log_tail if last else ''}"
    if lease.end_reason is EndReason.OUT_OF_MEMORY:
        return (
            f"Each worker may hold {show_bytes(envelope.memory_bytes)}. Raise the envelope's memory in the job file and go on "
            "with it (tenure train FILE --resume RUN); or begin anew with more shards or a smaller batch, which take less."
        )
    if lease.end_reason is EndReason.OUT_OF_TIME and lease.end_detail.startswith("failed"):
        return (
            f"Its slot of {show_time(envelope.slot_s)} is over before a step is done. Raise the envelope's slot in the job "
            "file and go on with it (tenure train FILE --resume RUN); or begin anew with smaller steps: more shards, or a "
            "smaller batch."
        )
    if lease.end_reason is EndReason.OUT_OF_TIME:
        return (
            f"Rounds that were finished are kept: resume the run, and it gets its total of {show_time(envelope.total_s)} once "
            "more. Raise the envelope's total for the next one."
        )
    if lease.end_reason is EndReason.OUT_OF_DISK:
        return (
            f"Each attempt may write {show_bytes(envelope.disk_bytes)} in its worker folder. Raise the envelope's disk in the "
            "job file and go on with it (tenure train FILE --resume RUN)."
        )
    full = last is not None and last.code == EXIT_FULL
    if full or "No space left on device" in words or "Disk quota exceeded" in words:
        return "The disk of the run's folder is full; nothing half-written stays. Free space, then resume the run."
    if last is not None and last.kind is ExitKind.SIGNALLED:
        return (
            f"No bound of the lease was reached: {_signal_name(last.signal)} came from outside. Look for a machine out of "
            "memory as a whole (dmesg), or ask who sent it; then resume the run."
        )
    return ""


def show_time(seconds: float) -> str:
    """Return a time rounded for people: ``8.2 s``, ``3 min 20 s``, ``2 h 5 min``. Does not parse back."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _works(view: LeaseView) -> bool:
    """Whether something runs in the lease, as far as is known: the last sample has a process, or there is none yet."""
    active = view.lease.state in (LeaseState.ACTIVE, LeaseState.RESIZING)
    return active and (view.usage is None or view.usage.processes > 0)


def _went_well(end: Exit) -> bool:
    return (end.result or {}).get("state") in ("done", "continue")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
