"""Hands the fixtures of the process runtime's contract to the tests of this folder."""

from tests.contracts.process_contract import bench, make_runtime, shared, state_dir  # noqa: F401
