"""The height of memory between two looks: what the kernel's own height says of it, page cache left out."""

import pytest

from tenure.runtimes.shim import Shim

MIB = 1 << 20


class Group:
    """A control group as its files tell of it."""

    height = charge = memory = 0

    def highest_charge_bytes(self):
        return self.height

    def charge_bytes(self):
        return self.charge

    def memory_bytes(self, pid):
        return self.memory

    def set(self, *, memory, cache, height=0):
        self.memory, self.charge = memory * MIB, (memory + cache) * MIB
        self.height = max(self.height, self.charge, height * MIB)


@pytest.fixture
def shim():
    made = Shim.__new__(Shim)
    made._confinement, made._peak_bytes, made._beside_bytes = Group(), 0, 0
    return made


def test_what_came_and_went_between_two_looks_counts(shim):
    shim._confinement.set(memory=50, cache=4)
    shim._look_at_memory()
    shim._confinement.set(memory=48, cache=4, height=124)
    shim._look_at_memory()
    assert shim._peak_bytes == 120 * MIB


def test_page_cache_that_stays_is_not_taken_for_memory(shim):
    shim._confinement.set(memory=50, cache=0)
    shim._look_at_memory()
    shim._confinement.set(memory=50, cache=400)
    shim._look_at_memory()
    shim._confinement.set(memory=50, cache=10)
    shim._look_at_memory()
    assert shim._peak_bytes == 50 * MIB


def test_a_kernel_that_keeps_no_height_leaves_that_of_the_looks(shim):
    shim._confinement.set(memory=50, cache=4)
    shim._confinement.height = 0
    assert shim._look_at_memory() == 50 * MIB
    assert shim._peak_bytes == 50 * MIB
