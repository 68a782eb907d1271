"""Mutated gRPC requests, from the protobuf message down to HTTP/2 frames and header compression, and what sends them.

| kind | mutated | sent |
| --- | --- | --- |
| grpc-valid | nothing: the answer must be right | among the others, on the same connections |
| grpc-fields | fields of the message: values, types, sizes, claimed lengths, doubles | 32 streams at a time, each must end |
| grpc-bytes | bytes of the message | " |
| grpc-frame | gRPC's own frame: compressed flag, length, several, none | " |
| grpc-packed | messages in gzip: whole, mutated, cut off, 40 MB of zeros in 40 KB | " |
| grpc-stream | several messages, good and mutated, on one streaming call | " |
| grpc-heads | request headers, well coded: timeouts, encodings, paths, missing ones | " |
| http2-frames | types, flags, streams, lengths, order of HTTP/2 frames | alone; the connection must end or answer a ping |
| http2-hpack | bytes of the header block | " |
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzz.report import Report
from benchmarks.fuzz.values import INTEGERS, TEXTS, mutated_bytes, packed

MODEL, WIDTH = b"same", 16
STREAMS, ALONE = 32, 8
ANSWER_MAX_S = 20.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PING = b"tenure!!"
_DATA, _HEADERS, _PRIORITY, _RST, _SETTINGS, _PUSH, _PINGS, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_SERVICE = b"/inference.GRPCInferenceService/"
PLANNED = {"0", "3", "5", "8", "12"}
PLANNED_BY_KIND = {"grpc-frame": {"13"}, "grpc-heads": {"4"}, "grpc-fields": {"4"}, "grpc-bytes": {"4"}}
"""A compressed flag without an encoding is INTERNAL by gRPC's own rules; a timeout of a nanosecond is DEADLINE_EXCEEDED."""
MAX_SENT = 48_000
"""Bytes of DATA on one connection: below the first window, so that none has to be waited for."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream & 0xFFFFFFFF) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """Return a header field as HPACK codes it without table and Huffman code (lengths below 16,384)."""
    return b"\x00" + _sized(name) + _sized(value)


def _sized(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),)) + text
    rest = len(text) - 127
    low = [0x7F]
    while rest >= 128:
        low.append(rest % 128 + 128)
        rest //= 128
    return bytes([*low, rest]) + text


def heads(method: bytes = b"ModelInfer", *more: tuple[bytes, bytes]) -> bytes:
    """Return the header block of one call."""
    usual = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", _SERVICE + method),
        (b":authority", b"fuzz"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    )
    return b"".join(literal(name, value) for name, value in (*usual, *more))


def message(payload: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """Return gRPC's frame around a message."""
    return struct.pack(">BI", flag, (len(payload) if length is None else length) & 0xFFFFFFFF) + payload


def varint(value: int) -> bytes:
    """Return a protobuf varint of the value's lowest 64 bits."""
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


@dataclass(slots=True)
class Field:
    """One protobuf field: a varint, or bytes, or fields inside."""

    number: int
    value: Any
    wire: int = -1
    """-1: the one that fits."""
    claimed: int = -1
    """Length that is written; -1: the true one."""

    def encode(self) -> bytes:
        """Return the field as bytes."""
        value = self.value
        if isinstance(value, int):
            return varint(self.number << 3 | max(0, self.wire)) + varint(value)
        if isinstance(value, list):
            value = b"".join(each.encode() for each in value)
        wire = 2 if self.wire < 0 else self.wire
        return varint(self.number << 3 | wire) + varint(len(value) if self.claimed < 0 else self.claimed) + value


def infer(raw: bytes, rows: int) -> list[Field]:
    """Return a request of the identity, raw contents."""
    shape = varint(rows) + varint(WIDTH)
    tensor = [Field(1, b"x"), Field(2, b"FP32"), Field(3, shape)]
    return [Field(1, MODEL), Field(3, b"7"), Field(5, tensor), Field(7, raw)]


def infer_typed() -> list[Field]:
    """Return a request of the identity, typed contents."""
    numbers = np.arange(WIDTH, dtype="<f4").tobytes()
    tensor = [Field(1, b"x"), Field(2, b"FP32"), Field(3, varint(1) + varint(WIDTH)), Field(5, [Field(6, numbers)])]
    return [Field(1, MODEL), Field(5, tensor)]


@dataclass(slots=True)
class Case:
    """One call, or what takes its place on a connection of its own."""

    kind: str
    block: bytes = b""
    data: bytes = b""
    expected: bytes | None = None
    frames: bytes = b""
    """Sent as it is, alone."""


