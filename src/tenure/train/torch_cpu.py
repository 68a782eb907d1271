"""What every program that computes with torch on a CPU needs: the lease's threads, and random numbers from a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EVALUATED_AT_ONCE = 256
"""Held-out examples handed to a model in one call: bounds its memory."""


def obey_threads() -> None:
    """Have torch use the threads that OMP_NUM_THREADS names, even if it was loaded before that was set."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    if named.isdigit() and int(named) > 0 and torch.get_num_threads() != int(named):
        torch.set_num_threads(int(named))
    try:
        torch.set_num_interop_threads(torch.get_num_threads())
    except RuntimeError:
        pass  # can be set once in a process, and it was


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from `seed`, and leave its generator as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
