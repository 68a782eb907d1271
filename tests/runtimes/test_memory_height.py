"""The height of memory between two looks: what the kernel's own height says of it, page cache left out."""

import pytest

from tenure.runtimes.memory_height import MemoryHeight

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
def group():
    return Group()


def test_what_came_and_went_between_two_looks_counts(group):
    memory = MemoryHeight()
    group.set(memory=50, cache=4)
    memory.look(group, 1)
    group.set(memory=48, cache=4, height=124)
    memory.look(group, 1)
    assert memory.peak_bytes == 120 * MIB


def test_page_cache_that_stays_is_not_taken_for_memory(group):
    memory = MemoryHeight()
    group.set(memory=50, cache=0)
    memory.look(group, 1)
    group.set(memory=50, cache=400)
    memory.look(group, 1)
    group.set(memory=50, cache=10)
    memory.look(group, 1)
    assert memory.peak_bytes == 50 * MIB


def test_a_kernel_that_keeps_no_height_leaves_that_of_the_looks(group):
    memory = MemoryHeight()
    group.set(memory=50, cache=4)
    group.height = 0
    assert memory.look(group, 1) == 50 * MIB
    assert memory.peak_bytes == 50 * MIB
    memory.saw(20 * MIB)
    assert memory.peak_bytes == 50 * MIB
