"""Events may be deleted up to a floor, the `seq` that `meta` holds as ``events_floor``; above it they stay append-only."""

from __future__ import annotations

from alembic import op

from tenure.errors import Unsupported
from tenure.ledger.dialect import allow_deletes_up_to

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Have deletes look at the floor."""
    allow_deletes_up_to(op.get_bind(), "events", column="seq", key="events_floor")


def downgrade() -> None:
    """There is no way back: what was deleted would have to come back."""
    raise Unsupported("downgrade", "deleted events do not come back", "Use a backup from before.")
