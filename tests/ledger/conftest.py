from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenure.ledger.address import Address
from tenure.ledger.store import Ledger


def now() -> float:
    return 1000.0


@pytest.fixture
def ledger(ledger_address: Address) -> Iterator[Ledger]:
    """A new ledger, open."""
    made = Ledger.open(ledger_address, now_s=now)
    yield made
    made.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def new_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Ledger]:
    """Make as many new ledgers as a test wants; it closes them."""
    names = itertools.count()
    server = None if request.param == "sqlite" else request.getfixturevalue("postgres_server")

    def make() -> Ledger:
        address = Address.parse(server.new_schema()) if server else Address(path=tmp_path / f"{next(names)}.sqlite")
        return Ledger.open(address, now_s=now)

    return make
