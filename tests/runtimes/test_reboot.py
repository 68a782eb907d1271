"""What is left of a lease after its machine was started again: a record that says so, and nothing that is taken for running."""

import os
import signal

from tenure.protocols import MACHINE_RESTARTED, ExitKind, StartSpec, SystemClock
from tenure.resources import Envelope
from tenure.runtimes.process import ProcessRuntime


class NextBoot(SystemClock):
    """This machine's clock after a reboot."""

    def boot_id(self):
        return "the-next-boot"


def test_a_lease_that_a_reboot_ended_was_stopped_with_its_machine_and_did_not_fail(tmp_path):
    clock, worker = SystemClock(), str(tmp_path / "worker")
    before = ProcessRuntime(tmp_path / "state")
    spec = StartSpec(
        lease_id="lease-1", fence=1, attempt=1, argv=("sleep", "300"), workdir=worker, worker_dir=worker,
        log_path=str(tmp_path / "log"), envelope=Envelope(memory_bytes=64 << 20), deadline_boot_s=clock.boot_s() + 300,
        boot_id=clock.boot_id(),
    )  # fmt: skip
    handle = before.start(spec)
    os.kill(handle.pid, signal.SIGKILL)  # nothing of it lives on
    before.close()
    after = ProcessRuntime(tmp_path / "state", clock=NextBoot())
    try:
        assert after.list() == []
        ended = after.wait(after.attach("lease-1"), 0.0)
        assert ended.kind is ExitKind.STOPPED
        assert ended.witness.startswith(MACHINE_RESTARTED)
    finally:
        after.forget("lease-1")
        after.close()
