"""Right-sizing: the envelope that a lease's use speaks for, smaller or larger, with the risk that it is too small.

    usage ──► `UseHistory`: windows (highest memory, mean cores) ──► `right_size` ──► a proposal, or nothing to change

The risk is free of assumptions on what use looks like: of n windows and one more, in no order that matters, the last holds the
highest memory with probability 1 / (n + 1). So a bound at the highest seen is passed in the next window with at most that; what
is added on top (`HEADROOM`) makes it less, by how much nobody knows. It speaks of one window: after each, use is looked at
anew, and a bound that gets tight is raised. Where order does matter, since memory rises, nothing is made smaller.
Weighed and rejected: a fitted tail (needs hundreds of windows to say more than this does); memory by a quantile of the windows
(it dies of what one in twenty does, and CPU does not: for cores it is used). Pure. Not here: who may apply it, and how.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tenure.errors import SpecError
from tenure.resources import Envelope, show_bytes
from tenure.usage import Usage

MAX_RISK = 0.05
HEADROOM = 0.125
"""Over the highest memory that was seen: the kernel needs a little to work with, and samples miss what is brief."""
CPU_HEADROOM = 0.15
GROW = 1.5
"""What is multiplied with where the bound itself may have kept use from being higher."""
TIGHT = 0.95
"""Of a memory bound: from here on it is raised. More than 1 / (1 + HEADROOM), or what was just made smaller would grow."""
CPU_TIGHT = 0.95
LEAST_CHANGE = 0.1
"""Share of a bound below which a change is not worth it."""
RISING = 1.02
"""Memory rises when the last quarter of the windows is higher than all before it by so much."""
LEAST_MEMORY_BYTES = 16 << 20
LEAST_CPUS = 0.1
MAX_WINDOWS = 240
_MIB = 1 << 20
_CPU_STEP = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a lease used within one stretch of time."""

    peak_memory_bytes: int
    cpus: float
    """Cores in use, the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """An envelope that fits better than the present one."""

    envelope: Envelope
    risk: float
    """Most likely share of next windows in which memory passes the highest seen, which lies below the proposed bound."""
    why: str


class UseHistory:
    """Makes windows of samples. A new attempt, whose counters begin anew, begins anew here too."""

    def __init__(self, window_s: float, *, max_windows: int = MAX_WINDOWS) -> None:
        """window_s: how long a window is at least; it ends with the first sample after that."""
        if not window_s > 0:
            raise SpecError(f"a window must be longer than 0 s; found {window_s!r}")
        self._window_s = window_s
        self._windows: deque[Window] = deque(maxlen=max_windows)
        self._first: Usage | None = None
        self._last: Usage | None = None
        self._peak_bytes = 0

    @property
    def windows(self) -> tuple[Window, ...]:
        """The windows that are complete, oldest first."""
        return tuple(self._windows)

    def take(self, sample: Usage) -> bool:
        """Take a sample in; return whether it completed a window. One not newer than the last is passed over."""
        last = self._last
        if last is not None and sample.at_s <= last.at_s:
            return False
        if (
            self._first is None
            or last is None
            or sample.cpu_s < last.cpu_s
            or sample.peak_memory_bytes < last.peak_memory_bytes
        ):
            self._windows.clear()
            self._first, self._last, self._peak_bytes = sample, sample, max(sample.memory_bytes, sample.peak_memory_bytes)
            return False
        # A peak that grew was reached since the last sample; one that did not says nothing of this window.
        grew = sample.peak_memory_bytes > last.peak_memory_bytes
        self._peak_bytes = max(self._peak_bytes, sample.memory_bytes, sample.peak_memory_bytes if grew else 0)
        self._last = sample
        took_s = sample.at_s - self._first.at_s
        if took_s < self._window_s:
            return False
        cpus = max(0.0, sample.cpu_s - self._first.cpu_s) / took_s
        self._windows.append(Window(peak_memory_bytes=self._peak_bytes, cpus=cpus))
        self._first, self._peak_bytes = sample, sample.memory_bytes
        return True


def right_size(windows: Sequence[Window], present: Envelope, *, max_risk: float = MAX_RISK) -> Proposal | None:
    """Return what the windows, oldest first, speak for; None when the present envelope fits, or too little was seen.

    max_risk: that memory passes the highest seen in the next window; nothing gets smaller before 1 / max_risk - 1 windows.
    Devices, disk and times stay. Raises SpecError for a risk outside 0..1.
    """
    if not 0 < max_risk < 1:
        raise SpecError(f"the risk must lie between 0 and 1; found {max_risk!r}")
    if not windows:
        return None
    memory_bytes, memory_why = _memory(windows, present.memory_bytes, max_risk)
    cpus, cpu_why = _cpus(windows, present.cpus, max_risk)
    if (memory_bytes, cpus) == (present.memory_bytes, present.cpus):
        return None
    return Proposal(
        envelope=replace(present, memory_bytes=memory_bytes, cpus=cpus),
        risk=1 / (len(windows) + 1),
        why="; ".join(why for why in (memory_why, cpu_why) if why),
    )


def _memory(windows: Sequence[Window], bound: int, max_risk: float) -> tuple[int, str]:
    peaks = [window.peak_memory_bytes for window in windows]
    highest = max(peaks)
    if max(peaks[-2:]) >= TIGHT * bound:
        return _mib(GROW * bound), f"memory came to {show_bytes(highest)}, close to its bound: more may be needed than was seen"
    if not _is_enough(windows, max_risk) or _is_rising(peaks):
        return bound, ""
    wanted = max(_mib(highest * (1 + HEADROOM)), LEAST_MEMORY_BYTES)
    if wanted > (1 - LEAST_CHANGE) * bound:
        return bound, ""
    risk = 1 / (len(windows) + 1)
    return wanted, (
        f"memory came to {show_bytes(highest)} at most in {len(windows)} windows, and {HEADROOM:.1%} is added: "
        f"the next window is higher than all of them with a risk of at most {risk:.1%}"
    )


def _cpus(windows: Sequence[Window], bound: float, max_risk: float) -> tuple[float, str]:
    used = [window.cpus for window in windows]
    recent = used[-max(2, len(used) // 4) :]
    if len(recent) >= 2 and min(recent) >= CPU_TIGHT * bound:
        return _step(GROW * bound), f"it uses all of its {bound:g} cores: it may run faster with more"
    if not _is_enough(windows, max_risk):
        return bound, ""
    rank = min(len(used), math.ceil((1 - max_risk) * (len(used) + 1)))
    level = sorted(used)[rank - 1]
    wanted = max(_step(level * (1 + CPU_HEADROOM)), LEAST_CPUS)
    if wanted > (1 - LEAST_CHANGE) * bound:
        return bound, ""
    return (
        wanted,
        f"{level:.2f} cores were enough in {rank / (len(used) + 1):.0%} of the windows, and {CPU_HEADROOM:.0%} is added",
    )


def _is_enough(windows: Sequence[Window], max_risk: float) -> bool:
    return 1 / (len(windows) + 1) <= max_risk


def _is_rising(peaks: Sequence[int]) -> bool:
    late = max(1, len(peaks) // 4)
    return max(peaks[-late:]) > RISING * max(peaks[:-late], default=0)


def _mib(size_bytes: float) -> int:
    return math.ceil(size_bytes / _MIB) * _MIB


def _step(cpus: float) -> float:
    return round(math.ceil(cpus / _CPU_STEP - 1e-9) * _CPU_STEP, 2)
