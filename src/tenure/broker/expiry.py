"""Warnings before a lease ends: an event, a line in its log, and ``notice.json`` in its worker folder.

A holder is told 15, 5 and 1 minutes before its slot ends, as far as these are less than half of the slot. A lease that waits
for events is not told: its workers go by the deadline in their lease file. After a broker's death the last warning may come
twice.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tenure.broker.book import LOG, Book
from tenure.broker.tenancy import Tenancy
from tenure.errors import TenureError
from tenure.leases import Lease, LeaseState
from tenure.resources import format_duration
from tenure.runs import RunFiles
from tenure.runtimes.acting import acting_as, open_regular

WARN_S = (60.0, 300.0, 900.0)
"""Seconds before the end."""
SLOT_SHARE = 0.5
"""Only warnings that come later in a slot than this part of it."""


class Expiry:
    """Tells holders that their lease is about to end."""

    def __init__(self, book: Book, tenancy: Tenancy, *, home: Path) -> None:
        self._book, self._tenancy, self._home = book, tenancy, home
        self._told: dict[str, tuple[float, float]] = {}
        """Lease -> (slot end, seconds before it) of the last warning."""

    def tick(self) -> None:
        """Tell whom it is time to tell."""
        now_s = self._book.clock.utc_s()
        for gone in self._told.keys() - self._book.live.keys():
            del self._told[gone]
        for lease in list(self._book.live.values()):
            if lease.state is not LeaseState.ACTIVE or lease.command.on_event:
                continue
            left_s = lease.ends_at_s - now_s
            due = [before_s for before_s in WARN_S if left_s <= before_s < SLOT_SHARE * lease.envelope.slot_s]
            if left_s <= 0 or not due or self._told.get(lease.id) == (lease.ends_at_s, due[0]):
                continue
            self._told[lease.id] = (lease.ends_at_s, due[0])
            self._tell(lease, left_s)

    def _tell(self, lease: Lease, left_s: float) -> None:
        spent = lease.ends_at_s >= lease.total_ends_at_s - 1e-3
        ends = datetime.fromtimestamp(lease.ends_at_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
        remedy = "its total time is spent then; save what is needed" if spent else f"tenure renew {lease.id} --for 2h"
        if lease.end_reason is not None:
            remedy = f"it gives way then ({lease.end_detail}); save what is needed"
        text = f"ends in {format_duration(max(1, round(left_s)))}, at {ends} UTC, unless it is renewed: {remedy}"
        if spent or lease.end_reason is not None:
            text = f"ends in {format_duration(max(1, round(left_s)))}, at {ends} UTC: {remedy}"
        with self._book.transaction() as tx:
            tx.put_lease(lease, kind="lease.expiring", who="broker", why=text)
        tell_inside(self._home, self._tenancy, lease, text, now_s=self._book.clock.utc_s())


def tell_inside(home: Path, tenancy: Tenancy, lease: Lease, text: str, *, now_s: float) -> None:
    """Leave a message where the holder looks: the log, and ``notice.json`` in the worker folder. A full disk keeps it from it.

    The folder is the job's own: nothing is followed out of it, whatever links the job has put there, and where it is another
    user's, only that one's rights count.
    """
    files = RunFiles(home, lease.run_id)
    notice = {"lease_id": lease.id, "at_s": now_s, "ends_at_s": lease.ends_at_s, "text": text}
    log = files.logs(lease.stage) / f"{lease.worker}.{lease.attempt}.log"
    folder = files.worker(lease.stage, lease.worker, lease.attempt)
    for tell in (
        partial(_append, log, f"\n[tenure] lease {lease.id} {text}\n".encode()),
        partial(_replace, folder, "notice.json", json.dumps(notice).encode()),
    ):
        try:
            with acting_as(tenancy.actor_of(lease.tenant)):
                tell()
        except (OSError, TenureError) as error:
            LOG.warning("lease %s: its holder could not be told inside: %s", lease.id, error)


def _append(log: Path, content: bytes) -> None:
    with contextlib.suppress(FileNotFoundError):  # its job has written nothing yet
        stream = os.fdopen(open_regular(log, os.O_WRONLY | os.O_APPEND), "ab")
        with stream:
            stream.write(content)


def _replace(folder: Path, name: str, content: bytes) -> None:
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    draft = f".{name}.{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft, dir_fd=root)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(draft, flags, 0o644, dir_fd=root), "wb") as stream:
            stream.write(content)
        os.replace(draft, name, src_dir_fd=root, dst_dir_fd=root)
    finally:
        os.close(root)
