"""Hands the fixtures of the process runtime's contract to the tests of this folder, and an engine to those of containers."""

import pytest
from tests import docker_engine
from tests.contracts.process_contract import bench, make_runtime, shared, state_dir  # noqa: F401


@pytest.fixture(scope="session")
def docker():
    """A Docker Engine of our own for the whole session; tests that use it carry the mark ``docker``."""
    if why := docker_engine.why_absent():
        pytest.skip(why)
    try:
        with docker_engine.running() as engine:
            yield engine
    except docker_engine.CannotStart as error:
        pytest.skip(f"a Docker Engine does not start here: {error}")
