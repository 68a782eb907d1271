"""Many readings: a thread that samples parties at a period, keeps the latest in a bounded ring, and sums all of them up.

Not here: what one reading costs or means (`sample`), and where rollups are kept (the ledger).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from tenure.errors import SpecError
from tenure.meter.sample import Sampler
from tenure.usage import Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSummary:
    """What one party used while it was watched: all readings, also those that left the ring. Energy is not measured."""

    samples: int
    span_s: float
    """From the first reading to the last."""
    cpu_s: float = 0.0
    """CPU seconds used within the span."""
    cpu_cores_mean: float = 0.0
    """cpu_s / span_s."""
    cpu_cores_min: float = 0.0
    """Of the intervals between readings, which resolve one clock tick (usually 10 ms) of CPU."""
    cpu_cores_max: float = 0.0
    memory_mean_bytes: float = 0.0
    """Each reading counts the same."""
    memory_min_bytes: int = 0
    memory_max_bytes: int = 0
    """The highest reading, or a higher peak that the sampler itself knows of."""
    read_bytes: int = 0
    write_bytes: int = 0
    gpu_busy_mean: float = 0.0
    gpu_memory_max_bytes: int = 0
    lost: str = ""
    """Why the party is no longer watched; empty while it is."""


class _Tally:
    """Running sums of one party."""

    def __init__(self, ring: int) -> None:
        self.ring: deque[Usage] = deque(maxlen=ring)
        self.first: Usage | None = None
        self.last: Usage | None = None
        self.first_s = self.last_s = 0.0
        self.count = 0
        self.cores_min, self.cores_max = float("inf"), 0.0
        self.memory_sum, self.memory_min, self.memory_max = 0, 0, 0
        self.gpu_sum, self.gpu_memory_max = 0.0, 0

    def add(self, usage: Usage, at_s: float) -> None:
        """Take in one reading; at_s is monotonic."""
        if self.last is None:
            self.first, self.first_s, self.memory_min = usage, at_s, usage.memory_bytes
        elif at_s > self.last_s:
            cores = (usage.cpu_s - self.last.cpu_s) / (at_s - self.last_s)
            self.cores_min, self.cores_max = min(self.cores_min, cores), max(self.cores_max, cores)
        self.last, self.last_s = usage, at_s
        self.count += 1
        self.memory_sum += usage.memory_bytes
        self.memory_min = min(self.memory_min, usage.memory_bytes)
        self.memory_max = max(self.memory_max, usage.memory_bytes, usage.peak_memory_bytes)
        self.gpu_sum += usage.gpu_busy
        self.gpu_memory_max = max(self.gpu_memory_max, usage.gpu_memory_bytes)
        self.ring.append(usage)

    def summary(self, lost: str) -> WatchSummary:
        """Return the sums so far."""
        if self.first is None or self.last is None:
            return WatchSummary(samples=0, span_s=0.0, lost=lost)
        span_s, cpu_s = self.last_s - self.first_s, self.last.cpu_s - self.first.cpu_s
        return WatchSummary(
            samples=self.count,
            span_s=span_s,
            cpu_s=cpu_s,
            cpu_cores_mean=cpu_s / span_s if span_s > 0 else 0.0,
            cpu_cores_min=self.cores_min if self.count > 1 else 0.0,
            cpu_cores_max=self.cores_max,
            memory_mean_bytes=self.memory_sum / self.count,
            memory_min_bytes=self.memory_min,
            memory_max_bytes=self.memory_max,
            read_bytes=self.last.read_bytes - self.first.read_bytes,
            write_bytes=self.last.write_bytes - self.first.write_bytes,
            gpu_busy_mean=self.gpu_sum / self.count,
            gpu_memory_max_bytes=self.gpu_memory_max,
            lost=lost,
        )


class Watcher:
    """Samples parties by name, in one thread, until stopped. A context manager: starts on entry, stops on exit.

    period_s: time between readings, >= 0.001; a late reading is not made up for. max_samples: how many readings the ring keeps
    per party, >= 1. The watcher owns the samplers: `stop` closes them.
    """

    def __init__(self, samplers: Mapping[str, Sampler], period_s: float = 0.1, max_samples: int = 6000) -> None:
        if not 0.001 <= period_s <= 3600 or max_samples < 1:
            raise SpecError(
                f"a watcher needs a period of 0.001 to 3600 s and a ring of at least 1; found {period_s!r}, {max_samples!r}"
            )
        self.period_s = period_s
        self._samplers = dict(samplers)
        self._tallies = {name: _Tally(max_samples) for name in self._samplers}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._overhead_s = 0.0

    def start(self) -> None:
        """Begin in a thread of its own, with a first reading at once."""
        if self._thread is None and not self._stopping.is_set():
            self._thread = threading.Thread(target=self._run, name="tenure-watcher", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Take a last reading, end the thread and close the samplers. Idempotent. Waits timeout_s at most."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None
        else:
            self._close()

    def sample_once(self) -> None:
        """Read every party that is still there, now. For callers with a loop of their own instead of the thread."""
        for name, sampler in self._samplers.items():
            if not sampler.lost and (usage := sampler.sample()) is not None:
                with self._lock:
                    self._tallies[name].add(usage, time.monotonic())

    def latest(self) -> dict[str, Usage]:
        """Return each party's last reading; parties never read are left out."""
        with self._lock:
            return {name: tally.last for name, tally in self._tallies.items() if tally.last is not None}

    def history(self, name: str) -> tuple[Usage, ...]:
        """Return the readings that the ring of one party holds, oldest first. Raises SpecError for an unknown name."""
        with self._lock:
            return tuple(self._tally(name).ring)

    def summary(self, name: str) -> WatchSummary:
        """Return the sums of one party so far. Raises SpecError for an unknown name."""
        with self._lock:
            return self._tally(name).summary(self._lost(name))

    def summaries(self) -> dict[str, WatchSummary]:
        """Return the sums of all parties."""
        with self._lock:
            return {name: tally.summary(self._lost(name)) for name, tally in self._tallies.items()}

    @property
    def overhead_s(self) -> float:
        """CPU seconds that the watching thread itself has used."""
        return self._overhead_s

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _lost(self, name: str) -> str:
        lost = self._samplers[name].lost
        return "" if lost == "closed" else lost

    def _tally(self, name: str) -> _Tally:
        if name not in self._tallies:
            raise SpecError(f"nothing named {name!r} is watched; watched: {', '.join(sorted(self._tallies)) or 'nothing'}")
        return self._tallies[name]

    def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            self.sample_once()
            self._overhead_s = time.thread_time()
            if self._stopping.is_set():
                break
            due_s = max(due_s + self.period_s, time.monotonic())
            self._stopping.wait(due_s - time.monotonic())
        self._close()

    def _close(self) -> None:
        for sampler in self._samplers.values():
            sampler.close()
