"""What a lease becomes when an attempt of it has ended, and how that end is told.

Not here: writing it down and ordering what follows (`tenure.broker`), how an exit is found (`tenure.runtimes`).
"""

from __future__ import annotations

from typing import Any

from tenure.leases import EndReason, Lease, LeaseState
from tenure.protocols import MACHINE_RESTARTED, Exit, ExitKind
from tenure.resources import show_bytes

MAX_FAILURES = 3
"""Abnormal ends of one event under one lease, after which its gang fails."""
_REASONS = {
    ExitKind.COMPLETED: EndReason.COMPLETED,
    ExitKind.OUT_OF_MEMORY: EndReason.OUT_OF_MEMORY,
    ExitKind.OUT_OF_TIME: EndReason.OUT_OF_TIME,
    ExitKind.OUT_OF_DISK: EndReason.OUT_OF_DISK,
}


def reason_after(lease: Lease, end: Exit, *, failures: int, now_s: float) -> tuple[EndReason | None, str]:
    """Return the end reason and detail, or None when the lease goes on waiting for events.

    failures: abnormal ends of the event that the attempt was invoked by, this one included. now_s: UTC.
    """
    normal, why = is_normal(lease, end), describe_exit(end)
    if lease.state is LeaseState.DRAINING:
        return lease.end_reason or EndReason.RELEASED, lease.end_detail or why
    if lease.command.on_event:
        if normal:
            return (EndReason.COMPLETED, why) if (end.result or {}).get("state") == "done" else (None, "")
        if now_s >= lease.total_ends_at_s:
            return EndReason.OUT_OF_TIME, f"its total of {lease.envelope.total_s:g} s is spent; {why}"
        if failures < MAX_FAILURES:
            return None, ""
        if end.kind is ExitKind.COMPLETED:
            why = f"{why}; exit 0, but no result.json with state done or continue"
            return EndReason.FAILED, f"failed {failures} times on the same event, last: {why}"
        return _REASONS.get(end.kind, EndReason.FAILED), f"failed {failures} times on the same event, last: {why}"
    if normal:
        return EndReason.COMPLETED, why
    if end.kind is ExitKind.OUT_OF_TIME and lease.end_reason is EndReason.PREEMPTED:
        return EndReason.PREEMPTED, lease.end_detail
    if end.kind is ExitKind.OUT_OF_TIME and lease.ends_at_s < lease.total_ends_at_s - 1e-3:
        return EndReason.EXPIRED, f"{why}; the slot was over and nobody had renewed it"
    if end.kind is ExitKind.STOPPED and end.witness.startswith(MACHINE_RESTARTED):
        return EndReason.NODE_LOST, why
    if end.kind is ExitKind.STOPPED:
        return EndReason.NODE_LOST, f"stopped by its node, which had not heard of the broker; {why}"
    if end.kind is ExitKind.COMPLETED:
        return EndReason.FAILED, f"{why}; exit 0, but no result.json with state done or continue"
    return _REASONS.get(end.kind, EndReason.FAILED), why


def is_normal(lease: Lease, end: Exit) -> bool:
    """Return whether an attempt ended as it was meant to: what an event invokes says so itself, also when it was ended."""
    said = (end.result or {}).get("state")
    if lease.command.on_event and said in ("done", "continue"):
        return end.kind in (ExitKind.COMPLETED, ExitKind.STOPPED, ExitKind.OUT_OF_TIME)
    needs_result = lease.command.expects_result
    return end.kind is ExitKind.COMPLETED and (not needs_result or said in ("done", "continue"))


def describe_exit(end: Exit) -> str:
    """Return one line for people on how an attempt ended: kind, code, witness, peak memory, its last words."""
    parts: list[str] = [str(end.kind)]
    if end.kind is ExitKind.FAILED and end.code:
        parts[0] += f" with code {end.code}"
    if end.signal:
        parts[0] += f" by signal {end.signal}"
    if end.witness:
        parts.append(end.witness)
    if end.usage is not None:
        parts.append(f"peak memory {show_bytes(end.usage.peak_memory_bytes)}")
    said: Any = (end.result or {}).get("error")
    if end.kind is not ExitKind.COMPLETED and (said or end.log_tail.strip()):
        last = str(said or end.log_tail.strip().splitlines()[-1])
        parts.append(f"last words: {last[:300]}")
    return "; ".join(parts)
