import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenure.errors import SpecError
from tenure.links import LARGE_MTU, SMALL_MTU, DeclaredLink, parse_link, parse_rate


def test_a_link_reads_as_people_write_it():
    link = parse_link("rate=1Gbit,delay=20ms,loss=0.1%,mtu=9000")
    assert link == DeclaredLink(rate_bit_s=1e9, delay_s=0.02, loss=0.001, mtu=9000)
    assert str(link) == "1Gbit 20ms 0.1% mtu=9000"
    assert parse_link("") == DeclaredLink()
    assert not DeclaredLink(mtu=1500).shapes


@given(
    st.builds(
        DeclaredLink,
        rate_bit_s=st.sampled_from([0.0, 1e4, 2.5e5, 2e8, 1e9, 1.234567e9]) | st.integers(10_000, 10**12).map(float),
        delay_s=st.floats(0, 10),
        loss=st.integers(0, 5000).map(lambda n: n / 10_000),
        mtu=st.just(0) | st.integers(576, LARGE_MTU),
    )
)
def test_what_is_printed_is_read_back(link):
    assert parse_link(link.describe()) == link


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rate=1Gbit,rate=2Gbit", "named twice"),
        ("speed=1Gbit", "rate=, delay=, loss=, mtu="),
        ("rate=fast", "a rate was expected"),
        ("rate=1Gbps", "units: bit, kbit, Mbit, Gbit"),
        ("rate=1bit", "link.rate must lie between"),
        ("delay=1h", "link.delay must lie between"),
        ("loss=60%", "link.loss must lie between"),
        ("loss=some", "0.1%"),
        ("mtu=100", "link.mtu must lie between 576"),
        ("mtu=big", "whole number"),
    ],
)
def test_a_wrong_link_is_refused_in_words(text, said):
    with pytest.raises(SpecError, match=said):
        parse_link(text)


def test_packets_are_large_unless_their_loss_counts():
    assert DeclaredLink(delay_s=0.02).packet_bytes == LARGE_MTU
    assert DeclaredLink(loss=0.01).packet_bytes == SMALL_MTU
    assert DeclaredLink(loss=0.01, mtu=9000).packet_bytes == 9000


def test_a_bare_number_is_bits_per_second():
    assert parse_rate(1e9) == 1e9
