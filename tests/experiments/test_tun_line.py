import struct

import pytest

from tenure.experiments.tun_line import HEADER_BYTES, Line, segments, without

MSS = 1448
HEAD = 52
"""Of IP (20) and TCP with timestamps (32)."""
FIN_PSH_ACK = 0x19


def folded(words):
    total = sum(struct.unpack(f">{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet(payload, *, gso_size=MSS, sequence=1000, flags=FIN_PSH_ACK):
    """As the kernel hands over part of a TCP stream: cut apart by nobody, its checksum the pseudo header's only."""
    kind = 1 if len(payload) > gso_size else 0
    header = struct.pack("<BBHHHH", 1, kind, HEAD, gso_size if kind else 0, 20, 16)
    ip = bytearray(
        struct.pack(">BBHHHBBH4s4s", 0x45, 0, HEAD + len(payload), 7, 0x4000, 64, 6, 0, b"\xc6\x12\0\1", b"\xc6\x12\0\2")
    )
    ip[10:12] = (~folded(ip) & 0xFFFF).to_bytes(2, "big")
    tcp = bytearray(struct.pack(">HHIIBBHHH", 4000, 80, sequence, 5, 8 << 4, flags, 500, 0, 0) + bytes(12))
    tcp[16:18] = pseudo(ip, len(tcp) + len(payload)).to_bytes(2, "big")
    return bytes(header + ip + tcp) + payload


def pseudo(ip, tcp_bytes):
    return folded(bytes(ip[12:20]) + struct.pack(">BBH", 0, 6, tcp_bytes))


def read(found):
    """Return sequence number, flags and payload of a packet, all its lengths and sums checked."""
    ip, tcp = found[HEADER_BYTES : HEADER_BYTES + 20], found[HEADER_BYTES + 20 : HEADER_BYTES + HEAD]
    payload = found[HEADER_BYTES + HEAD :]
    assert int.from_bytes(ip[2:4], "big") == HEAD + len(payload)
    assert folded(ip) == 0xFFFF, "the IP header's checksum is wrong"
    assert int.from_bytes(tcp[16:18], "big") == pseudo(ip, len(tcp) + len(payload))
    _, kind, _, size, _, _ = struct.unpack_from("<BBHHHH", found)
    assert (kind, size) == ((1, MSS) if len(payload) > MSS else (0, 0))
    return int.from_bytes(tcp[4:8], "big"), tcp[13], payload


PAYLOAD = bytes(number % 251 for number in range(10 * MSS + 100))


def test_a_packet_is_as_many_as_the_mtu_makes_of_it():
    assert segments(packet(PAYLOAD)) == 11
    assert segments(packet(b"x" * MSS)) == 1
    assert segments(packet(b"")) == 1


def test_what_is_left_of_a_packet_is_what_was_not_lost():
    lost = [number in (0, 4, 5) for number in range(11)]
    left = [read(part) for part in without(packet(PAYLOAD), lost)]
    assert [(sequence - 1000) // MSS for sequence, _, _ in left] == [1, 6]
    for sequence, _, payload in left:
        at = sequence - 1000
        assert payload == PAYLOAD[at : at + len(payload)]
    assert sum(len(payload) for _, _, payload in left) == len(PAYLOAD) - 3 * MSS


def test_only_the_part_with_the_last_bytes_ends_the_stream():
    *_, (_, last, _) = left = [read(part) for part in without(packet(PAYLOAD), [False, True] + [False] * 9)]
    assert last == FIN_PSH_ACK
    assert left[0][1] == 0x10


def test_a_sequence_number_wraps():
    (part,) = without(packet(PAYLOAD, sequence=0xFFFFFFFF - MSS + 1), [True] + [False] * 10)
    assert read(part)[0] == 0


def test_nothing_is_left_when_all_is_lost():
    assert without(packet(PAYLOAD), [True] * 11) == []
    assert without(packet(b"x"), [True]) == []


def test_packets_leave_in_order_after_their_delay():
    line = Line(delay_s=0.02, loss=0.0, seed=0, max_bytes=1 << 20)
    line.take(packet(b"one"), 1.0)
    line.take(packet(b"two"), 1.005)
    assert list(line.leave(1.019)) == []
    assert line.next_s == pytest.approx(1.02)
    assert [read(found)[2] for found in line.leave(1.03)] == [b"one", b"two"]
    assert line.next_s is None
    assert line.counts.late_s == pytest.approx(0.01 + 0.005)
    assert line.counts.latest_s == pytest.approx(0.01)


def test_loss_takes_its_share_of_packets_of_the_mtu_and_counts_them():
    line = Line(delay_s=0.0, loss=0.1, seed=1, max_bytes=1 << 30)
    for _ in range(1000):
        line.take(packet(PAYLOAD), 0.0)
    left_bytes = sum(len(read(found)[2]) for found in line.leave(0.0))
    assert line.counts.packets == 1000
    assert line.counts.lost == pytest.approx(0.1 * 11_000, rel=0.1)
    assert left_bytes == pytest.approx(0.9 * 1000 * len(PAYLOAD), rel=0.02)
    assert line.counts.overflowed == 0


def test_more_than_may_wait_is_dropped_and_counted():
    line = Line(delay_s=1.0, loss=0.0, seed=0, max_bytes=2 * len(packet(PAYLOAD)))
    for _ in range(5):
        line.take(packet(PAYLOAD), 0.0)
    assert len(list(line.leave(1.0))) == 2
    assert line.counts.overflowed == 3
    line.take(packet(PAYLOAD), 1.0)
    assert len(list(line.leave(2.0))) == 1, "room is given back as packets leave"
