"""Shared by all tests: sockets go to a folder that is removed afterwards, and no test touches the user's own home."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests import docker_engine, postgres

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
    from tests import postgres  # imported late: the guest has this file, but neither that one nor a ledger

    if why := postgres.why_absent():
        pytest.skip(why)
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="session")
def docker() -> Iterator[docker_engine.Engine]:
    """A Docker Engine of our own for the whole session; tests that use it carry the mark ``docker``."""
    from tests import docker_engine  # imported late, as above

    if why := docker_engine.why_absent():
        pytest.skip(why)
    try:
        with docker_engine.running() as engine:
            if why := docker_engine.why_no_container(engine):
                pytest.skip(why)
            yield engine
    except docker_engine.CannotStart as error:
        pytest.skip(f"a Docker Engine does not start here: {error}")


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def ledger_address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    """Where a new ledger of the test may lie: once a file, once a schema of its own."""
    from tenure.ledger.address import Address

    if request.param == "sqlite":
        return Address(path=tmp_path / "ledger.sqlite")
    return Address.parse(request.getfixturevalue("postgres_server").new_schema())
