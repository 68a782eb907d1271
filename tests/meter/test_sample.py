import os
import signal
import subprocess
import sys
import time

import pytest

from tenure.errors import SpecError
from tenure.meter import tree
from tenure.meter.sample import CgroupSampler, HostSampler, NvmlSampler, ProcessTreeSampler
from tenure.meter.watch import Watcher
from tenure.usage import Usage

BOUND_S = 20.0


def python(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def until(reading, good):
    """Sample until `good(usage)`; give the usage. Bounded."""
    end_s = time.monotonic() + BOUND_S
    while time.monotonic() < end_s:
        usage = reading()
        if usage is not None and good(usage):
            return usage
        time.sleep(0.02)
    raise AssertionError(f"never came: {usage}")


@pytest.fixture
def job():
    """Start Python code; whatever runs at the end is ended by closing its stdin, then by its id."""
    started = []

    def start(code):
        started.append(python(code))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


WAIT = "print('ready', flush=True); import sys; sys.stdin.read()"


@pytest.mark.real
def test_a_tree_shows_memory_that_a_process_touches(job):
    process = job(f"a = bytearray(b'x') * (64 << 20); {WAIT}")
    sampler = ProcessTreeSampler(process.pid)
    usage = sampler.sample()
    assert 64 << 20 < usage.memory_bytes < 128 << 20
    assert usage.peak_memory_bytes >= usage.memory_bytes
    assert usage.processes == 1
    sampler.close()


@pytest.mark.real
def test_a_tree_counts_shared_memory(job, tmp_path):
    process = job(f"import mmap; m = mmap.mmap(-1, 32 << 20); m.write(b'x' * (32 << 20)); {WAIT}")
    sampler = ProcessTreeSampler(process.pid)
    assert sampler.sample().memory_bytes > 32 << 20
    sampler.close()


@pytest.mark.real
def test_cpu_of_reaped_children_and_grandchildren_is_kept(job):
    burn = "import time; e = 0\nwhile time.process_time() < 0.3: e += 1"
    code = (
        "import subprocess, sys; print('ready', flush=True); sys.stdin.readline();"
        f"subprocess.run([sys.executable, '-c', {burn!r}]); sys.stdin.read()"
    )
    process = job(code)
    sampler = ProcessTreeSampler(process.pid)
    before = sampler.sample().cpu_s
    process.stdin.write("go\n")
    process.stdin.flush()
    usage = until(sampler.sample, lambda usage: usage.cpu_s - before >= 0.29 and usage.processes == 1)
    assert usage.cpu_s - before < 3
    sampler.close()


@pytest.mark.real
def test_a_child_of_a_second_thread_is_found(job):
    code = (
        "import subprocess, sys, threading, time\n"
        "def body():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], stdin=subprocess.PIPE)\n"
        "    sys.stdin.read(); child.stdin.close(); child.wait()\n"
        "t = threading.Thread(target=body); t.start(); print('ready', flush=True); t.join()"
    )
    sampler = ProcessTreeSampler(job(code).pid)
    until(sampler.sample, lambda usage: usage.processes == 2)
    sampler.close()


@pytest.mark.real
def test_a_child_seen_once_stays_watched_after_its_parent_is_gone(job):
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0: time.sleep(30); os._exit(0)\n"
        "    os.read(0, 3); os._exit(0)\n"
        "print('ready', flush=True); os.wait(); sys.stdin.read()"
    )
    process = job(code)
    sampler = ProcessTreeSampler(process.pid)
    until(sampler.sample, lambda usage: usage.processes == 3)
    process.stdin.write("go\n")
    process.stdin.flush()
    until(sampler.sample, lambda usage: usage.processes == 2)
    root, orphan = sampler.pids()
    assert root == process.pid
    os.kill(orphan, signal.SIGKILL)
    until(sampler.sample, lambda usage: usage.processes == 1)
    sampler.close()


@pytest.mark.real
def test_a_tree_whose_processes_are_gone_says_so_and_does_not_raise(job):
    process = job(WAIT)
    sampler = ProcessTreeSampler(process.pid)
    assert sampler.sample().processes == 1
    process.stdin.close()
    process.wait()
    assert sampler.sample() is None
    assert str(process.pid) in sampler.lost
    assert sampler.sample() is None
    sampler.close()


def test_a_pid_that_never_was_is_lost_from_the_start():
    sampler = ProcessTreeSampler(2**22 - 1)
    assert sampler.sample() is None
    assert "gone" in sampler.lost
    sampler.close()


@pytest.mark.real
def test_kernels_without_a_list_of_children_are_served_by_a_scan(job):
    code = "import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()']);" + WAIT
    sampler = ProcessTreeSampler(job(code).pid)
    sampler._has_children_file = False
    until(sampler.sample, lambda usage: usage.processes == 2)
    sampler.close()


