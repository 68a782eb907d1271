"""Usage as Prometheus text. Not here: the HTTP endpoint that hands it out, and how usage is read (`sample`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tenure.errors import SpecError
from tenure.usage import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Of what `expose` returns (Prometheus exposition formats, text format)."""


@dataclass(frozen=True, slots=True)
class _Series:
    """One metric: its name (unit last, without ``_total``), what it counts, and the field of Usage."""

    name: str
    help: str
    field: str
    counter: bool = False


_SERIES = (
    _Series("tenure_cpu_seconds", "CPU time used, user and system, ended children included.", "cpu_s", True),
    _Series("tenure_memory_bytes", "Anonymous and shared memory now.", "memory_bytes"),
    _Series("tenure_memory_peak_bytes", "Highest anonymous and shared memory that was read.", "peak_memory_bytes"),
    _Series("tenure_disk_read_bytes", "Bytes fetched from storage.", "read_bytes", True),
    _Series("tenure_disk_written_bytes", "Bytes sent to storage.", "write_bytes", True),
    _Series("tenure_processes", "Processes alive.", "processes"),
    _Series("tenure_gpu_busy_ratio", "Share of the last interval in which the GPU ran something, 0 to 1.", "gpu_busy"),
    _Series("tenure_gpu_memory_bytes", "Device memory in use.", "gpu_memory_bytes"),
    _Series("tenure_sample_timestamp_seconds", "When this was read, seconds since 1970 UTC.", "at_s"),
)


def expose(snapshots: Iterable[tuple[Mapping[str, str], Usage]]) -> bytes:
    """Return usage as Prometheus text, one set of series per snapshot.

    snapshots: (labels, usage) pairs; every pair has the same label names, e.g. ``{"lease": "l-1", "tenant": "ada"}``, and
    no two the same values. Raises SpecError otherwise.
    """
    pairs = [(dict(labels), usage) for labels, usage in snapshots]
    names = sorted(pairs[0][0]) if pairs else []
    seen: set[tuple[str, ...]] = set()
    for labels, _ in pairs:
        if sorted(labels) != names:
            raise SpecError(f"all snapshots need the same label names; found {sorted(labels)}, expected {names}")
        values = tuple(labels[name] for name in names)
        if values in seen:
            raise SpecError(f"two snapshots have the same labels {labels}; add a label that tells them apart")
        seen.add(values)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshots(names, [(tuple(labels[name] for name in names), usage) for labels, usage in pairs]))
    return generate_latest(registry)


class _Snapshots(Collector):
    """Gives the library what it formats."""

    def __init__(self, names: Sequence[str], pairs: Sequence[tuple[tuple[str, ...], Usage]]) -> None:
        self._names = names
        self._pairs = pairs

    def collect(self) -> Iterator[Metric]:
        for series in _SERIES if self._pairs else ():
            kind = CounterMetricFamily if series.counter else GaugeMetricFamily
            family = kind(series.name, series.help, labels=self._names)
            for values, usage in self._pairs:
                family.add_metric(values, float(getattr(usage, series.field)))
            yield family
