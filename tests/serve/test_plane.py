"""The real data plane: instances in processes of their own, containment, swaps."""

import asyncio
import os
from pathlib import Path

import pytest
from tests.contracts.plane_contract import PlaneContract, shared_memory  # noqa: F401

from tenure.serve.dataplane import DataPlane, Limits
from tenure.serve.repository import ModelFiles

from .models import ENDINGS, LOADER, write_models

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True, scope="module")
def _importable():
    """Instances load these tests' models by their module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        yield


def on_plane(folder, body, limits=None):
    """Run a coroutine function on an open plane over a folder of models."""

    async def go():
        plane = await opened(folder, limits)
        try:
            await body(plane)
        finally:
            await plane.close()

    asyncio.run(go())


async def opened(folder, limits=None):
    plane = DataPlane(ModelFiles(folder, endings=ENDINGS), limits, loader=LOADER)
    await plane.open()
    return plane


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One plane for all tests of the contract."""
    folder = write_models(tmp_path_factory.mktemp("models"), "double", "picky", "upper", "sums")
    with asyncio.Runner() as runner:
        plane = runner.run(opened(folder, Limits(memory_budget_bytes=1 << 20)))
        yield runner, plane
        runner.run(plane.close())


class TestDataPlane(PlaneContract):
    @pytest.fixture
    def run(self, shared):
        runner, plane = shared
        yield lambda body: runner.run(body(plane))
        plane.draining = False
        plane.unregister_region()
