"""The judge of who takes more of a device than is its own: made-up readings in, ends out."""

import os
import threading

import pytest

from tenure.agent.gpus import CONTEXT_BYTES, GpuGuard, GpuWatch, Holder, Reading, declare, overrun, used
from tenure.errors import Refused
from tenure.meter.nvml import GpuProcess
from tenure.protocols import ExitKind, RuntimeHandle
from tenure.resources import Gpu
from tenure.usage import Usage

GIB = 1 << 30


def holder(lease_id="a", *, pids=(10,), uuids=("GPU-0",), memory_bytes=4 * GIB, mps=False):
    handle = RuntimeHandle(lease_id=lease_id, attempt=1, fence=1, pid=1, start_ticks=1, started_at_s=0.0)
    return Holder(handle=handle, pids=frozenset(pids), uuids=uuids, memory_bytes=memory_bytes, mps=mps)


def reading(*processes, uuid="GPU-0", **fields):
    return Reading(uuid=uuid, processes=processes, **fields)


def process(pid=10, memory_bytes=GIB, through_mps=False):
    return GpuProcess(pid=pid, memory_bytes=memory_bytes, through_mps=through_mps)


def test_a_lease_within_its_own_is_left_alone():
    assert overrun(holder(), [reading(process(memory_bytes=4 * GIB), process(99, 70 * GIB))]) is None


def test_all_processes_of_a_lease_count_together_and_the_witness_has_the_figures():
    found = overrun(holder(pids=(10, 11)), [reading(process(10, 3 * GIB), process(11, 2 * GIB))])
    assert found is not None
    assert found.kind is ExitKind.OUT_OF_MEMORY
    assert str(5 * GIB) in found.witness
    assert str(4 * GIB) in found.witness


def test_a_device_that_is_not_the_leases_own_is_named():
    found = overrun(holder(uuids=()), [reading(process())])
    assert found is not None
    assert found.kind is ExitKind.FAILED
    assert "GPU-0 is not its own" in found.witness


def test_who_goes_around_mps_is_found_only_when_both_driver_and_daemon_say_so():
    mine = holder(mps=True)
    assert overrun(mine, [reading(process(), clients=frozenset())]) is not None
    assert overrun(mine, [reading(process(through_mps=True), clients=frozenset())]) is None
    assert overrun(mine, [reading(process(), clients=frozenset({10}))]) is None
    assert overrun(mine, [reading(process(), clients=None)]) is None, "a daemon that does not answer accuses nobody"


def test_what_a_context_takes_beside_the_bound_that_mps_holds_is_no_overrun():
    through = holder(mps=True)
    assert overrun(through, [reading(process(memory_bytes=4 * GIB + CONTEXT_BYTES, through_mps=True))]) is None
    assert overrun(through, [reading(process(memory_bytes=4 * GIB + CONTEXT_BYTES + 1, through_mps=True))]) is not None


def test_use_is_the_leases_own_part_and_a_lease_without_a_process_there_is_idle():
    seen = [reading(process(10), process(20), busy=0.9, busy_by_process={10: 0.25, 20: 0.5})]
    assert used(holder(), seen).busy == pytest.approx(0.25)
    assert used(holder(), seen).memory_bytes == GIB
    assert used(holder(pids=(30,)), seen).busy == 0.0


def test_who_may_be_at_work_is_never_called_idle():
    assert used(holder(), [reading(process(), busy=None, busy_by_process=None)]).busy == 1.0
    assert used(holder(), [reading(process(), busy=0.75, busy_by_process={})]).busy == 0.75
    through = holder(mps=True)
    assert used(through, [reading(process(through_mps=True), busy=0.8, busy_by_process={5: 0.8})], {"GPU-0": 0.8}).busy == 0.8


def test_use_comes_into_a_usage_beside_what_else_it_says():
    usage = used(holder(), [reading(process(), busy_by_process={10: 0.5})]).added_to(Usage(at_s=1.0, cpu_s=2.0))
    assert (usage.cpu_s, usage.gpu_busy, usage.gpu_memory_bytes) == (2.0, 0.5, GIB)


class FakeNvml:
    def __init__(self):
        self.seen = {}

    def processes(self, uuid):
        return self.seen.get(uuid, ())

    def busy(self, uuid):
        return 0.0

    def busy_by_process(self, uuid):
        return {}


def test_one_look_alone_ends_nobody_and_an_interruption_begins_anew():
    nvml = FakeNvml()
    watch = GpuWatch(nvml, ("GPU-0",))
    nvml.seen = {"GPU-0": (process(memory_bytes=5 * GIB),)}
    assert watch.look([holder()])[1] == []
    nvml.seen = {}
    assert watch.look([holder()])[1] == []
    nvml.seen = {"GPU-0": (process(memory_bytes=5 * GIB),)}
    assert watch.look([holder()])[1] == []
    assert [over.handle.lease_id for over in watch.look([holder()])[1]] == ["a"]


