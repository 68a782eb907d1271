"""The first tables: runs, leases, events, and what was measured."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from tenure.errors import Unsupported
from tenure.ledger.dialect import forbid_changes

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_COUNTER = sa.Integer().with_variant(sa.BigInteger(), "postgresql")


def _text(length: int) -> sa.String:
    return sa.String(length).with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "meta",
        sa.Column("key", _text(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("seq", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("kind", _text(64), nullable=False),
        sa.Column("who", _text(128), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("run_id", _text(128), nullable=False),
        sa.Column("stage", _text(128), nullable=False),
        sa.Column("lease_id", _text(128), nullable=False),
        sa.Column("node", _text(128), nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_events_run", "events", ["run_id", "seq"])
    op.create_table(
        "runs",
        sa.Column("id", _text(128), primary_key=True),
        sa.Column("tenant", _text(64), nullable=False),
        sa.Column("state", _text(16), nullable=False),
        sa.Column("created_at_s", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("ix_runs_created", "runs", ["created_at_s"])
    op.create_table(
        "stages",
        sa.Column("run_id", _text(128), primary_key=True),
        sa.Column("name", _text(128), primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("state", _text(16), nullable=False),
        sa.Column("fingerprint", _text(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "leases",
        sa.Column("id", _text(128), primary_key=True),
        sa.Column("gang_id", _text(128), nullable=False),
        sa.Column("run_id", _text(128), nullable=False),
        sa.Column("stage", _text(128), nullable=False),
        sa.Column("worker", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("tenant", _text(64), nullable=False),
        sa.Column("state", _text(16), nullable=False),
        sa.Column("node", _text(128), nullable=False),
        sa.Column("fence", _COUNTER, nullable=False),
        sa.Column("requested_at_s", sa.Float, nullable=False),
        sa.Column("queue_until_s", sa.Float, nullable=False),
        sa.Column("ended_at_s", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("ix_leases_gang", "leases", ["gang_id"])
    op.create_index("ix_leases_run", "leases", ["run_id", "stage", "worker"])
    op.create_index("ix_leases_state", "leases", ["state"])
    op.create_table(
        "exits",
        sa.Column("lease_id", _text(128), primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("kind", _text(16), nullable=False),
        sa.Column("ended_at_s", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "invocations",
        sa.Column("run_id", _text(128), primary_key=True),
        sa.Column("stage", _text(128), primary_key=True),
        sa.Column("name", _text(256), primary_key=True),
        sa.Column("worker", sa.Integer, nullable=False),
        sa.Column("lease_id", _text(128), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("starts", sa.Integer, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("done", sa.Integer, nullable=False),
        sa.Column("at_s", sa.Float, nullable=False),
    )
    op.create_index("ix_invocations_lease", "invocations", ["lease_id"])
    op.create_table(
        "usage_points",
        sa.Column("id", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("lease_id", _text(128), nullable=False),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("ix_usage_lease", "usage_points", ["lease_id", "at_s"])
    op.create_table(
        "trials",
        sa.Column("position", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("id", _text(128), nullable=False, unique=True),
        sa.Column("run_id", _text(128), nullable=False),
        sa.Column("stage", _text(128), nullable=False),
        sa.Column("fingerprint", _text(64), nullable=False),
        sa.Column("source", _text(16), nullable=False),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("ix_trials_fingerprint", "trials", ["fingerprint"])
    op.create_index("ix_trials_run", "trials", ["run_id"])
    op.create_table(
        "recommendations",
        sa.Column("position", _COUNTER, primary_key=True, autoincrement=True),
        sa.Column("id", _text(128), nullable=False, unique=True),
        sa.Column("run_id", _text(128), nullable=False),
        sa.Column("stage", _text(128), nullable=False),
        sa.Column("at_s", sa.Float, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_index("ix_recommendations_run", "recommendations", ["run_id"])
    op.create_table(
        "nodes",
        sa.Column("name", _text(128), primary_key=True),
        sa.Column("state", _text(16), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    forbid_changes(op.get_bind(), "events")


def downgrade() -> None:
    """There is no way back from the first step."""
    raise Unsupported("downgrade", "before the first step there is no ledger", "Use a copy of the file from before.")
