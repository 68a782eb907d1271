"""One process by its exact CPU clock, against what the process says of itself."""

import mmap
import os
import signal
import subprocess
import sys

import pytest

from tenure.meter import process
from tenure.meter.process import ProcessSampler

pytestmark = pytest.mark.real

WORKER = """
import sys, time
held = bytearray(30 << 20)
for index in range(0, len(held), 4096):
    held[index] = 1
while time.process_time() < 0.2:
    pass
print(time.process_time_ns(), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def worker():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, text=True) as running:
        yield running
        running.communicate("\n", timeout=10)


def test_the_clock_of_another_process_is_exact_and_memory_is_what_it_touched(worker):
    own_s = int(worker.stdout.readline()) / 1e9
    sampler = ProcessSampler(worker.pid)
    usage = sampler.sample()
    assert own_s <= usage.cpu_s < own_s + 0.02
    assert usage.memory_bytes > 30 << 20
    assert usage.peak_memory_bytes == usage.memory_bytes
    sampler.close()
    assert sampler.sample() is None


def test_a_process_that_is_gone_is_lost_and_raises_nothing():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        sampler = ProcessSampler(running.pid)
        assert sampler.sample() is not None
        running.communicate(b"\n", timeout=10)
    assert sampler.sample() is None
    assert "gone" in sampler.lost
    assert ProcessSampler(running.pid).sample() is None
    assert process.children(running.pid) == ()
    assert process.shared_memory_bytes(running.pid) == (0, 0)


def test_children_of_every_thread_are_found(worker):
    assert worker.pid in process.children(os.getpid())


def test_shared_memory_is_shared_out_among_those_that_map_it():
    with mmap.mmap(-1, 8 << 20) as shared:
        shared[:] = bytes(len(shared))
        mapped, own = process.shared_memory_bytes(os.getpid())
        assert mapped >= own >= 8 << 20
        child = os.fork()
        if not child:  # it reads every page, then stands still
            sum(shared[index] for index in range(0, len(shared), 4096))
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(child, os.WUNTRACED)
        try:
            mapped, own = process.shared_memory_bytes(os.getpid())
            assert mapped - own >= 3 << 20
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