@dataclass(slots=True)
class _Stream:
    case: Case
    body: bytearray = field(default_factory=bytearray)
    status: str = ""
    reason: bytes = b""


_CALLS = (
    b"ModelReady",
    b"ServerReady",
    b"ModelMetadata",
    b"ModelConfig",
    b"ModelStatistics",
    b"RepositoryIndex",
    b"ServerMetadata",
)
_MORE_CALLS = (
    *_CALLS,
    b"SystemSharedMemoryStatus",
    b"SystemSharedMemoryRegister",
    b"ModelStreamInfer",
    b"Nothing",
    b"",
    b"%00",
    b"a" * 900,
)
_INFER, _STREAM, _PACKED = heads(), heads(b"ModelStreamInfer"), heads(b"ModelInfer", (b"grpc-encoding", b"gzip"))


class Cases:
    """An endless source of calls, all drawn from one seed."""

    def __init__(self, seed: int, regions: list[str]) -> None:
        self._rng = Random(seed)
        self._regions = [region.encode() for region in regions]
        self._values = np.random.default_rng(seed)

    def _raw(self) -> tuple[bytes, int]:
        rows = 1 if self._rng.random() < 0.98 else self._rng.choice((2, 7, 64))
        return self._values.standard_normal(rows * WIDTH).astype("<f4").tobytes(), rows

    def call(self) -> Case:
        """Return a call whose HTTP/2 framing is whole."""
        rng, choice = self._rng, self._rng.random()
        raw, rows = self._raw()
        if choice < 0.08:
            return Case("grpc-valid", _INFER, message(_encode(infer(raw, rows))), expected=raw)
        if choice < 0.50:
            return Case(
                "grpc-fields", _INFER, message(_encode(self._fields(infer(raw, rows) if rng.random() < 0.7 else infer_typed())))
            )
        if choice < 0.74:
            whole = infer(raw, rows) if rng.random() < 0.7 else infer_typed()
            return Case("grpc-bytes", _INFER, message(mutated_bytes(rng, _encode(whole))))
        if choice < 0.78:
            return Case("grpc-packed", _PACKED, message(packed(rng, _encode(infer(raw, rows))), flag=1))
        if choice < 0.80:
            parts = (
                infer(raw, rows) if rng.random() < 0.5 else self._fields(infer(raw, rows)) for _ in range(rng.randint(0, 6))
            )
            return Case("grpc-stream", _STREAM, b"".join(message(_encode(each)) for each in parts))
        if choice < 0.88:
            return Case("grpc-frame", _INFER, self._message(_encode(infer(raw, rows))))
        return self._heads(_encode(infer(raw, rows)))

    def _fields(self, fields: list[Field]) -> list[Field]:
        rng = self._rng
        for _ in range(rng.choice((1, 1, 2, 3))):
            inside = rng.random() < 0.6
            nested = [each.value for each in fields if isinstance(each.value, list) and each.value] if inside else []
            level = rng.choice(nested) if nested else fields
            if not level:
                return fields
            place = rng.randrange(len(level))
            chosen = level[place]
            choice = rng.randrange(9)
            if choice == 0:
                chosen.value = rng.choice(
                    (rng.choice(INTEGERS), rng.choice(TEXTS).encode("utf-8", "surrogatepass"), rng.randbytes(9))
                )
            elif choice == 1:
                chosen.claimed = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 70_000_000))
            elif choice == 2:
                chosen.wire = rng.randrange(8)
            elif choice == 3:
                chosen.number = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 2047, 2**29 - 1, 2**29))
            elif choice == 4:
                level.insert(place, chosen)
            elif choice == 5:
                del level[place]
            elif choice == 6:
                shape = b"".join(varint(rng.choice((1, WIDTH, *INTEGERS))) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 500))))
                (nested[0] if nested else level).append(Field(3, shape))
            elif choice == 7:
                level.append(Field(4, self._parameter()))
                if nested:
                    level.append(Field(4, self._parameter()))
            else:
                level.append(Field(rng.choice((4, 5, 6)), _deep(rng.choice((3, 200, 2000)))))
        return fields

    def _parameter(self) -> list[Field]:
        rng = self._rng
        name = rng.choice(
            (b"shared_memory_region", b"shared_memory_byte_size", b"shared_memory_offset", b"priority", b"timeout", b"x")
        )
        text = Field(3, rng.choice((*self._regions, b"none", b"\xff")))
        value = rng.choice((text, Field(2, rng.choice(INTEGERS)), Field(1, 1), Field(4, b"12345678", 1), Field(5, 2**64 - 1)))
        return [Field(1, name), Field(2, [value])]

    def _message(self, payload: bytes) -> bytes:
        rng = self._rng
        return rng.choice(
            (
                lambda: message(payload, flag=1),
                lambda: message(payload, flag=rng.randrange(2, 256)),
                lambda: message(payload, length=len(payload) + rng.choice((-1, 1, 5, 100))),
                lambda: message(payload, length=rng.choice((0, 2**31, 2**32 - 1, 64 << 20))),
                lambda: message(payload) * rng.choice((2, 3)),
                lambda: b"",
                lambda: message(b""),
                lambda: message(payload)[: rng.randrange(len(payload))],
                lambda: message(payload) + rng.randbytes(rng.randint(1, 9)),
            )
        )()

    def _heads(self, payload: bytes) -> Case:
        rng = self._rng
        choice = rng.randrange(4)
        if choice == 0:
            body = mutated_bytes(rng, Field(1, MODEL).encode())
            return Case("grpc-heads", heads(rng.choice(_MORE_CALLS)), message(body))
        if choice == 1:
            value = rng.choice((b"1n", b"1u", b"-1S", b"99999999H", b"1", b"S", b"", b"1x", b"123456789S", b"10S"))
            return Case("grpc-heads", heads(b"ModelInfer", (b"grpc-timeout", value)), message(payload))
        if choice == 2:
            more = rng.choice(
                (
                    *(
                        (b"grpc-encoding", b"gzip"),
                        (b"grpc-encoding", b"x"),
                        (b"grpc-accept-encoding", b"gzip"),
                        (b"x-bin", b"!"),
                    ),
                    *((b"x" * 300, b"y"), (b"cookie", b"a=b"), (b"content-length", b"5"), (b"user-agent", b"u" * 3000)),
                )
            )
            return Case("grpc-heads", heads(b"ModelInfer", more), message(payload))
        kept = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", _SERVICE + b"ModelInfer"), (b":authority", b"fuzz")]
        kept += [
            (b"content-type", rng.choice((b"application/grpc", b"application/grpc+proto", b"application/json", b"text/plain")))
        ]
        kept += [(b"te", b"trailers")] * rng.randrange(2)
        return Case("grpc-heads", b"".join(literal(*each) for each in kept), message(payload))

    def alone(self) -> Case:
        """Return frames that may end their connection."""
        rng = self._rng
        raw, rows = self._raw()
        good = frame(_HEADERS, 4, 1, _INFER) + frame(_DATA, 1, 1, message(_encode(infer(raw, rows))))
        if rng.random() < 0.4:
            block = mutated_bytes(rng, _INFER, most=6) if rng.random() < 0.6 else rng.choice(_BLOCKS)
            sent = frame(_HEADERS, 4, 1, block) + frame(_DATA, 1, 1, message(_encode(infer(raw, rows))))
            return Case("http2-hpack", frames=sent)
        if rng.random() < 0.4:
            return Case("http2-frames", frames=mutated_bytes(rng, good, most=6))
        return Case("http2-frames", frames=self._frames(good))

    def _frames(self, good: bytes) -> bytes:
        rng = self._rng
        number = rng.choice((0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1))
        some = rng.randbytes(rng.choice((0, 1, 4, 5, 8, 40)))
        return rng.choice(
            (
                lambda: frame(rng.randrange(256), rng.randrange(256), number, some) + good,
                lambda: good + frame(rng.randrange(10), rng.randrange(256), number, some),
                lambda: (
                    frame(
                        _SETTINGS,
                        0,
                        0,
                        b"".join(struct.pack(">HI", rng.randrange(9), rng.choice((0, 1, 2**31, 2**32 - 1))) for _ in range(3)),
                    )
                    + good
                ),
                lambda: frame(_WINDOW, 0, rng.choice((0, 1, 9)), struct.pack(">I", rng.choice((0, 1, 2**31 - 1)))) * 3 + good,
                lambda: b"".join(frame(_HEADERS, 4, n, _INFER) + frame(_RST, 0, n, b"\0\0\0\x08") for n in range(1, 400, 2)),
                lambda: frame(_PINGS, 0, 0, b"12345678") * 500 + good,
                lambda: frame(_SETTINGS, 0, 0, b"") * 300 + good,
                lambda: frame(_HEADERS, 0, 1, _INFER[:9]) + frame(_CONTINUATION, 0, 1, b"") * 300,
                lambda: frame(_HEADERS, 0, 1, _INFER[:9]) + good,
                lambda: frame(_HEADERS, 0, 1, b"") + frame(_CONTINUATION, 0, 1, literal(b"a" * 200, b"b" * 8000)) * 40,
                lambda: struct.pack(">I", rng.choice((16_385, 2**24 - 1)))[1:] + good[3:],
                lambda: frame(_HEADERS, 4 | 8, 1, b"\xff" + _INFER) + good,
                lambda: frame(_HEADERS, 4 | 32, 1, struct.pack(">IB", 1, 0) + _INFER) + good[9:],
                lambda: frame(_DATA, 1, 1, b"x" * 20) + good,
                lambda: good + frame(_DATA, 1, 1, b"x" * 20),
                lambda: good + frame(_HEADERS, 5, 1, _INFER),
                lambda: frame(_HEADERS, 4, 5, _INFER) + frame(_HEADERS, 4, 3, _INFER),
                lambda: frame(_GOAWAY, 0, 0, struct.pack(">II", 0, 0)) + good,
                lambda: frame(_PUSH, 4, 1, struct.pack(">I", 2) + _INFER),
                lambda: frame(_HEADERS, 4, 1, _INFER) + frame(_DATA, 0, 1, b"") * 1000,
                lambda: good[: rng.randrange(len(good))],
            )
        )()


