"""Which schema a ledger has, and bringing it forward inside the caller's transaction. The steps themselves are in `migrations`.

Not for: a way back. An older Tenure refuses a newer ledger; a backup from before is the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from tenure.errors import Conflict, CorruptData

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

MIGRATIONS = Path(__file__).parent / "migrations"


def head() -> str:
    """Return the newest schema that this Tenure knows."""
    return str(_scripts()[1].get_current_head())


def revision_of(connection: Connection) -> str:
    """Return the ledger's schema, empty when it has no tables yet."""
    from alembic.runtime.migration import MigrationContext  # alembic takes a while to import

    return MigrationContext.configure(connection).get_current_revision() or ""


def check_known(revision: str, what: str) -> None:
    """Raise Conflict for a schema that a newer Tenure made. what: whose schema, for people."""
    _, script = _scripts()
    if revision and revision not in {step.revision for step in script.walk_revisions()}:
        raise Conflict(
            f"{what} has schema {revision}, which this Tenure does not know (it knows up to {script.get_current_head()}): "
            "a newer version wrote it. Use that version, or restore a backup."
        )


def bring_forward(connection: Connection, what: str, *, to: str = "head") -> None:
    """Take every step from the present schema up to another; nothing happens when it is there already.

    Raises Conflict as `check_known`, CorruptData when a step cannot be taken.
    """
    from alembic import command
    from alembic.util import CommandError

    present = revision_of(connection)
    config, script = _scripts()
    if present == script.get_current_head():
        return
    check_known(present, what)
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, to)
    except CommandError as error:
        raise CorruptData(f"{what} could not be brought up to date: {error}") from error


def _scripts() -> tuple[Config, ScriptDirectory]:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config, ScriptDirectory.from_config(config)
