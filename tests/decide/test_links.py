import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.decide import links
from tenure.decide.links import Connections, Exchange, enough_in_flight, exchange, forecast
from tenure.errors import SpecError
from tenure.links import DeclaredLink, parse_link
from tenure.usage import summarize

IMAGE_BYTES = 602_112
GIGABIT = parse_link("rate=1Gbit,delay=20ms")
CUBIC, BBR = Connections(count=64), Connections(count=64, congestion="bbr")


def local(one=1000.0, many=2000.0, in_flight=64):
    return {1: summarize([one]), in_flight: summarize([many])}


def images_per_s(link, transport="http", in_flight=1, connections=CUBIC, rates=None, images=1):
    what = exchange(transport, images=images, image_bytes=IMAGE_BYTES, answer_bytes=4)
    return forecast(link, what, rates or local(), in_flight, connections)


def test_without_a_link_the_local_rate_is_foretold():
    assert images_per_s(DeclaredLink()).images_per_s.value == pytest.approx(1000.0)
    found = images_per_s(DeclaredLink(), in_flight=64)
    assert found.images_per_s.value == pytest.approx(2000.0)
    assert found.bound == "local"


def test_one_request_after_the_other_pays_the_round_trip_and_the_sending_of_each():
    found = images_per_s(GIGABIT)
    sending_s = (IMAGE_BYTES - links.burst_bytes(GIGABIT)) * 8 / 1e9
    assert found.sending_s == pytest.approx(sending_s)
    assert found.images_per_s.value == pytest.approx(1 / (1 / 1000 + 0.04 + sending_s), rel=1e-6)
    assert found.bound == "round trips"


def test_grpc_waits_for_its_window_once_more():
    small, large = (exchange("grpc", images=1, image_bytes=size, answer_bytes=4) for size in (65_535, 65_536))
    assert small.up == (65_535,)
    assert large.up == (65_535, 1)
    assert images_per_s(GIGABIT, "grpc").round_trips_s == pytest.approx(0.08)


def test_many_in_flight_fill_the_link_and_no_more():
    found = images_per_s(GIGABIT, in_flight=64)
    assert found.bound == "link"
    assert found.images_per_s.value == pytest.approx(1e9 / 8 / IMAGE_BYTES, rel=0.002)


def test_headers_of_small_packets_take_their_part_of_the_link():
    small = images_per_s(parse_link("rate=1Gbit,delay=20ms,mtu=1500"), in_flight=64)
    assert small.link_images_per_s == pytest.approx(1e9 / 8 / IMAGE_BYTES * 1448 / 1500, rel=1e-3)


def test_a_slow_model_is_what_bounds_a_fast_link():
    found = images_per_s(GIGABIT, in_flight=64, rates=local(20.0, 25.0))
    assert found.bound == "local"
    assert found.images_per_s.value == pytest.approx(25.0, rel=0.03)


def test_requests_under_way_do_not_slow_a_model_that_few_at_once_keep_busy():
    found = images_per_s(GIGABIT, "grpc", in_flight=16, rates=local(73.0, 96.6, 16)).images_per_s
    assert found.value == pytest.approx(91.4, rel=0.05), "measured: MobileNetV2 on two cores"


def test_one_connection_carries_no_more_than_its_window_each_round_trip():
    found = images_per_s(GIGABIT, "grpc", in_flight=64, connections=Connections(count=1))
    assert found.bound == "window"
    assert found.images_per_s.value == pytest.approx(links.WINDOW_BYTES / 0.04 / IMAGE_BYTES)
    assert images_per_s(GIGABIT, "grpc", in_flight=64, connections=Connections(count=4)).bound == "link"


@pytest.mark.parametrize(
    ("text", "transport", "alone", "measured"),
    [
        ("rate=1Gbit,delay=20ms", "http", 1094.0, 17.0),
        ("rate=1Gbit,delay=20ms", "grpc", 481.0, 10.5),
        ("rate=200Mbit,delay=5ms", "http", 1094.0, 30.4),
        ("rate=200Mbit,delay=5ms", "grpc", 481.0, 24.1),
        ("rate=1Gbit,delay=20ms,mtu=1500", "http", 1094.0, 16.4),
        ("rate=1Gbit,delay=20ms,mtu=1500", "grpc", 481.0, 10.2),
    ],
)
def test_bbr_sends_requests_with_pauses_between_them_as_slowly_as_was_measured(text, transport, alone, measured):
    found = images_per_s(parse_link(text), transport, connections=BBR, rates=local(alone, 1800.0))
    assert found.images_per_s.value == pytest.approx(measured, rel=0.08)


def test_bbr_wants_more_in_flight_and_says_how_sure_it_is():
    what = exchange("http", images=1, image_bytes=IMAGE_BYTES, answer_bytes=4)
    assert enough_in_flight(GIGABIT, what, CUBIC) < 16 < enough_in_flight(GIGABIT, what, BBR) < 64
    few = images_per_s(GIGABIT, in_flight=16, connections=BBR, rates=local(in_flight=16)).images_per_s
    many = images_per_s(GIGABIT, in_flight=64, connections=BBR).images_per_s
    assert few.low < 142.8 < few.high
    assert few.low < 0.7 * many.low


@given(
    rate=st.sampled_from([0.0, 1e7, 1e8, 1e9]),
    delay_s=st.floats(0, 0.2),
    more_s=st.floats(0, 0.2),
    in_flight=st.integers(2, 64),
    images=st.integers(1, 32),
    transport=st.sampled_from(["http", "grpc"]),
    congestion=st.sampled_from(["bbr", "cubic"]),
    alone=st.floats(1, 2000),
    gain=st.floats(1, 10),
)
def test_a_longer_link_is_never_faster_and_none_is_faster_than_local_or_the_link(
    rate, delay_s, more_s, in_flight, images, transport, congestion, alone, gain
):
    what = exchange(transport, images=images, image_bytes=IMAGE_BYTES, answer_bytes=4000)
    rates, connections = local(alone, alone * gain, in_flight), Connections(count=in_flight, congestion=congestion)

    def at(seconds, count):
        return forecast(DeclaredLink(rate_bit_s=rate, delay_s=seconds), what, rates, count, connections)

    near, far, one = at(delay_s, in_flight), at(delay_s + more_s, in_flight), at(delay_s, 1)
    slack = 1 + 1e-9
    assert far.images_per_s.value <= near.images_per_s.value * slack
    assert near.images_per_s.value <= min(near.local_images_per_s, near.link_images_per_s) * slack
    assert one.images_per_s.value <= near.images_per_s.value * slack
    assert near.images_per_s.low <= near.images_per_s.value <= near.images_per_s.high


def test_no_rate_means_no_cap():
    found = images_per_s(parse_link("delay=10ms"), in_flight=64)
    assert math.isinf(found.link_images_per_s)
    assert enough_in_flight(parse_link("delay=10ms"), Exchange(images=1, up=(1,), down_bytes=1), CUBIC) == 1


def test_what_cannot_be_foretold_is_refused_in_words():
    with pytest.raises(SpecError, match="loses packets"):
        images_per_s(parse_link("loss=1%"))
    with pytest.raises(SpecError, match=r"1 and 8 requests in flight are needed; there are \[1, 64\]"):
        images_per_s(GIGABIT, in_flight=8)
    with pytest.raises(SpecError, match="http and grpc"):
        images_per_s(GIGABIT, "shm")
