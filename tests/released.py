"""Ledgers as earlier Tenures wrote them: one dump per released schema, in tests/ledger/released, with live leases."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

RELEASED = sorted((Path(__file__).parent / "ledger" / "released").glob("*.sql"))


def released(dump: Path, path: Path) -> Path:
    """Make the ledger file of a dump."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(dump.read_text())
    return path
