import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure import codec
from tenure.errors import IllegalChange, SpecError
from tenure.jobs import Command, fingerprint
from tenure.leases import LEGAL_CHANGES, EndReason, Lease, LeaseState, changed, granted, renewed
from tenure.prices import PriceVector
from tenure.resources import (
    MAX_BYTES,
    MAX_DURATION_S,
    Capacity,
    Envelope,
    format_bytes,
    format_duration,
    parse_bytes,
    parse_duration,
)
from tenure.trials import Prediction
from tenure.usage import summarize


@given(st.integers(0, MAX_BYTES))
def test_a_printed_size_reads_back_the_same(size_bytes):
    assert parse_bytes(format_bytes(size_bytes)) == size_bytes


@given(st.floats(0, MAX_DURATION_S))
def test_a_printed_time_reads_back_the_same(duration_s):
    assert parse_duration(format_duration(duration_s)) == duration_s


@given(st.text(max_size=12))
def test_any_text_is_a_quantity_or_a_clear_refusal(text):
    for parse in (parse_bytes, parse_duration):
        try:
            value = parse(text)
        except SpecError:
            continue
        assert value >= 0


@pytest.mark.parametrize("text", ["-1MiB", "1.5.2GiB", "MiB", "", "12 parsecs", "1e400s", True, None, 2.5])
def test_a_wrong_size_is_refused(text):
    with pytest.raises(SpecError):
        parse_bytes(text)


_field = st.sampled_from(["cpus", "memory_bytes", "gpus", "gpu_memory_bytes", "disk_bytes", "slot_s", "total_s"])


@given(_field, st.one_of(st.floats(max_value=0, exclude_max=True), st.just(float("nan")), st.just(float("inf"))))
def test_an_envelope_is_never_negative_nor_unbounded(name, value):
    with pytest.raises(SpecError):
        Envelope(**{name: value})


def _lease(state=LeaseState.REQUESTED, **fields):
    envelope = Envelope(slot_s=10, total_s=30)
    return Lease(id="l", run_id="r", stage="s", envelope=envelope, command=Command(argv=("true",)), state=state, **fields)


@given(st.sampled_from(list(LeaseState)), st.sampled_from(list(LeaseState)))
def test_only_legal_state_changes_happen(before, after):
    fields = {"end_reason": EndReason.COMPLETED, "ended_at_s": 1.0} if after is LeaseState.ENDED else {}
    if after in LEGAL_CHANGES[before]:
        assert changed(_lease(before), after, **fields).state is after
    else:
        with pytest.raises(IllegalChange):
            changed(_lease(before), after, **fields)


def test_an_end_needs_a_reason_and_a_time():
    with pytest.raises(SpecError):
        changed(_lease(LeaseState.ACTIVE), LeaseState.ENDED)


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 50)), max_size=10))
def test_a_lease_is_never_renewed_past_its_total_nor_shortened(renewals):
    lease = granted(_lease(), node="n", devices=(), fence=1, now_s=100.0)
    now_s = 100.0
    for wait_s, for_s in renewals:
        now_s += wait_s
        if now_s >= lease.total_ends_at_s:
            with pytest.raises(IllegalChange):
                renewed(lease, for_s=for_s, now_s=now_s)
            return
        after = renewed(lease, for_s=for_s, now_s=now_s)
        assert lease.ends_at_s <= after.ends_at_s <= 130.0
        lease = after


@given(st.builds(Envelope, cpus=st.floats(0.1, 64), memory_bytes=st.integers(1 << 20, 1 << 40)))
def test_a_noun_that_crossed_the_wire_is_the_same(envelope):
    assert codec.from_json(codec.to_json(envelope), Envelope) == envelope
    lease = granted(_lease(), node="n", devices=(), fence=3, now_s=1.0)
    assert codec.from_builtins(codec.to_builtins(lease), Lease) == lease


def test_a_fingerprint_depends_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})


def test_cost_is_envelope_times_time_times_price():
    vector = PriceVector(name="v", cpu_usd_per_hour=2.0, memory_usd_per_gib_hour=0.5, start_usd=0.25)
    assert vector.cost_usd(Envelope(cpus=2, memory_bytes=4 << 30), 1800.0, starts=2) == pytest.approx((4 + 2) / 2 + 0.5)


def test_a_summary_refuses_nothing_and_nonsense():
    with pytest.raises(SpecError):
        summarize([])
    with pytest.raises(SpecError):
        summarize([1.0, float("nan")])
    assert summarize([1.0, 3.0]).standard_error == pytest.approx(1.0)


def test_a_prediction_lies_within_its_interval():
    with pytest.raises(SpecError):
        Prediction(value=3, low=1, high=2)


def test_a_part_of_a_machine_cannot_exceed_it():
    whole = Capacity(cpus=2, memory_bytes=1 << 30)
    assert whole.with_part(cpus=1).cpus == 1
    with pytest.raises(SpecError):
        whole.with_part(cpus=3)
