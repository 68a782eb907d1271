"""Shared by all tests: sockets go to a folder that is removed afterwards, and no test touches the user's own home."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import postgres

from tenure.ledger.address import Address


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_folder():
    folder = tempfile.mkdtemp(prefix="tt-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        patch.setenv("TENURE_HOME", f"{folder}/home")
        patch.setenv("TENURE_SHARES_FILE", f"{folder}/shares.json")
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """A PostgreSQL server for the whole session; tests that use it carry the mark ``postgres``."""
    if why := postgres.why_absent():
        pytest.skip(why)
    with postgres.running() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def ledger_address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    """Where a new ledger of the test may lie: once a file, once a schema of its own."""
    if request.param == "sqlite":
        return Address(path=tmp_path / "ledger.sqlite")
    return Address.parse(request.getfixturevalue("postgres_server").new_schema())
