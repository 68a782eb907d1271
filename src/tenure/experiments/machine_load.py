"""What the machine did while something was measured on it, and how much of that was somebody else's.

A measurement on a shared machine is only as good as the machine was quiet: each training trial carries the cores that were
busy and those that its own leases did not use.
"""

from __future__ import annotations

from collections.abc import Mapping

from tenure.meter.sample import HostSampler, NvmlSampler, Sampler
from tenure.meter.watch import Watcher
from tenure.nodes import Machine
from tenure.usage import Summary, summarize

PERIOD_S = 0.5
DISTURBED_CORES = 0.5
"""Cores used by others, on average, above which a measurement is called disturbed."""


def watch_machine(machine: Machine) -> Watcher:
    """Return a watcher of the whole machine, and of its first GPU where it has one. A context manager."""
    samplers: dict[str, Sampler] = {"host": HostSampler()}
    if machine.gpus:
        samplers["gpu"] = NvmlSampler()
    return Watcher(samplers, period_s=PERIOD_S, max_samples=10_000)


def load_metrics(watcher: Watcher, *, own_cpu_s: float) -> dict[str, Summary]:
    """Return `host_cpu_cores`, `host_memory_bytes`, `other_cpu_cores`, and with a GPU `gpu_busy`, `gpu_memory_bytes`.

    own_cpu_s: CPU seconds of what was measured, over the watched span. Empty when the span was too short to tell.
    """
    host = watcher.summary("host")
    if host.samples < 2 or host.span_s <= 0:
        return {}
    metrics = {
        "host_cpu_cores": summarize([host.cpu_cores_mean]),
        "host_memory_bytes": summarize([host.memory_mean_bytes]),
        "other_cpu_cores": summarize([max(0.0, host.cpu_cores_mean - own_cpu_s / host.span_s)]),
    }
    summaries = watcher.summaries()
    if "gpu" in summaries and summaries["gpu"].samples:
        metrics["gpu_busy"] = summarize([summaries["gpu"].gpu_busy_mean])
        metrics["gpu_memory_bytes"] = summarize([float(summaries["gpu"].gpu_memory_max_bytes)])
    return metrics


def disturbance(metrics: Mapping[str, Summary]) -> str:
    """Return a sentence when others used the machine meanwhile, else nothing."""
    other = metrics.get("other_cpu_cores")
    if other is None or other.mean <= DISTURBED_CORES:
        return ""
    return f"others kept {other.mean:.1f} cores busy meanwhile; times may not repeat"
