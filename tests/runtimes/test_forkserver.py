import os
import signal
import subprocess

import pytest
from tests.contracts.runtime_contract import Bench, gone, until

from tenure.errors import Unavailable
from tenure.protocols import ExitKind
from tenure.runtimes import procfs
from tenure.runtimes.forkserver import ForkServer
from tenure.runtimes.process import ProcessRuntime

pytestmark = pytest.mark.real


@pytest.fixture
def runtime(tmp_path):
    made = ProcessRuntime(tmp_path / "state", confine="rlimit")
    yield made
    made.close()


def waiting_shims(runtime):
    """Return the pids of the shims without an order: each is ready when its own child, the job to be, is there."""
    return [pid for pid in procfs.descendants(runtime.fork_server_pid) if procfs.descendants(pid)]


def test_one_shim_waits_before_the_first_order_and_after_each(runtime, tmp_path):
    (first,) = until(lambda: waiting_shims(runtime), "a shim waits")
    bench = Bench(runtime, tmp_path)
    handle = bench.start("/bin/true")
    assert handle.pid == first
    assert bench.end(handle).kind is ExitKind.COMPLETED
    until(lambda: len(waiting_shims(runtime)) == 1, "the next one waits")


def test_a_killed_waiting_shim_costs_no_order(runtime, tmp_path):
    (first,) = until(lambda: waiting_shims(runtime), "a shim waits")
    os.kill(first, signal.SIGKILL)
    until(lambda: gone(first), "it is gone")
    bench = Bench(runtime, tmp_path)
    assert bench.end(bench.start("/bin/true")).kind is ExitKind.COMPLETED


def test_closing_the_runtime_leaves_no_shim_without_an_order(runtime):
    (first,) = until(lambda: waiting_shims(runtime), "a shim waits")
    (job,) = procfs.descendants(first)
    runtime.close()
    until(lambda: gone(first) and gone(job), "shim and job have left")


def test_a_start_that_fails_leaves_no_name_of_its_shim(runtime, tmp_path):
    bench = Bench(runtime, tmp_path)
    with pytest.raises(Exception, match="/no/such/program"):
        bench.start("/no/such/program")
    assert not list((tmp_path / "state").rglob("shim.json"))


def test_a_server_that_does_not_come_up_in_time_is_ended(tmp_path, monkeypatch):
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    with pytest.raises(Unavailable, match="did not come up"):
        ForkServer(tmp_path / "log", answer_s=1e-6)
    assert [process.poll() for process in started] == [-signal.SIGKILL]
