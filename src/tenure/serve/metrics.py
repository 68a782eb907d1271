"""Prometheus text of one server. Counting is done by the data plane with plain numbers; this only renders them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from tenure.serve.plane import Plane


def render(plane: Plane) -> bytes:
    """Return the server's metrics in Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(plane))
    return generate_latest(registry)


class _Collector:
    def __init__(self, plane: Plane) -> None:
        self._plane = plane

    def collect(self) -> Iterator[Metric]:
        labels = ["model", "version"]
        requests = CounterMetricFamily(
            "tenure_infer_requests", "Inference requests, by how they ended.", labels=[*labels, "outcome"]
        )
        rows = CounterMetricFamily("tenure_infer_rows", "Rows (first dimension) answered.", labels=labels)
        runs = CounterMetricFamily("tenure_infer_runs", "Runs of the engine, a batch counting one.", labels=labels)
        queue = CounterMetricFamily("tenure_infer_queue_seconds", "Time requests waited for their model.", labels=labels)
        compute = CounterMetricFamily("tenure_infer_compute_seconds", "Time models ran.", labels=labels)
        duration = SummaryMetricFamily(
            "tenure_infer_duration_seconds", "From acceptance to answer, requests that were answered.", labels=labels
        )
        restarts = CounterMetricFamily(
            "tenure_instance_restarts", "Instances started again after a crash or a hang.", labels=labels
        )
        for key, found in self._plane.statistics().items():
            for outcome, count in list(found.outcomes.items()):
                requests.add_metric([*key, outcome], count)
            rows.add_metric(key, found.inference_count)
            runs.add_metric(key, found.execution_count)
            queue.add_metric(key, found.queue.total_s)
            compute.add_metric(key, found.compute_infer.total_s)
            duration.add_metric(key, found.success.count, found.success.total_s)
            restarts.add_metric(key, found.restarts)
        yield from (requests, rows, runs, queue, compute, duration, restarts)
        held = "Request bodies held in memory now."
        yield GaugeMetricFamily("tenure_infer_held_bytes", held, value=float(self._plane.held_bytes))
