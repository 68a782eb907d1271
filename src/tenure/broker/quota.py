"""What runs may occupy on disk: their folders are looked at in a thread; past its bound a run's leases end, it gets none.

One folder is looked at at a time, a run's at most every LOOK_EVERY_S and for a twentieth of the time: the bound is `upper`,
as late as that. Runs that the ledger does not know (leases asked for without a run) have none. Not here: what one attempt may
write (its shim holds that), what goes with age (`retention`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tenure.broker.attempts import Attempts
from tenure.broker.book import Book
from tenure.broker.tenancy import Tenancy
from tenure.errors import Refused
from tenure.leases import EndReason
from tenure.ledger import queries
from tenure.resources import format_bytes, show_bytes
from tenure.runs import RunFiles
from tenure.runtimes import procfs
from tenure.runtimes.acting import Actor, acting_as

LOOK_EVERY_S = 2.0
SHARE = 20
"""A look that took t seconds is followed by SHARE * t without one."""
MAX_ENTRIES = 2_000_000
"""Files looked at; what a run has beyond them is not counted."""


@dataclass(slots=True)
class _Seen:
    bound_bytes: int
    tenant: str = ""
    used_bytes: int = 0
    next_s: float = float("-inf")

    @property
    def is_over(self) -> bool:
        return bool(self.bound_bytes) and self.used_bytes > self.bound_bytes


class Quotas:
    """Holds every run with live leases below what it may occupy."""

    def __init__(self, book: Book, attempts: Attempts, tenancy: Tenancy, *, home: Path) -> None:
        self._book, self._attempts, self._tenancy, self._home = book, attempts, tenancy, home
        self._seen: dict[str, _Seen] = {}
        self._one = asyncio.Lock()

    def tick(self) -> None:
        """Begin to look at what is due, beside."""
        runs = {lease.run_id for lease in self._book.live.values() if lease.holds}
        for run_id in set(self._seen) - runs:
            if not self._seen[run_id].is_over:
                del self._seen[run_id]
        if not self._one.locked():
            due = [(self._run(run_id).next_s, run_id) for run_id in runs]
            next_s, run_id = min(due, default=(float("inf"), ""))
            if self._book.clock.boot_s() >= next_s:
                self._book.spawn(self._look(run_id))

    async def admit(self, run_id: str) -> None:
        """Raise Refused when a run was found to occupy more than it may; it is looked at again first."""
        seen = self._seen.get(run_id)
        if seen is not None and seen.is_over:
            if self._book.clock.boot_s() >= seen.next_s:
                await self._look(run_id)
            if seen.is_over:
                raise Refused(
                    f"run {run_id} gets no lease: {self._found(run_id, seen)}. Remove what it no longer needs there, or start "
                    "it anew with a larger [run] disk."
                )

    def _run(self, run_id: str) -> _Seen:
        if run_id not in self._seen:
            with self._book.ledger.reading() as connection:
                found = queries.list_runs(connection, run_id=run_id)
            bound = found[0].disk_bytes if found else 0
            self._seen[run_id] = _Seen(
                bound_bytes=bound, tenant=found[0].tenant if found else "", next_s=float("-inf") if bound else float("inf")
            )
        return self._seen[run_id]

    async def _look(self, run_id: str) -> None:
        async with self._one:
            seen = self._run(run_id)
            begun_s = self._book.clock.boot_s()
            root = RunFiles(self._home, run_id).root
            seen.used_bytes = await asyncio.to_thread(_use, str(root), self._tenancy.actor_of(seen.tenant))
            took_s = self._book.clock.boot_s() - begun_s
            seen.next_s = self._book.clock.boot_s() + max(LOOK_EVERY_S, SHARE * took_s)
        if seen.is_over:
            for lease in list(self._book.live.values()):
                if lease.run_id == run_id:
                    self._attempts.drain(lease, EndReason.OUT_OF_DISK, self._found(run_id, seen))

    def _found(self, run_id: str, seen: _Seen) -> str:
        return (
            f"the folder of run {run_id} occupies {show_bytes(seen.used_bytes)} ({seen.used_bytes} bytes); "
            f"the run's bound is {format_bytes(seen.bound_bytes)} ([run] disk)"
        )


def _use(folder: str, actor: Actor | None) -> int:
    with acting_as(actor):
        return procfs.disk_use(folder, max_entries=MAX_ENTRIES)
