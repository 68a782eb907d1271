"""How much memory an attempt holds, and the most that it ever held, from looks and from the kernel's own height.

Not here: what is done about too much of it (`shim`), where the numbers are read (`confine`).
"""

from __future__ import annotations

from tenure.runtimes.confine import Confinement


class MemoryHeight:
    """The memory of one attempt over time. `peak_bytes`: its height so far."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._beside_bytes = 0
        """The most that was ever seen charged beside what counts as memory: page cache, the kernel's own."""

    def saw(self, used_bytes: int) -> None:
        """Take note of memory that was in use."""
        self.peak_bytes = max(self.peak_bytes, used_bytes)

    def look(self, confinement: Confinement, shim_pid: int) -> int:
        """Return the memory in use now, and keep its height: that of the looks, and what came and went between two of them.

        The kernel keeps the height of all that is charged. Less the most that was ever seen beside memory, it was memory: a
        lower bound, unless page cache came and went between two looks as well. The looks before and after the charge are
        taken together, so that what grows meanwhile is not taken for something beside.
        """
        height = confinement.highest_charge_bytes()  # first: what is charged since is seen below
        used = confinement.memory_bytes(shim_pid)
        if height:
            charged = confinement.charge_bytes()
            self._beside_bytes = max(self._beside_bytes, charged - max(used, confinement.memory_bytes(shim_pid)))
        self.saw(max(used, height - self._beside_bytes if height else 0))
        return used
