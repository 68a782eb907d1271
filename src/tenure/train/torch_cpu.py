"""What every program that computes with torch on a CPU needs: the lease's threads, memory that stays, seeded random numbers."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EVALUATED_AT_ONCE = 256
"""Held-out examples handed to a model in one call: bounds its memory."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def obey_threads() -> None:
    """Have torch use the threads that OMP_NUM_THREADS names, even if it was loaded before that was set."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0 and torch.get_num_threads() != int(named):
        torch.set_num_threads(int(named))
    try:
        torch.set_num_interop_threads(torch.get_num_threads())
    except RuntimeError:
        pass  # can be set once in a process, and it was


def keep_memory() -> None:
    """Have freed memory stay with the process, where the C library can be told so.

    Each step frees what the next one needs again. glibc gives blocks of megabytes back to the system at once and then pays a
    page fault per 4 KiB: 2,400 to 4,700 faults and a tenth of the CPU time of a step of benchmarks/programs, with the same
    peak of memory.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(parameter, 1 << 30)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed`, and leave its generator as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
