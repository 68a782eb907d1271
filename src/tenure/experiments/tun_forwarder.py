"""The process that is a link's delay and loss: carries packets between two TUN devices. Linux, by the standard library alone.

    namespace of the server                            namespace of the application
    TCP ─► TBF (rate) ─► TUN near ─► [ Line: loss, delay ] ─► TUN far ─► TCP
    TCP ◄─ TUN near ◄─ [ Line: loss, delay ] ◄─ TUN far ◄─ TBF (rate) ◄─ TCP

`python -m tenure.experiments.tun_forwarder '{…}'` opens both devices, prints a JSON line when it has them, and answers each
line on its stdin with what it has counted. It ends when stdin does or its maker has died, and its devices with it. It asks for
real-time priority, so that a wire does not wait for the work it connects; what it costs is in its answers: the work that TCP
does on arrival of a packet runs in the writes of this process, and counts as its own.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import select
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tenure.experiments.tun_line import HEADER_BYTES, Line

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x1000, 0x4000
_OFFLOADS = 0x1 | 0x2
"""TUN_F_CSUM, TUN_F_TSO4: checksums and segmentation are left to the device, here to nobody."""
_MAX_PACKET_BYTES = HEADER_BYTES + (1 << 16)
_AT_ONCE = 64
"""Packets taken from one device before what is due leaves."""
_PRIORITY = 10


def main(argv: Sequence[str]) -> int:
    """Carry packets until nobody wants them; exit code 0 asked to end, 1 a device is gone, 2 wrong use."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m tenure.experiments.tun_forwarder '{…}'\n")
        return 2
    told = json.loads(argv[0])
    maker = _alive(told["maker"])
    if maker is None:
        return 0
    devices = [open_tun(name) for name in (told["near"], told["far"])]
    lines = [
        Line(delay_s=told["delay_s"], loss=told["loss"], seed=told["seed"] + place, max_bytes=told["max_bytes"])
        for place in (0, 1)
    ]
    _say({"priority": _hurry()})
    gc.disable()  # nothing here makes cycles, and a pause would delay packets
    try:
        _carry(devices, lines, maker)
    except OSError as error:
        sys.stderr.write(f"tun_forwarder: {error}\n")
        return 1
    return 0


def open_tun(name: str) -> int:
    """Return the descriptor of a new TUN device, which lives as long as it is open."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _OFFLOADS)
    return device


def counted(lines: Sequence[Line]) -> Mapping[str, Any]:
    """Return both directions' counts in one, and what this process has used."""
    both = [asdict(line.counts) for line in lines]
    sums = {name: sum(one[name] for one in both) for name in both[0]}
    with open("/proc/self/status", "rb") as status:
        told = (line.split() for line in status if line.startswith((b"RssAnon:", b"VmHWM:")))
        found = {name: int(kib) << 10 for name, kib, _ in told}
    return sums | {
        "latest_s": max(one["latest_s"] for one in both),
        "cpu_s": time.process_time(),
        "at_s": time.monotonic(),
        "memory_bytes": found[b"RssAnon:"],
        "peak_memory_bytes": found[b"VmHWM:"],
    }


def _carry(devices: Sequence[int], lines: Sequence[Line], maker: int) -> None:
    ways = [(devices[0], devices[1], lines[0]), (devices[1], devices[0], lines[1])]
    watched = [*devices, 0, maker]
    while True:
        now_s = time.monotonic()
        for _, target, line in ways:
            for packet in line.leave(now_s):
                _put(target, packet, line)
        due = [line.next_s for line in lines if line.next_s is not None]
        found, _, _ = select.select(watched, [], [], max(0.0, min(due) - time.monotonic()) if due else None)
        if maker in found:
            return
        if 0 in found:
            if not os.read(0, 4096):
                return
            _say(counted(lines))
        now_s = time.monotonic()
        for source, _, line in ways:
            if source in found:
                _take(source, line, now_s)


def _take(source: int, line: Line, now_s: float) -> None:
    for _ in range(_AT_ONCE):
        try:
            line.take(os.read(source, _MAX_PACKET_BYTES), now_s)
        except BlockingIOError:
            return


def _put(target: int, packet: bytes, line: Line) -> None:
    try:
        os.write(target, packet)
    except OSError as error:
        if error.errno == errno.EBADFD:  # the device is gone
            raise
        line.counts.overflowed += 1  # it is down, or the kernel has no memory for it


def _say(what: Mapping[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _hurry() -> str:
    """Ask not to wait for other processes; return what was granted."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(_PRIORITY))
    except OSError:
        return "none"
    return "real-time"


def _alive(pid: int) -> int | None:
    """Return a descriptor that becomes readable when the maker dies; None when it has."""
    try:
        watched = os.pidfd_open(pid)
    except OSError:
        return None
    return watched if os.getppid() == pid else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
