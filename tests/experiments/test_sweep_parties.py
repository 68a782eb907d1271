"""The meter of parties: exact CPU, extremes of its periods, memory, a GPU; for real processes and one that goes."""

import os
import subprocess
import sys
import time

import pytest

from tenure.experiments.sweep_parties import PERIOD_S, PartyMeter
from tenure.usage import Usage

pytestmark = pytest.mark.real
BURN = """
import sys, time
print(flush=True)
sys.stdin.readline()
began = time.process_time()
while time.process_time() - began < 0.3:
    pass
print(time.process_time_ns(), flush=True)
sys.stdin.readline()
"""


class FakeGpu:
    """A device that is busy for a while, then not."""

    lost = ""

    def __init__(self):
        self.busy, self.closed = [0.9, 0.5], False

    def sample(self):
        return Usage(at_s=0.0, gpu_busy=self.busy.pop() if self.busy else 0.1, gpu_memory_bytes=7 << 20)

    def close(self):
        self.closed = True


@pytest.fixture
def burner():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BURN], stdin=pipe, stdout=pipe, text=True) as running:
        running.stdout.readline()
        yield running
        running.communicate("\n", timeout=10)


def test_what_a_party_used_is_exact_and_its_periods_have_extremes(burner):
    with PartyMeter() as meter:
        meter.begin({"app": (burner.pid,), "idle": (os.getpid(),)})
        burner.stdin.write("\n")
        burner.stdin.flush()
        burner.stdout.readline()
        time.sleep(3 * PERIOD_S)  # it stands still now: the lowest period is one of these
        use = meter.end()
    app, idle = use.parties["app"], use.parties["idle"]
    assert 0.3 <= app.cpu_s < 0.4
    assert idle.cpu_s < app.cpu_s
    assert app.cores_min < 0.2
    assert app.cores_min <= app.cpu_s / use.span_s <= app.cores_max
    assert app.memory_bytes > 1 << 20
    assert use.host_cpu_s > 0.2
    assert meter.watched_s == use.span_s
    assert 0 < meter.overhead_s < 0.05 * use.span_s


def test_several_processes_are_one_party_and_one_that_goes_ends_nothing(burner):
    with PartyMeter() as meter:
        meter.begin({"both": (os.getpid(), burner.pid), "gone": (2**22 - 1,)})
        use = meter.end()
        assert use.parties["both"].memory_bytes > 10 << 20
        assert use.parties["gone"].cpu_s == 0
        burner.kill()
        burner.wait(10)
        meter.begin({"both": (os.getpid(), burner.pid)})
        assert meter.end().parties["both"].memory_bytes > 1 << 20


def test_a_gpu_is_watched_where_there_is_one():
    gpu = FakeGpu()
    with PartyMeter(lambda: gpu) as meter:
        meter.begin({})
        time.sleep(2 * PERIOD_S)
        use = meter.end()
    assert (use.gpu_busy_max, use.gpu_busy_min, use.gpu_memory_bytes) == (0.9, 0.1, 7 << 20)
    assert 0.1 < use.gpu_busy < 0.9
    assert gpu.closed
