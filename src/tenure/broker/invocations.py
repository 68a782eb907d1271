"""Events of a stage's store start the commands of its leases: looking for them, choosing, recording what was started.

An event is opaque but for ``worker``: the gang member to start. Its file name is its key: it is finished once. One attempt
per member at a time, events in order of publishing. When a gang is over, what it left unstarted is over too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from tenure.broker.attempts import Attempts
from tenure.broker.book import LOG, Book
from tenure.broker.tenancy import Tenancy
from tenure.errors import Refused
from tenure.leases import Lease, LeaseState, renewed
from tenure.ledger import queries
from tenure.ledger.queries import Invocation
from tenure.runs import RunFiles
from tenure.runtimes.acting import acting_as, open_regular

SCAN_EVERY_S = 1.0
EAGER_S = 3.0
"""How long every tick looks after a start: a role that has just begun is the likeliest to call others."""
MAX_EVENT_BYTES = 1 << 20
MAX_EVENTS = 20_000
"""Of a stage; those beyond are not seen."""
MAX_BAD_READS = 10
"""Looks at a file that is no event yet, after which it never will be."""

Stage = tuple[str, str]
"""(run id, stage name)"""


@dataclass(slots=True)
class _Found:
    order: tuple[int, str]
    worker: int
    path: str


class _Events:
    """What is known of one stage's events."""

    def __init__(self, folder: Path, tenant: str, made: tuple[Invocation, ...]) -> None:
        self.folder, self.tenant = folder, tenant
        self.made = {invocation.name: invocation for invocation in made}
        self.found: dict[str, _Found] = {}
        self.bad: dict[str, int] = {}

    def scan(self) -> None:
        """Read what is new. A file that is not (yet) an event is looked at again, MAX_BAD_READS times."""
        try:
            with os.scandir(self.folder) as listed:
                entries = list(islice(listed, MAX_EVENTS))
        except FileNotFoundError:
            return
        for entry in entries:
            name = entry.name
            if name.startswith(".") or not name.endswith(".json") or name in self.found:
                continue
            if self.bad.get(name, 0) >= MAX_BAD_READS:
                continue
            try:
                with os.fdopen(open_regular(entry.path, os.O_RDONLY), "rb") as stream:
                    status = os.fstat(stream.fileno())
                    worker = json.loads(stream.read(MAX_EVENT_BYTES))["worker"]
                if isinstance(worker, bool) or not isinstance(worker, int):
                    raise ValueError(f"worker must be a whole number; found {worker!r}")
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, OSError) as error:
                self.bad[name] = self.bad.get(name, 0) + 1
                if self.bad[name] == MAX_BAD_READS:
                    LOG.warning("%s is not an event and is left alone: %s", entry.path, error)
                continue
            self.found[name] = _Found(order=(status.st_mtime_ns, name), worker=worker, path=entry.path)

    def next_for(self, lease: Lease) -> _Found | None:
        """Return the oldest event of this worker that has not been finished."""
        open_ = (
            found for name, found in self.found.items()
            if found.worker == lease.worker and not ((made := self.made.get(name.removesuffix(".json"))) and made.done)
        )  # fmt: skip
        return min(open_, key=lambda found: found.order, default=None)


class Invocations:
    """Starts event-driven leases."""

    def __init__(self, book: Book, attempts: Attempts, tenancy: Tenancy, *, home: Path) -> None:
        self._book, self._attempts, self._tenancy, self._home = book, attempts, tenancy, home
        self._stages: dict[Stage, _Events] = {}
        self._reloads = 0
        self._scanned_s = self._eager_until_s = float("-inf")

    def tick(self, *, now: bool = False) -> None:
        """Look into every live stage's events, at most once a second unless `now`, and start what is due."""
        boot_s = self._book.clock.boot_s()
        if self._reloads != self._book.reloads:
            self._reloads = self._book.reloads
            self._stages.clear()
        # A member that has just left may have published its successor: look at once rather than within a second.
        soon = bool(self._book.invocations) or boot_s < self._eager_until_s
        scan = now or soon or boot_s - self._scanned_s >= SCAN_EVERY_S
        if scan:
            self._scanned_s = boot_s
        driven = [lease for lease in self._book.live.values() if lease.command.on_event]
        stages = {(lease.run_id, lease.stage): lease.tenant for lease in driven}
        while self._book.invocations:
            run_id, name, made = self._book.invocations.pop()
            if (run_id, name) in self._stages:
                self._stages[run_id, name].made[made.name] = made
        for stage in {*stages, *self._stages}:
            events = self._events(stage, stages.get(stage, ""))
            if scan or stage not in stages:
                self._scan(events)
            if stage not in stages:
                self._close(stage, events)
        for lease in driven:
            # Decided on the lease as it now is: an earlier start in this loop may have changed others of its gang.
            self._go_on(self._book.live.get(lease.id))

    def _events(self, stage: Stage, tenant: str) -> _Events:
        if stage not in self._stages:
            with self._book.ledger.reading() as connection:
                made = queries.list_invocations(connection, *stage)
            self._stages[stage] = _Events(RunFiles(self._home, stage[0]).store(stage[1]) / "events", tenant, made)
        return self._stages[stage]

    def _scan(self, events: _Events) -> None:
        """Read what is new, in a tenant's own folder with its rights alone; of one who is no more nothing is read."""
        try:
            with acting_as(self._tenancy.actor_of(events.tenant)):
                events.scan()
        except Refused as error:
            LOG.warning("%s is not looked into: %s", events.folder, error)

    def _close(self, stage: Stage, events: _Events) -> None:
        """Mark what an ended gang left as finished: the next gang of this stage begins with events of its own."""
        with self._book.transaction() as tx:
            for name in {name.removesuffix(".json") for name in events.found} | set(events.made):
                made = events.made.get(name) or Invocation(
                    name=name,
                    worker=events.found[f"{name}.json"].worker,
                    lease_id="",
                    attempt=0,
                    starts=0,
                    failures=0,
                    done=False,
                )
                if not made.done:
                    queries.put_invocation(tx.connection, *stage, replace(made, done=True), now_s=tx.now_s)
        del self._stages[stage]

    def _go_on(self, lease: Lease | None) -> None:
        if lease is None or lease.state is not LeaseState.ACTIVE or lease.id in self._book.busy:
            return
        if not self._attempts.nodes.is_up(lease.node):
            return
        events = self._stages[(lease.run_id, lease.stage)]
        found = events.next_for(lease)
        now_s = self._book.clock.utc_s()
        if found is None or now_s >= lease.total_ends_at_s:
            return
        name = found.order[1].removesuffix(".json")
        with self._book.transaction() as tx:
            attempt = self._attempts.next_attempt(tx, lease)
            before = events.made.get(name)
            made = Invocation(
                name=name,
                worker=lease.worker,
                lease_id=lease.id,
                attempt=attempt,
                starts=(before.starts if before else 0) + 1,
                failures=before.failures if before and before.lease_id == lease.id else 0,
                done=False,
            )
            queries.put_invocation(tx.connection, lease.run_id, lease.stage, made, now_s=now_s)
            lease = renewed(replace(lease, attempt=attempt, ends_at_s=now_s), for_s=lease.envelope.slot_s, now_s=now_s)
            data = {"event": name, "attempt": attempt, "start": made.starts}
            tx.put_lease(lease, kind="invoked", who="broker", why=f"event {name}", data=data)
        events.made[name] = made
        self._eager_until_s = self._book.clock.boot_s() + EAGER_S
        self._attempts.order(lease.id, found.path)