@pytest.mark.real
def test_a_tree_with_more_processes_than_files_may_stay_open_is_seen_whole(job, monkeypatch):
    monkeypatch.setattr(tree, "MAX_OPEN", 2)
    code = (
        "import os, signal, sys\n"
        "pids = [os.fork() for _ in range(1)]\n"
        "for _ in range(11):\n"
        "    if pids[-1] != 0: pids.append(os.fork())\n"
        "if pids[-1] == 0: signal.pause()\n"
        "print('ready', flush=True); sys.stdin.read()\n"
        "for pid in pids: os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)"
    )
    sampler = ProcessTreeSampler(job(code).pid)
    before = len(os.listdir("/proc/self/fd"))
    usage = until(sampler.sample, lambda usage: usage.processes == 13)
    assert usage.memory_bytes > 13 << 20
    assert len(os.listdir("/proc/self/fd")) <= before + 8
    assert not sampler.overflowed
    sampler.close()


@pytest.mark.real
def test_written_bytes_reach_the_disk_counter(job, tmp_path):
    path = tmp_path / "out"
    process = job(
        f"f = open({str(path)!r}, 'wb'); f.write(b'x' * (4 << 20)); f.flush(); import os; os.fsync(f.fileno()); {WAIT}"
    )
    sampler = ProcessTreeSampler(process.pid)
    usage = sampler.sample()
    sampler.close()
    if usage.write_bytes == 0:
        pytest.skip("the temporary folder lies in memory, or I/O accounting is off")
    assert usage.write_bytes >= 4 << 20


def test_the_host_is_busy_and_uses_memory():
    usage = HostSampler().sample()
    assert usage.cpu_s > 0
    assert 0 < usage.memory_bytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_v2_group_is_read_and_its_removal_is_told(tmp_path):
    group = tmp_path / "g"
    group.mkdir()
    files = {
        "cgroup.procs": "12\n13\n",
        "cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
        "memory.stat": "anon 1000\nfile 99999\nkernel 30\nshmem 200\n",
        "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=1\n8:1 rbytes=1 wbytes=2 rios=1 wios=1\n",
    }
    for name, text in files.items():
        (group / name).write_text(text)
    sampler = CgroupSampler({"unified": group})
    usage = sampler.sample()
    assert (usage.cpu_s, usage.memory_bytes, usage.processes) == (2.5, 1230, 2)
    assert (usage.read_bytes, usage.write_bytes) == (11, 22)
    for name in files:
        (group / name).unlink()
    group.rmdir()
    assert sampler.sample() is None
    assert "gone" in sampler.lost


@pytest.mark.real
def test_the_group_of_this_process_is_readable_where_groups_are_mounted():
    sampler = CgroupSampler.of(os.getpid())
    if not sampler.paths:
        pytest.skip("no cgroup hierarchy is mounted")
    assert sampler.sample() is not None or sampler.lost


def test_a_missing_gpu_is_told_not_raised():
    sampler = NvmlSampler(63)
    assert sampler.sample() is None
    assert sampler.lost
    sampler.close()


class Script:
    """A sampler that plays readings."""

    def __init__(self, *usages):
        self.lost, self.usages, self.closed = "", list(usages), False

    def sample(self):
        if not self.usages:
            self.lost = "it ended"
            return None
        return self.usages.pop(0)

    def close(self):
        self.closed = True


def test_a_watcher_sums_up_all_readings_though_its_ring_is_bounded():
    script = Script(*(Usage(at_s=float(i), cpu_s=i * 0.5, memory_bytes=100 * (i + 1)) for i in range(5)))
    watcher = Watcher({"job": script}, max_samples=2)
    for _ in range(7):
        watcher.sample_once()
    summary = watcher.summary("job")
    assert summary.samples == 5
    assert summary.cpu_s == 2.0
    assert (summary.memory_min_bytes, summary.memory_mean_bytes, summary.memory_max_bytes) == (100, 300.0, 500)
    assert 0 < summary.cpu_cores_min <= summary.cpu_cores_mean <= summary.cpu_cores_max
    assert summary.lost == "it ended"
    assert [usage.memory_bytes for usage in watcher.history("job")] == [400, 500]
    watcher.stop()
    assert script.closed


def test_a_watcher_refuses_a_bad_period_and_an_unknown_name():
    with pytest.raises(SpecError, match="period"):
        Watcher({}, period_s=0)
    with pytest.raises(SpecError, match="watched: job"):
        Watcher({"job": Script()}).summary("other")


@pytest.mark.real
def test_a_watcher_thread_samples_until_it_is_stopped_and_closes_what_it_watched(job):
    process = job(WAIT)
    with Watcher({"job": ProcessTreeSampler(process.pid), "host": HostSampler()}, period_s=0.01) as watcher:
        until(lambda: watcher.latest().get("host"), lambda _: watcher.summary("job").samples >= 3)
    summary = watcher.summary("job")
    assert summary.lost == ""
    assert summary.memory_max_bytes > 1 << 20
    assert watcher.overhead_s > 0
    count = summary.samples
    assert watcher.summary("job").samples == count
