import json
import os

import pytest
from tests.gpu.fakes import device
from tests.gpu.machine import GIB, divided, uuid, whole

from tenure.meter.machine import capacity, machine
from tenure.meter.nvml import Nvml, gpus


def hold(number, pid=None, **fields):
    """Have a process (this one) hold a context on a device."""
    device.note(pid or os.getpid(), **({"uuid": uuid(number), "memory_bytes": GIB, "mps": False, "busy": 0.25} | fields))


def test_devices_are_listed_with_what_the_driver_calls_them(here):
    device.make(here.folder, whole(0), whole(1, memory_bytes=80 * GIB))
    found = gpus()
    assert [(gpu.index, gpu.uuid, gpu.memory_bytes, gpu.instance) for gpu in found] == [
        (0, uuid(0), 16 * GIB, False),
        (1, uuid(1), 80 * GIB, False),
    ]
    assert capacity().gpus == found
    assert (machine().gpus, machine().gpu_model) == (2, "NVIDIA Fake")


def test_a_divided_device_gives_its_instances_in_its_place_each_with_an_index_of_its_own(here):
    device.make(here.folder, whole(0), divided(1, instances=2), whole(2))
    found = gpus()
    assert [gpu.uuid for gpu in found] == [uuid(0), "MIG-10", "MIG-11", uuid(2)]
    assert [gpu.index for gpu in found] == [0, 1, 2, 3]
    assert [gpu.instance for gpu in found] == [False, True, True, False]


def test_a_divided_device_without_instances_offers_nothing(here):
    device.make(here.folder, divided(0, instances=0))
    assert gpus() == ()


def test_a_driver_that_does_not_answer_is_no_device(here):
    (here.folder / "devices.json").unlink()
    assert gpus() == ()


def test_nothing_is_loaded_on_a_machine_without_a_device_file(monkeypatch):
    monkeypatch.delenv("TENURE_NVML", raising=False)
    monkeypatch.setattr("tenure.meter.nvml.DEVICE_FILES", ("/no/such/file",))
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)  # importing it would raise
    assert gpus() == ()


def test_processes_are_told_apart_by_whether_they_go_through_mps(here):
    hold(0)
    hold(0, pid=os.getppid(), memory_bytes=2 * GIB, mps=True)
    found = {each.pid: each for each in Nvml().processes(uuid(0))}
    assert (found[os.getpid()].memory_bytes, found[os.getpid()].through_mps) == (GIB, False)
    assert (found[os.getppid()].memory_bytes, found[os.getppid()].through_mps) == (2 * GIB, True)


def test_busy_is_per_device_and_per_process_and_unknown_for_instances(here):
    device.make(here.folder, whole(0), divided(1))
    nvml = Nvml()
    assert nvml.busy_by_process(uuid(0)) == {}
    hold(0)
    assert nvml.busy(uuid(0)) == pytest.approx(0.25)
    assert nvml.busy_by_process(uuid(0)) == {os.getpid(): 0.25}
    assert nvml.busy("MIG-10") is None
    assert nvml.busy_by_process("MIG-10") is None


def test_a_process_that_has_died_is_no_longer_listed(here):
    (here.folder / "processes" / "4194304.json").write_text(json.dumps({"uuid": uuid(0), "memory_bytes": 1, "mps": False}))
    assert Nvml().processes(uuid(0)) == ()
