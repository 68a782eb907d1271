"""What a job in a container finds in its environment: nothing of the agent's own, its devices counted anew."""

from tests.contracts.runtime_contract import Bench

from tenure.resources import DeviceShare
from tenure.runtimes.environment import container_environment


def test_nothing_of_the_agents_own_environment_gets_inside(tmp_path, monkeypatch):
    for name in ("HOME", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR"):
        monkeypatch.setenv(name, "/of/the/agent")
    found = container_environment(Bench(None, tmp_path).spec("true", env={"TMPDIR": "/of/the/job"}))
    assert "/of/the/agent" not in found.values()
    assert found["TMPDIR"] == "/of/the/job"
    assert found["HOME"] == found["TENURE_WORKER_DIR"]


def test_devices_are_counted_anew_inside(tmp_path):
    devices = tuple(DeviceShare(index=index, fraction=1.0) for index in (2, 5))
    assert container_environment(Bench(None, tmp_path).spec("true", devices=devices))["CUDA_VISIBLE_DEVICES"] == "0,1"
