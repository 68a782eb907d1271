import pytest

from tenure.experiments.machine_load import disturbance, load_metrics
from tenure.meter.watch import Watcher
from tenure.usage import Usage


class Host:
    """A machine on which so many CPU seconds pass at each look."""

    lost = ""

    def __init__(self, cpu_s):
        self._cpu_s, self._looks = cpu_s, 0

    def sample(self):
        self._looks += 1
        return Usage(at_s=float(self._looks), cpu_s=self._cpu_s * self._looks, memory_bytes=100)

    def close(self):
        pass


def _watched(cpu_s, looks=2):
    watcher = Watcher({"host": Host(cpu_s)})
    for _ in range(looks):
        watcher.sample_once()
    return watcher


def test_what_the_leases_did_not_use_was_used_by_others():
    watcher = _watched(5.0)
    span_s = watcher.summary("host").span_s
    metrics = load_metrics(watcher, own_cpu_s=2.0)
    assert metrics["host_cpu_cores"].mean == pytest.approx(5.0 / span_s)
    assert metrics["other_cpu_cores"].mean == pytest.approx(3.0 / span_s)
    assert "cores busy meanwhile" in disturbance(metrics)


def test_a_quiet_machine_and_a_span_too_short_to_tell_disturb_nothing():
    assert disturbance(load_metrics(_watched(5.0), own_cpu_s=5.0)) == ""
    assert load_metrics(_watched(5.0, looks=1), own_cpu_s=0.0) == {}
    assert disturbance({}) == ""