_BLOCKS = (
    *(
        b"",
        b"\x80",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\xbf\x7f",
        b"\x3f\xff\xff\xff\xff\x0f",
        b"\x20\x20\x20" + _INFER,
    ),
    *(
        b"\x00\xff\xff\xff\xff\x7fx",
        b"\x40\x84\xff\xff\xff\xff\x00",
        literal(b"A", b"b") + _INFER,
        _INFER + literal(b":path", b"/"),
    ),
    *(
        literal(b":method", b"GET") * 2 + _INFER,
        _INFER + literal(b"connection", b"close"),
        _INFER + literal(b"a" * 200, b"b" * 9000),
    ),
    *(
        _INFER + literal(b"a", b"b") * 1500,
        _INFER[:-9],
        b"\x82\x86\x84\x41\x01a",
        literal(b":status", b"200") + _INFER,
        _INFER + literal(b"", b""),
    ),
)


def _deep(levels: int) -> bytes:
    """Return fields inside of fields, so many levels deep."""
    inside = b""
    for _ in range(levels):
        inside = b"\x22" + varint(len(inside)) + inside
    return inside


def _encode(fields: list[Field]) -> bytes:
    return b"".join(each.encode() for each in fields)[:40_000]


class Sender:
    """One thread's connections to the gRPC door."""

    def __init__(self, address: tuple[str, int], cases: Cases, report: Report) -> None:
        self._address, self._cases, self._report = address, cases, report
        self._link: _Link | None = None

    def batch(self, *, alone: bool) -> None:
        """Send one batch and see it end."""
        if alone:
            self._one_by_one([self._cases.alone() for _ in range(ALONE)])
        else:
            self._streams([self._cases.call() for _ in range(STREAMS)])

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _streams(self, cases: list[Case]) -> None:
        if self._link is None or self._link.sent > MAX_SENT - sum(len(case.data) for case in cases):
            self.close()
            self._link = _Link(self._address)
        link = self._link
        try:
            streams = link.call(cases)
            link.read(streams)
        except OSError as error:
            self._report.fail(f"{error!r} with {[s.case.kind for s in streams.values()]} unanswered: {_told(streams)}")
            self.close()
            return
        if streams:
            self._report.fail(f"the connection ended ({link.why!r}) with streams unanswered: {_told(streams)}")
            self.close()
        for stream in link.ended:
            self._judge(stream)
        link.ended.clear()
        if link.leaving:
            self.close()

    def _judge(self, stream: _Stream) -> None:
        case, status = stream.case, stream.status
        self._report.ended(case.kind, status, stream.reason)
        if case.kind == "grpc-valid" and status != "8" and not (status == "0" and stream.body.endswith(case.expected or b"")):
            self._report.fail(f"a valid call among the mutated ones got {status}: {bytes(stream.body[:200])!r}")
        elif (
            status not in PLANNED
            and status not in PLANNED_BY_KIND.get(case.kind, ())
            and not status.startswith(("rst", "http"))
        ):
            self._report.fail(f"{case.kind}: status {status} for {case.block[-60:]!r} {case.data[:300]!r}")

    def _one_by_one(self, cases: list[Case]) -> None:
        links = [_Link(self._address) for _ in cases]
        try:
            for link, case in zip(links, cases, strict=True):
                link.send(case.frames + frame(_PINGS, 0, 0, _PING), last=True)
            for link, case in zip(links, cases, strict=True):
                try:
                    self._report.ended(case.kind, link.pinged())
                except TimeoutError:
                    self._report.ended(case.kind, "stuck")
                    self._report.fail(f"{case.kind}: neither an end nor a ping's answer for {case.frames[:200]!r}")
        finally:
            for link in links:
                link.close()


