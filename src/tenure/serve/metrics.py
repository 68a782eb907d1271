"""Prometheus text of one server. Counting is done by the data plane with plain numbers; this only renders them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tenure.serve.bridge import Bridge as DataPlane


def render(plane: DataPlane) -> bytes:
    """Return the server's metrics in Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(plane))
    return generate_latest(registry)


class _Collector:
    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def collect(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        requests = CounterMetricFamily(
            "tenure_infer_requests", "Inference requests, by how they ended.", labels=[*labels, "outcome"]
        )
        rows = CounterMetricFamily("tenure_infer_rows", "Rows (first dimension) answered.", labels=labels)
        queue = CounterMetricFamily("tenure_infer_queue_seconds", "Time requests waited for their model.", labels=labels)
        compute = CounterMetricFamily("tenure_infer_compute_seconds", "Time models ran.", labels=labels)
        for key, found in self._plane.statistics().items():
            for outcome, count in list(found.outcomes.items()):
                requests.add_metric([*key, outcome], count)
            rows.add_metric(key, found.inference_count)
            queue.add_metric(key, found.queue.total_s)
            compute.add_metric(key, found.compute_infer.total_s)
        yield from (requests, rows, queue, compute)
        held = "Request bodies held in memory now."
        yield GaugeMetricFamily("tenure_infer_held_bytes", held, value=float(self._plane.held_bytes))
