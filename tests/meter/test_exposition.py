import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tenure.errors import SpecError
from tenure.meter.exposition import Family, Metric, expose, usage_families
from tenure.usage import Usage

LABELS = ("lease", "tenant")


def parsed(text: bytes):
    return {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text.decode()) for s in f.samples
    }


def test_what_is_exposed_reads_back_with_labels_and_units():
    odd = 'a"\\b\nc'
    parties = {
        (odd, "ada"): Usage(at_s=5.0, cpu_s=2.5, memory_bytes=7, processes=1),
        ("c", "bob"): Usage(at_s=1.7e9 + 0.125, gpu_busy=0.5),
    }
    text = expose(usage_families("tenure_lease", LABELS, parties))
    values = parsed(text)
    assert values["tenure_lease_cpu_seconds_total", ("lease", odd), ("tenant", "ada")] == 2.5
    assert values["tenure_lease_gpu_busy_ratio", ("lease", "c"), ("tenant", "bob")] == 0.5
    assert values["tenure_lease_sample_timestamp_seconds", ("lease", "c"), ("tenant", "bob")] == 1.7e9 + 0.125
    assert b"# HELP tenure_lease_memory_bytes Anonymous" in text


def test_types_are_told_by_name_and_odd_numbers_are_read_back():
    counter, gauge = Family(Metric("tenure_things_total", "Things.")), Family(Metric("tenure_heat_celsius", "Line\nbreak \\."))
    counter.add(3)
    gauge.add(-math.inf)
    text = expose([counter, gauge])
    found = {family.name: family for family in text_string_to_metric_families(text.decode())}
    assert (found["tenure_things"].type, found["tenure_heat_celsius"].type) == ("counter", "gauge")
    assert found["tenure_heat_celsius"].samples[0].value == -math.inf
    assert found["tenure_heat_celsius"].documentation == "Line\nbreak \\."


def test_nothing_watched_exposes_no_values_and_no_process_metrics_of_our_own():
    assert parsed(expose([])) == {}
    assert parsed(expose(usage_families("tenure_lease", LABELS, {}))) == {}


def test_labels_that_differ_in_number_or_repeat_are_refused():
    family = Family(Metric("tenure_things", "Things.", LABELS))
    with pytest.raises(SpecError, match="has the labels"):
        family.add(1.0, "only one")
    family.add(1.0, "a", "b")
    family.add(2.0, "a", "b")
    with pytest.raises(SpecError, match="tells them apart"):
        expose([family])
    with pytest.raises(SpecError, match="comes twice"):
        expose([Family(family.metric), Family(family.metric)])
