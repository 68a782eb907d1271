"""Which ledger a home has: choosing it, backing it up, restoring it. Only while no broker of the home lives, or through it.

Not here: the format of a backup (`ledger.portable`), how a database is opened (`ledger.dialect`).
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import func, select

from tenure.broker.daemon import HomeHeld, home_lock
from tenure.errors import Conflict
from tenure.ledger import address, schema
from tenure.ledger.address import Address
from tenure.ledger.store import Ledger
from tenure.protocols import SystemClock

HISTORY = (schema.runs, schema.leases, schema.trials, schema.recommendations)
"""A ledger without a row in these was never used."""


def choose(home: Path, url: str) -> None:
    """Have the home's ledger lie in a PostgreSQL database from now on; nothing happens when it does already.

    Raises SpecError for another kind of URL, Conflict when a broker lives or the present ledger holds anything, and what
    opening the present ledger raises.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    wanted = Address.parse(url)
    if wanted == address.of_home(home):
        return
    try:
        with home_lock(home):
            present = address.of_home(home)
            if holds_anything(present, home):
                raise Conflict(
                    f"the ledger {present} of home {home} already holds runs or leases; it was not changed for {wanted}. "
                    f'To move it: "tenure backup FILE", then "tenure restore FILE --ledger URL".'
                )
            address.remember(home, wanted)
    except HomeHeld as error:
        raise Conflict(
            f"a broker of home {home} lives, with the ledger {address.of_home(home)}; it was not changed for {wanted}. "
            'End it with "tenure down" first.'
        ) from error


def holds_anything(at: Address, home: Path) -> bool:
    """Return whether a ledger was ever used. It must be nobody's; one that does not exist is not made."""
    if at.path is not None and not at.path.exists():
        return False
    ledger = Ledger.open(at, now_s=SystemClock().utc_s, who=f"for {home}")
    try:
        with ledger.reading() as connection:
            return any(connection.execute(select(func.count()).select_from(table)).scalar_one() for table in HISTORY)
    finally:
        ledger.close()
