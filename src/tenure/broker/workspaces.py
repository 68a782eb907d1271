"""Runs of workspaces: each ends with its lease, since nobody who asked for it stays to say so.

A run of a job file is ended by the command that runs it; a workspace's holder has gone. Not here: the lease itself.
"""

from __future__ import annotations

from tenure.broker.book import Book
from tenure.leases import EndReason, Lease, LeaseState
from tenure.ledger import queries
from tenure.runs import FINAL_RUN_STATES, Run, RunState, Stage

MAX_RUNS = 10_000
"""Newest runs under way looked through at a broker's start for workspaces whose lease ended while no broker was there."""
_STATES = {
    EndReason.COMPLETED: RunState.DONE,
    EndReason.RELEASED: RunState.DONE,
    EndReason.EXPIRED: RunState.DONE,
    EndReason.OUT_OF_TIME: RunState.DONE,
    EndReason.RECLAIMED_IDLE: RunState.DONE,
    EndReason.CANCELLED: RunState.CANCELLED,
    EndReason.PREEMPTED: RunState.CANCELLED,
}
"""Ends that are no failure of what ran: a workspace is open until it is given back or its time is over."""


class Workspaces:
    """Writes the end of a workspace's run once its lease has ended."""

    def __init__(self, book: Book) -> None:
        self._book, self._reloads = book, -1
        self._open: set[str] = set()

    def tick(self) -> None:
        """Close what is over."""
        if self._reloads != self._book.reloads:
            self._reloads = self._book.reloads
            self._open = self._left_open()
        live = {lease.run_id for lease in self._book.live.values() if _is_workspace(lease)}
        for run_id in self._open - live:
            self._close(run_id)
        self._open = live

    def _left_open(self) -> set[str]:
        with self._book.ledger.reading() as connection:
            runs = queries.list_runs(connection, state=RunState.RUNNING, max_runs=MAX_RUNS)
        return {run.id for run in runs if _workspace_of(run) is not None}

    def _close(self, run_id: str) -> None:
        with self._book.transaction() as tx:
            found = queries.list_runs(tx.connection, run_id=run_id)
            stage = _workspace_of(found[0]) if found else None
            if stage is None or found[0].state in FINAL_RUN_STATES:
                return
            leases = queries.gang_leases(tx.connection, run_id)
            if not leases:
                return  # it was recorded, and its lease is about to be asked for; or its client died in between
            last = leases[-1]
            if last.state is not LeaseState.ENDED or last.end_reason is None:
                return
            state = _STATES.get(last.end_reason, RunState.FAILED)
            detail = f"its lease ended {last.end_reason}: {last.end_detail}"
            tx.put_stage(run_id, Stage(name=stage.name, kind="workspace", state=state, attempts=1, detail=detail), who="broker")
            tx.put_run_state(run_id, state, who="broker", why=detail)


def _is_workspace(lease: Lease) -> bool:
    return lease.gang_id == lease.run_id


def _workspace_of(run: Run) -> Stage | None:
    """Return the stage of a run that is nothing but a workspace."""
    return run.stages[0] if len(run.stages) == 1 and run.stages[0].kind == "workspace" else None
