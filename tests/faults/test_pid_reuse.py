"""A shim's pid belongs to somebody else by now: never signalled, never believed alive, and the lease has its record."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenure.errors import Conflict
from tenure.protocols import ExitKind, StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes import procfs
from tenure.runtimes.process import ProcessRuntime

pytestmark = pytest.mark.real
NEXT = Path("/proc/sys/kernel/ns_last_pid")


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[ProcessRuntime]:
    made = ProcessRuntime(tmp_path / "state")
    yield made
    made.close()


def spec(folder: Path) -> StartSpec:
    clock, worker = SystemClock(), folder / "worker"
    return StartSpec(
        lease_id="lease-1", fence=1, attempt=1, argv=("sleep", "300"), workdir=str(worker), worker_dir=str(worker),
        log_path=str(folder / "log"), envelope=Envelope(memory_bytes=64 << 20), deadline_boot_s=clock.boot_s() + 300,
        boot_id=clock.boot_id(),
    )  # fmt: skip


def started_as(pid: int) -> subprocess.Popen[bytes]:
    """Return a process that has this pid. Other processes start meanwhile, so that it takes some tries."""
    for _ in range(200):
        NEXT.write_text(str(pid - 1))
        made = subprocess.Popen(["sleep", "300"])
        if made.pid == pid:
            return made
        made.kill()
        made.wait()
    pytest.skip(f"pid {pid} could not be had again within 200 tries: this machine starts too many processes")


@pytest.mark.skipif(os.geteuid() != 0 or not os.access(NEXT, os.W_OK), reason="needs the right to choose the next pid")
def test_a_process_that_got_the_pid_of_a_dead_shim_is_left_alone_and_the_lease_ends(
    runtime: ProcessRuntime, tmp_path: Path
) -> None:
    handle = runtime.start(spec(tmp_path))
    os.kill(handle.pid, signal.SIGKILL)
    while procfs.start_ticks(handle.pid):  # its fork server reaps it
        pass
    stranger = started_as(handle.pid)
    try:
        assert not procfs.is_alive(handle.pid, handle.start_ticks)
        assert runtime.list() == []
        runtime.stop(handle, grace_s=0.0, fence=1)
        with pytest.raises(Conflict, match="has ended"):
            runtime.renew(handle, deadline_boot_s=handle.started_at_s, fence=1)
        ended = runtime.wait(handle, 0.0)
        assert ended is not None
        assert (ended.kind, "shim lost" in ended.witness) == (ExitKind.FAILED, True)
        runtime.forget("lease-1")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
