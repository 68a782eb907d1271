import pytest
from prometheus_client.parser import text_string_to_metric_families

from tenure.errors import SpecError
from tenure.meter.exposition import expose
from tenure.usage import Usage


def parsed(text: bytes):
    return {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text.decode()) for s in f.samples
    }


def test_what_is_exposed_reads_back_with_labels_and_units():
    text = expose(
        [
            ({"lease": 'a"\\b', "tenant": "ada"}, Usage(at_s=5.0, cpu_s=2.5, memory_bytes=7, processes=1)),
            ({"tenant": "bob", "lease": "c"}, Usage(at_s=6.0, gpu_busy=0.5)),
        ]
    )
    values = parsed(text)
    assert values["tenure_cpu_seconds_total", ("lease", 'a"\\b'), ("tenant", "ada")] == 2.5
    assert values["tenure_gpu_busy_ratio", ("lease", "c"), ("tenant", "bob")] == 0.5
    assert b"# HELP tenure_memory_bytes Anonymous" in text


def test_nothing_watched_exposes_nothing_and_no_process_metrics_of_our_own():
    assert parsed(expose([])) == {}


def test_labels_that_differ_in_name_or_repeat_are_refused():
    with pytest.raises(SpecError, match="same label names"):
        expose([({"a": "1"}, Usage(at_s=0)), ({"b": "1"}, Usage(at_s=0))])
    with pytest.raises(SpecError, match="tells them apart"):
        expose([({"a": "1"}, Usage(at_s=0)), ({"a": "1"}, Usage(at_s=0))])