def test_the_daemon_is_asked_only_when_the_driver_does_not_say_who_goes_through_it():
    class Asked:
        times = 0

        def clients(self, uuid):
            self.times += 1
            return frozenset()

    nvml, mps = FakeNvml(), Asked()
    watch = GpuWatch(nvml, ("GPU-0",), mps=mps)
    nvml.seen = {"GPU-0": (process(through_mps=True), process(99))}
    watch.look([holder(mps=True)])
    assert mps.times == 0
    nvml.seen = {"GPU-0": (process(),)}
    watch.look([holder(mps=True)])
    assert mps.times == 1


def test_devices_are_declared_only_where_there_are_none():
    assert declare((), None, model="", memory_bytes=0) == ()
    made = declare((), 2, model="H100", memory_bytes=80 * GIB)
    assert [(gpu.index, gpu.model, gpu.uuid, gpu.parts) for gpu in made] == [
        (0, "H100", "", "declared"),
        (1, "H100", "", "declared"),
    ]
    real = (Gpu(index=0, model="A100", uuid="GPU-0"),)
    assert declare(real, 1, model="", memory_bytes=0) == ()
    with pytest.raises(Refused, match="this one has 1 \\(A100\\)"):
        declare(real, 1, model="H100", memory_bytes=0)


class FakeRuntimes:
    """Leases by id: their devices, their processes; counts whose processes were asked for."""

    def __init__(self, leases):
        self.leases, self.asked, self.stopped = leases, [], []

    def gpu(self, lease_id):
        return {"uuids": self.leases[lease_id][0], "memory_bytes": 4 * GIB, "mps": None}

    def pids(self, handle):
        self.asked.append(handle.lease_id)
        return frozenset(self.leases[handle.lease_id][1])

    def newest_fence(self, lease_id):
        return 7

    def stop(self, handle, *, grace_s, fence, kind, why):
        self.stopped.append((handle.lease_id, grace_s, fence, kind))


def guard_over(leases):
    runtimes, nvml = FakeRuntimes(leases), FakeNvml()
    guard = GpuGuard(runtimes, GpuWatch(nvml, ("GPU-0",)))
    guard.watch([holder(lease_id).handle for lease_id in leases])
    return guard, runtimes, nvml


def test_nobody_is_looked_through_while_nobody_is_on_a_device():
    guard, runtimes, _ = guard_over({"gpu": (("GPU-0",), (10,)), "cpu": ((), (20,))})
    guard.look()
    assert runtimes.asked == []


def test_leases_without_devices_are_looked_through_once_for_each_process_that_is_nobodys():
    guard, runtimes, nvml = guard_over({"gpu": (("GPU-0",), (10,)), "cpu": ((), (20,))})
    nvml.seen = {"GPU-0": (process(10),)}
    guard.look()
    assert runtimes.asked == ["gpu"]
    nvml.seen = {"GPU-0": (process(10), process(os.getpid()))}  # such as a server of MPS
    guard.look()
    guard.look()
    assert runtimes.asked == ["gpu", "gpu", "cpu", "gpu"]


def test_a_lease_that_is_heard_of_after_its_process_was_seen_is_looked_through_after_all():
    guard, runtimes, nvml = guard_over({"gpu": (("GPU-0",), (10,)), "cpu": ((), (os.getpid(),))})
    guard.watch([holder("gpu").handle])
    nvml.seen = {"GPU-0": (process(10), process(os.getpid()))}
    guard.look()
    guard.watch([holder("gpu").handle, holder("cpu").handle])
    guard.look()
    guard.look()
    assert [stopped[0] for stopped in runtimes.stopped] == ["cpu"]


def test_who_takes_a_device_that_is_not_its_own_is_stopped_with_the_newest_fence_and_no_grace():
    guard, runtimes, nvml = guard_over({"gpu": (("GPU-0",), (10,)), "cpu": ((), (20,))})
    nvml.seen = {"GPU-0": (process(10), process(20))}
    guard.look()
    assert runtimes.stopped == []
    guard.look()
    assert runtimes.stopped == [("cpu", 0.0, 7, ExitKind.FAILED)]


def test_use_is_told_until_a_lease_leaves_the_device():
    guard, _, nvml = guard_over({"gpu": (("GPU-0",), (10,))})
    nvml.seen = {"GPU-0": (process(10),)}
    guard.look()
    assert guard.with_use(holder("gpu").handle, Usage(at_s=1.0)).gpu_memory_bytes == GIB
    nvml.seen = {}
    guard.look()
    assert guard.with_use(holder("gpu").handle, Usage(at_s=1.0)).gpu_memory_bytes == 0


def test_a_driver_that_hangs_does_not_keep_the_agent_from_leaving():
    guard, _, nvml = guard_over({"gpu": (("GPU-0",), (10,))})
    began, hangs = threading.Event(), threading.Event()

    def never(uuid):
        began.set()
        hangs.wait(60)
        return ()

    nvml.processes = never
    guard._every_s = 0.0
    guard.start()
    assert began.wait(30)
    guard.close()  # returns although the look has not
    assert not hangs.is_set()
    hangs.set()
