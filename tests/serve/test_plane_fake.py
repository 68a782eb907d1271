"""The fake that the doors are tested against shows what every data plane shows."""

import asyncio

import pytest
from tests.contracts.plane_contract import PlaneContract, shared_memory  # noqa: F401

from .fakes import FakePlane


class TestFakePlane(PlaneContract):
    @pytest.fixture
    def run(self):
        def go(body):
            asyncio.run(body(FakePlane("double", "picky", "upper", "sums", budget_bytes=1 << 20)))

        return go
