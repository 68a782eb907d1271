"""The contract of every runtime over containers of a real engine, and what containers promise beyond it."""

import os
from pathlib import Path

import pytest
from tests.contracts.runtime_contract import LONG_S, Bench, RuntimeContract

from tenure.errors import Unsupported
from tenure.resources import DeviceShare
from tenure.runtimes.container import ContainerRuntime
from tenure.runtimes.state import read_json

pytestmark = [pytest.mark.real, pytest.mark.docker]


class ContainerBench(Bench):
    """As for processes; jobs see the folder of all leases' files, and number their processes by themselves."""

    def spec(self, *argv, **fields):
        self.folder.mkdir(parents=True, exist_ok=True)
        mounts = {str(self.folder): str(self.folder)}
        return super().spec(*argv, **{"network": "tenant:alice", "mounts": mounts} | fields)

    def gone(self, _pid):
        """Return whether nothing of any container of ours runs: stronger than asked, in a test with one lease."""
        groups = {note["id"] for path in self.state.rglob("container.json") if (note := read_json(path))}
        return not any(group in _groups_of(entry) for entry in os.listdir("/proc") if entry.isdigit() for group in groups)

    @property
    def state(self):
        return Path(self.runtime._state_dir)


def _groups_of(pid):
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""


@pytest.fixture(scope="class")
def state_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runtime") / "state"


@pytest.fixture(scope="class")
def shared(docker, state_dir):
    runtime = ContainerRuntime(state_dir, socket=str(docker.socket))
    yield runtime
    runtime.close()


@pytest.fixture
def make_runtime(docker, shared, state_dir):
    made = []

    def make():
        made.append(ContainerRuntime(state_dir, socket=str(docker.socket)))
        return made[-1]

    yield make
    for handle in shared.list():
        shared.stop(handle, grace_s=0, fence=1 << 30)
        assert shared.wait(handle, LONG_S) is not None
    for lease_id in shared.known():
        shared.forget(lease_id)
    for runtime in made:
        runtime.close()
    assert not docker.containers(), "nothing of ended leases is left with the engine"


@pytest.fixture
def bench(shared, make_runtime, tmp_path):
    return ContainerBench(shared, tmp_path / "leases")


class TestContainer(RuntimeContract):
    @pytest.mark.parametrize(
        "more",
        [
            {"capabilities": ("NET_ADMIN",)},
            {"devices": (DeviceShare(index=0, fraction=1.0),)},
            {"network": "host"},
            {"user": "root"},
            {"mounts": {"/var/run": "/data"}},
        ],
    )
    def test_what_a_process_cannot_honour_is_refused_with_the_reason(self, bench, more):
        with pytest.raises(Unsupported, match=next(iter(more))):
            bench.start("true", **more)