def _told(streams: dict[int, _Stream]) -> str:
    first = next(iter(streams.values())).case if streams else None
    return f"{first.kind} {first.block[-80:]!r} {first.data[:200]!r}" if first else ""


class _Link:
    """One connection, read frame by frame."""

    def __init__(self, address: tuple[str, int]) -> None:
        import hpack  # in the development extra

        self._socket = socket.create_connection(address, timeout=ANSWER_MAX_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._decoder = hpack.Decoder(max_header_list_size=1 << 20)
        self._seen = bytearray()
        self._next = 1
        self.sent = 0
        self.leaving = False
        self.why = ""
        self.ended: list[_Stream] = []
        self.send(_PREFACE + frame(_SETTINGS, 0, 0, b"") + frame(_WINDOW, 0, 0, struct.pack(">I", 1 << 28)))

    def send(self, data: bytes, *, last: bool = False) -> None:
        try:
            self._socket.sendall(data)
            if last:  # a frame that is cut off swallows the ping: the server must not wait for more of it
                self._socket.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise
        except OSError:
            self.leaving = True

    def call(self, cases: list[Case]) -> dict[int, _Stream]:
        streams, out = {}, bytearray()
        for case in cases:
            number, self._next = self._next, self._next + 2
            streams[number] = _Stream(case)
            out += frame(_HEADERS, 4, number, case.block)
            for start in range(0, max(1, len(case.data)), 16_384):
                part = case.data[start : start + 16_384]
                out += frame(_DATA, 1 if start + 16_384 >= len(case.data) else 0, number, part)
            self.sent += len(case.data)
        self.send(bytes(out))
        return streams

    def read(self, streams: dict[int, _Stream]) -> None:
        """Read until every stream has ended, which takes it out, or the connection has. Raises TimeoutError."""
        while streams:
            found = self._frame()
            if found is None:
                return
            kind, flags, number, payload = found
            stream = streams.get(number)
            if kind == _HEADERS:
                fields = dict(self._decoder.decode(payload, raw=True))
                if stream is not None:
                    http = fields.get(b":status", b"200").decode()
                    stream.reason = fields.get(b"grpc-message", b"")
                    stream.status = fields.get(b"grpc-status", b"").decode() or (
                        stream.status if http == "200" else f"http{http}"
                    )
            elif kind == _DATA and stream is not None:
                stream.body += payload
            if kind == _RST and stream is not None:
                stream.status = stream.status or f"rst{int.from_bytes(payload, 'big')}"
            if stream is not None and (kind == _RST or (flags & 1 and kind in (_HEADERS, _DATA))):
                self.ended.append(streams.pop(number))

    def pinged(self) -> str:
        """Return how a connection takes what was sent: `goes on`, or how it ended. Raises TimeoutError."""
        try:
            while (found := self._frame()) is not None:
                kind, flags, _, payload = found
                if kind == _PINGS and flags & 1 and payload == _PING:
                    return "goes on"
        except TimeoutError:
            raise
        except OSError:
            return "reset"
        return self.why or "closed"

    def _frame(self) -> tuple[int, int, int, bytes] | None:
        seen = self._seen
        while len(seen) < 9 or len(seen) < 9 + int.from_bytes(seen[:3], "big"):
            data = self._socket.recv(1 << 18)
            if not data:
                return None
            seen += data
        end = 9 + int.from_bytes(seen[:3], "big")
        kind, flags, number = seen[3], seen[4], int.from_bytes(seen[5:9], "big")
        payload = bytes(seen[9:end])
        del seen[:end]
        if kind == _SETTINGS and not flags & 1:
            self.send(frame(_SETTINGS, 1, 0, b""))
        elif kind == _PINGS and not flags & 1:
            self.send(frame(_PINGS, 1, 0, payload))
        elif kind == _GOAWAY:
            self.leaving = True
            self.why = f"goaway {int.from_bytes(payload[4:8], 'big')}"
        return kind, flags, number, payload

    def close(self) -> None:
        self._socket.close()
