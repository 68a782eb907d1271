"""The meter of an experiment's parties while one cell runs: exact CPU, its highest and lowest 50 ms, memory, the GPU.

    server = the server's process and its instances      recogniser = the instances alone
    app    = the application's process, client included  (in-process the recogniser is in it)

A thread reads each process's CPU clock (a µs) and memory (20 µs) at a period; what it costs is counted. Memory
that several processes map is shared out among them once the cell is over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from tenure.meter.process import ProcessSampler, shared_memory_bytes
from tenure.meter.sample import HostSampler, Sampler

PERIOD_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PartyUse:
    """What one party used during a cell."""

    cpu_s: float
    cores_min: float
    cores_max: float
    memory_bytes: float
    """The highest reading."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellUse:
    """What was used during a cell."""

    span_s: float
    """From the first reading to the last: a ms longer than the cell."""
    parties: Mapping[str, PartyUse]
    host_cpu_s: float = 0.0
    """Of the whole machine, in clock ticks."""
    gpu_busy: float = 0.0
    gpu_busy_max: float = 0.0
    gpu_busy_min: float = 0.0
    gpu_memory_bytes: float = 0.0


class _Party:
    """The readings of one party so far."""

    def __init__(self, samplers: Sequence[ProcessSampler]) -> None:
        self.samplers = samplers
        self.first_s = self.last_s = 0.0
        """CPU clock at the first reading, and at the last."""
        self.cores_min, self.cores_max = float("inf"), 0.0
        self.memory_bytes = 0.0
        self._from_s, self._from_at_s = 0.0, 0.0

    def read(self) -> None:
        """Take one reading; the first one only begins."""
        usages = [usage for sampler in self.samplers if (usage := sampler.sample()) is not None]
        if not usages:
            return
        at_s, self.last_s = time.monotonic(), sum(usage.cpu_s for usage in usages)
        self.memory_bytes = max(self.memory_bytes, float(sum(usage.memory_bytes for usage in usages)))
        if not self._from_at_s:
            self.first_s = self.last_s
        elif at_s - self._from_at_s > PERIOD_S / 2:
            cores = max(0.0, self.last_s - self._from_s) / (at_s - self._from_at_s)
            self.cores_min, self.cores_max = min(self.cores_min, cores), max(self.cores_max, cores)
        else:  # a rest at the end, too short to be told from the clocks' own jitter
            return
        self._from_s, self._from_at_s = self.last_s, at_s


class PartyMeter:
    """Watches one cell after the other. A context manager: lets go of its files at the end."""

    def __init__(self, gpu: Callable[[], Sampler] | None = None) -> None:
        """gpu: makes the sampler of the GPU, where there is one."""
        self._samplers: dict[int, ProcessSampler] = {}
        self._host = HostSampler()
        self._gpu = gpu() if gpu else None
        self._parties: dict[str, _Party] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._gpu_busy: list[float] = []
        self._gpu_memory_bytes = 0
        self._began_s = 0.0
        self._host_s = 0.0
        self.watched_s = 0.0
        """Seconds of cells so far."""
        self.overhead_s = 0.0
        """CPU seconds of the meter meanwhile. Its first and last readings lie outside of the cells' clocks."""

    def begin(self, parties: Mapping[str, tuple[int, ...]]) -> None:
        """Take the first readings of parties (name -> process ids), and go on in a thread."""
        wanted = {pid for pids in parties.values() for pid in pids}
        for pid in [pid for pid, sampler in self._samplers.items() if pid not in wanted and sampler.lost]:
            self._samplers.pop(pid).close()
        for pid in wanted:
            if pid not in self._samplers or self._samplers[pid].lost:
                self._samplers[pid] = ProcessSampler(pid)
        self._parties = {name: _Party([self._samplers[pid] for pid in pids]) for name, pids in parties.items()}
        self._gpu_busy, self._gpu_memory_bytes = [], 0
        self._stopping = threading.Event()
        host = self._host.sample()
        self._host_s, self._began_s = host.cpu_s if host else 0.0, time.monotonic()
        self._read()
        self._thread = threading.Thread(target=self._run, name="tenure-parties", daemon=True)
        self._thread.start()

    def end(self) -> CellUse:
        """Take the last readings and return what was used since `begin`."""
        assert self._thread is not None
        self._stopping.set()
        self._thread.join(5.0)
        self._read()
        span_s = time.monotonic() - self._began_s
        host = self._host.sample()
        uses = {name: _use(party, span_s) for name, party in self._parties.items()}
        self.watched_s += span_s
        return CellUse(
            span_s=span_s,
            parties=uses,
            host_cpu_s=max(0.0, host.cpu_s - self._host_s) if host else 0.0,
            gpu_busy=sum(self._gpu_busy) / len(self._gpu_busy) if self._gpu_busy else 0.0,
            gpu_busy_max=max(self._gpu_busy, default=0.0),
            gpu_busy_min=min(self._gpu_busy, default=0.0),
            gpu_memory_bytes=float(self._gpu_memory_bytes),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stopping.set()
        for sampler in self._samplers.values():
            sampler.close()
        if self._gpu is not None:
            self._gpu.close()

    def _read(self) -> None:
        for party in self._parties.values():
            party.read()
        if self._gpu is not None and (usage := self._gpu.sample()) is not None:
            self._gpu_busy.append(usage.gpu_busy)
            self._gpu_memory_bytes = max(self._gpu_memory_bytes, usage.gpu_memory_bytes)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            self._read()
        self.overhead_s += time.thread_time()


def _use(party: _Party, span_s: float) -> PartyUse:
    """Return what a party used, its shared memory counted by its share of it."""
    pairs = [shared_memory_bytes(sampler.pid) for sampler in party.samplers if not sampler.lost]
    counted_twice = sum(mapped - own for mapped, own in pairs)
    cpu_s = max(0.0, party.last_s - party.first_s)
    mean = cpu_s / span_s if span_s > 0 else 0.0
    return PartyUse(
        cpu_s=cpu_s,
        cores_min=min(party.cores_min, mean),  # a cell shorter than a period has no other
        cores_max=max(party.cores_max, mean),
        memory_bytes=max(0.0, party.memory_bytes - counted_twice),
    )


__all__ = ["PERIOD_S", "CellUse", "PartyMeter", "PartyUse"]
