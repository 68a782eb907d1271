import pytest

from tenure.devices import hold, memory_bound
from tenure.resources import DeviceShare, Gpu

GIB = 1 << 30


def gpu(**fields):
    return Gpu(**({"index": 0, "model": "H100", "memory_bytes": 80 * GIB, "uuid": "GPU-0", "parts": "mps"} | fields))


PART = (DeviceShare(index=0, fraction=0.5, memory_bytes=10 * GIB),)
WHOLE = (DeviceShare(index=0, fraction=1.0, memory_bytes=80 * GIB),)


def test_a_lease_without_devices_has_nothing_to_hold():
    assert hold((gpu(),), (), runtime="process") is None


@pytest.mark.parametrize(
    ("gpus", "devices", "runtime", "share", "memory", "words"),
    [
        ((gpu(),), WHOLE, "process", "upper", "exact", "whole devices"),
        ((gpu(),), WHOLE, "container", "exact", "exact", "no other"),
        ((gpu(instance=True, parts="polled"),), WHOLE, "process", "upper", "exact", "MIG"),
        ((gpu(),), PART, "process", "advisory", "upper", "CUDA MPS: 0.5"),
        ((gpu(),), PART, "container", "advisory", "upper", "polled"),
        ((gpu(parts="polled"),), PART, "process", "advisory", "upper", "more than 10.0 GiB"),
        ((gpu(uuid="", parts="declared"),), PART, "process", "advisory", "advisory", "declared only"),
        ((), PART, "process", "advisory", "advisory", "declared only"),
    ],
)
def test_how_far_devices_are_held_is_said_truthfully(gpus, devices, runtime, share, memory, words):
    found = hold(gpus, devices, runtime=runtime)
    assert (found.share, found.memory) == (share, memory)
    assert words in found.means


def test_what_was_not_asked_for_is_bounded_to_the_same_part_of_the_device():
    assert memory_bound(gpu(), DeviceShare(index=0, fraction=0.25)) == 20 * GIB
    assert memory_bound(gpu(), PART[0]) == 10 * GIB
