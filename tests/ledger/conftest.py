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


BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


def _maker(kind: str, request: pytest.FixtureRequest, folder: Path) -> Callable[[], Ledger]:
    server = None if kind == "sqlite" else request.getfixturevalue("postgres_server")
    names = itertools.count()

    def make() -> Ledger:
        address = Address.parse(server.new_schema()) if server else Address(path=folder / f"{next(names)}.sqlite")
        return Ledger.open(address, now_s=now)

    return make


@pytest.fixture(params=BOTH)
def new_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Ledger]:
    """Make as many new ledgers as a test wants; it closes them."""
    return _maker(request.param, request, tmp_path / "new")


@pytest.fixture
def other_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Ledger]:
    """Make ledgers in the database that `new_ledger` does not make them in."""
    kind = request.node.callspec.params["new_ledger"]
    return _maker("sqlite" if kind == "postgresql" else "postgresql", request, tmp_path / "other")
