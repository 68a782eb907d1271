"""One direction of a link in a process: packets are lost by chance, wait out the delay, and leave in their order. Pure.

A packet here is what a TUN device with IFF_VNET_HDR gives: a virtio_net_hdr of ten bytes, then IP. The kernel hands over up to
64 KB of one TCP stream as one packet (segmentation is left to the device), so each is many packets of the MTU: loss is drawn
for each of those, and what is left of a packet goes on in runs. That is what lets a process in Python keep up.
"""

from __future__ import annotations

import random
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

HEADER_BYTES = 10
"""Of struct virtio_net_hdr (Virtual I/O Device Specification 1.2, 5.1.6)."""
_HEADER = struct.Struct("<BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset; in the machine's order, which on Linux/x86 and ARM is this."""
_GSO_TCP4 = 1
_FIN_PSH = 0x09


@dataclass(slots=True)
class Counts:
    """What one direction has done so far."""

    packets: int = 0
    """Read from the device, as the kernel hands them over."""
    bytes: int = 0
    lost: int = 0
    """Packets of the MTU that the declared loss took."""
    overflowed: int = 0
    """Packets dropped because more than `max_bytes` waited: never declared, so a fault of the measurement."""
    left: int = 0
    late_s: float = 0.0
    """Sum over packets of how long after its delay each left."""
    latest_s: float = 0.0


class Line:
    """Packets under way in one direction."""

    def __init__(self, *, delay_s: float, loss: float, seed: int, max_bytes: int) -> None:
        self.counts = Counts()
        self._delay_s, self._loss, self._max_bytes = delay_s, loss, max_bytes
        self._chance = random.Random(seed)
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._held_bytes = 0

    @property
    def next_s(self) -> float | None:
        """When the next packet is to leave; None when none waits."""
        return self._waiting[0][0] if self._waiting else None

    def take(self, packet: bytes, now_s: float) -> None:
        """Let a packet enter."""
        counts = self.counts
        counts.packets += 1
        counts.bytes += len(packet) - HEADER_BYTES
        for part in self._kept(packet) if self._loss else (packet,):
            if self._held_bytes + len(part) > self._max_bytes:
                counts.overflowed += 1
                continue
            self._held_bytes += len(part)
            self._waiting.append((now_s + self._delay_s, part))

    def leave(self, now_s: float) -> Iterator[bytes]:
        """Yield what is to leave by now."""
        waiting, counts = self._waiting, self.counts
        while waiting and waiting[0][0] <= now_s:
            due_s, packet = waiting.popleft()
            self._held_bytes -= len(packet)
            counts.left += 1
            counts.late_s += now_s - due_s
            counts.latest_s = max(counts.latest_s, now_s - due_s)
            yield packet

    def _kept(self, packet: bytes) -> Sequence[bytes]:
        count = segments(packet)
        lost = [self._chance.random() < self._loss for _ in range(count)]
        self.counts.lost += sum(lost)
        return without(packet, lost) if any(lost) else (packet,)


def segments(packet: bytes) -> int:
    """Return of how many packets of the MTU this is one: those that may be cut apart are TCP's, over IPv4."""
    kind, size = _gso(packet)
    if kind & 0x7F != _GSO_TCP4 or not size:
        return 1
    return max(1, -(-(len(packet) - _payload_at(packet)) // size))


def without(packet: bytes, lost: Sequence[bool]) -> list[bytes]:
    """Return what is left when some of a packet's segments are lost: one packet for each run of those that are not."""
    if len(lost) == 1:
        return [] if lost[0] else [packet]
    (_, size), start, end = _gso(packet), _payload_at(packet), len(packet)
    runs: list[tuple[int, int]] = []
    for number, gone in enumerate(lost):
        if gone:
            continue
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return [_cut(packet, start, start + first * size, min(end, start + past * size)) for first, past in runs]


def _gso(packet: bytes) -> tuple[int, int]:
    """Return how a packet may be cut apart, and the payload of each part."""
    kind: int
    size: int
    _, kind, _, size, _, _ = _HEADER.unpack_from(packet)
    return kind, size


def _payload_at(packet: bytes) -> int:
    """Return where TCP's payload begins."""
    tcp = HEADER_BYTES + (packet[HEADER_BYTES] & 15) * 4
    return tcp + (packet[tcp + 12] >> 4) * 4


def _cut(packet: bytes, start: int, first: int, past: int) -> bytes:
    """Return the packet with payload [first, past) only: lengths, sequence number, flags and checksums made to fit."""
    head = bytearray(packet[:start])
    flags, kind, head_bytes, size, sum_at, sum_offset = _HEADER.unpack_from(head)
    if past - first <= size:
        kind = size = 0
    _HEADER.pack_into(head, 0, flags, kind, head_bytes, size, sum_at, sum_offset)
    ip, tcp = HEADER_BYTES, HEADER_BYTES + (head[HEADER_BYTES] & 15) * 4
    total = start - ip + past - first
    cut_bytes = int.from_bytes(head[ip + 2 : ip + 4], "big") - total
    head[ip + 2 : ip + 4] = total.to_bytes(2, "big")
    head[ip + 10 : ip + 12] = b"\0\0"
    head[ip + 10 : ip + 12] = (~_folded(head[ip:tcp]) & 0xFFFF).to_bytes(2, "big")
    sequence = int.from_bytes(head[tcp + 4 : tcp + 8], "big") + first - start
    head[tcp + 4 : tcp + 8] = (sequence & 0xFFFFFFFF).to_bytes(4, "big")
    if past < len(packet):
        head[tcp + 13] &= ~_FIN_PSH & 0xFF
    # Of TCP's checksum only the pseudo header's part is there (VIRTIO_NET_HDR_F_NEEDS_CSUM), which counts the length.
    partial = int.from_bytes(head[tcp + 16 : tcp + 18], "big") + (~cut_bytes & 0xFFFF)
    head[tcp + 16 : tcp + 18] = ((partial & 0xFFFF) + (partial >> 16)).to_bytes(2, "big")
    return bytes(head) + packet[first:past]


def _folded(words: bytes | bytearray) -> int:
    """Return the ones' complement sum of 16-bit words (RFC 1071)."""
    total: int = sum(struct.unpack(f">{len(words) // 2}H", words))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
