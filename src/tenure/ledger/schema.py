"""The ledger's tables, as SQLAlchemy Core sees them. How they came to be is in `migrations`; a test holds both equal.

Nouns lie as JSON in `body`, beside the columns that queries need: a new field of a noun is no migration.
Times are UTC seconds. Events are append-only: the database itself refuses to change one, or to delete one above the floor that
`meta` holds (`dialect`).
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()


def _text(length: int) -> String:
    """Text of about so many characters; neither database refuses more, and both sort it by bytes."""
    return String(length).with_variant(Text(collation="C"), "postgresql")


COUNTER = Integer().with_variant(BigInteger(), "postgresql")
"""64 bits. SQLite's INTEGER has as many, and numbers rows by itself under no other name."""

meta = Table(
    "meta",
    metadata,
    Column("key", _text(64), primary_key=True),
    Column("value", Text, nullable=False),
)
"""Single values: ``fence``, the highest number ever handed out; ``events_floor``, the `seq` up to which events may go;
``utc_offset``, boot id and UTC minus CLOCK_BOOTTIME; ``policies``, tenant -> Policy as JSON; ``members``,
tenant -> Member as JSON."""

events = Table(
    "events",
    metadata,
    Column("seq", COUNTER, primary_key=True, autoincrement=True),
    Column("at_s", Float, nullable=False),
    Column("kind", _text(64), nullable=False),
    Column("who", _text(128), nullable=False),
    Column("why", Text, nullable=False),
    Column("run_id", _text(128), nullable=False),
    Column("stage", _text(128), nullable=False),
    Column("lease_id", _text(128), nullable=False),
    Column("node", _text(128), nullable=False),
    Column("data", Text, nullable=False),
    Index("ix_events_run", "run_id", "seq"),
    sqlite_autoincrement=True,
)

runs = Table(
    "runs",
    metadata,
    Column("id", _text(128), primary_key=True),
    Column("tenant", _text(64), nullable=False),
    Column("state", _text(16), nullable=False),
    Column("created_at_s", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_runs_created", "created_at_s"),
)
"""`body`: the Run without its stages; those are rows of `stages`."""

stages = Table(
    "stages",
    metadata,
    Column("run_id", _text(128), primary_key=True),
    Column("name", _text(128), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("state", _text(16), nullable=False),
    Column("fingerprint", _text(64), nullable=False),
    Column("body", Text, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("id", _text(128), primary_key=True),
    Column("gang_id", _text(128), nullable=False),
    Column("run_id", _text(128), nullable=False),
    Column("stage", _text(128), nullable=False),
    Column("worker", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("tenant", _text(64), nullable=False),
    Column("state", _text(16), nullable=False),
    Column("node", _text(128), nullable=False),
    Column("fence", COUNTER, nullable=False),
    Column("requested_at_s", Float, nullable=False),
    Column("queue_until_s", Float, nullable=False),
    Column("ended_at_s", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_leases_gang", "gang_id"),
    Index("ix_leases_run", "run_id", "stage", "worker"),
    Index("ix_leases_state", "state"),
)

exits = Table(
    "exits",
    metadata,
    Column("lease_id", _text(128), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("kind", _text(16), nullable=False),
    Column("ended_at_s", Float, nullable=False),
    Column("body", Text, nullable=False),
)

invocations = Table(
    "invocations",
    metadata,
    Column("run_id", _text(128), primary_key=True),
    Column("stage", _text(128), primary_key=True),
    Column("name", _text(256), primary_key=True),
    Column("worker", Integer, nullable=False),
    Column("lease_id", _text(128), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("starts", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("done", Integer, nullable=False),
    Column("at_s", Float, nullable=False),
    Index("ix_invocations_lease", "lease_id"),
)
"""One row per event of a stage that was started at least once; `failures` counts under the present lease."""

usage_points = Table(
    "usage_points",
    metadata,
    Column("id", COUNTER, primary_key=True, autoincrement=True),
    Column("lease_id", _text(128), nullable=False),
    Column("at_s", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_usage_lease", "lease_id", "at_s"),
)

trials = Table(
    "trials",
    metadata,
    Column("position", COUNTER, primary_key=True, autoincrement=True),
    Column("id", _text(128), nullable=False, unique=True),
    Column("run_id", _text(128), nullable=False),
    Column("stage", _text(128), nullable=False),
    Column("fingerprint", _text(64), nullable=False),
    Column("source", _text(16), nullable=False),
    Column("at_s", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_trials_fingerprint", "fingerprint"),
    Index("ix_trials_run", "run_id"),
)

recommendations = Table(
    "recommendations",
    metadata,
    Column("position", COUNTER, primary_key=True, autoincrement=True),
    Column("id", _text(128), nullable=False, unique=True),
    Column("run_id", _text(128), nullable=False),
    Column("stage", _text(128), nullable=False),
    Column("at_s", Float, nullable=False),
    Column("body", Text, nullable=False),
    Index("ix_recommendations_run", "run_id"),
)

nodes = Table(
    "nodes",
    metadata,
    Column("name", _text(128), primary_key=True),
    Column("state", _text(16), nullable=False),
    Column("body", Text, nullable=False),
)
