"""How a gRPC call starts and ends as HTTP/2 headers: what a request's say, and the blocks that answer it.

Blocks are written without the compression table (literal fields), so they are constants and depend on no connection.
Source: "gRPC over HTTP2" (PROTOCOL-HTTP2.md), "gRPC Retry Design" (pushback), statuscodes.md of the gRPC project.
"""

from __future__ import annotations

import math

from tenure.errors import MissingExtra, NotFound, Refused, SpecError, TenureError, Unavailable
from tenure.serve.faults import InputRefused, Overloaded, TooLarge

OK, CANCELLED, UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = range(6)
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 8, 9, 12, 13, 14

_CODES: tuple[tuple[type[TenureError], int], ...] = (
    (TooLarge, RESOURCE_EXHAUSTED),
    (SpecError, INVALID_ARGUMENT),
    (NotFound, NOT_FOUND),
    (Refused, RESOURCE_EXHAUSTED),
    (Unavailable, UNAVAILABLE),
    (MissingExtra, FAILED_PRECONDITION),
)
ACCEPTED_ENCODINGS = ("identity", "gzip", "deflate")
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_MAX_MESSAGE_BYTES = 1024
"""Of an error's text: clients refuse headers above 8 KiB, and a byte may take three."""
_PLAIN = frozenset(range(0x20, 0x7F)) - {0x25}


class StatusError(TenureError):
    """A call that the door refuses with a code of its own choice."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def code_of(error: TenureError) -> int:
    """Return the status code that tells a client what it can do about an error."""
    if isinstance(error, StatusError):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), INTERNAL)


def field(name: bytes, value: bytes) -> bytes:
    """Return a header field that touches no compression table. Source: RFC 7541, 6.2.2."""
    return b"\0" + _integer(len(name)) + name + _integer(len(value)) + value


def _integer(value: int) -> bytes:
    if value < 127:
        return bytes((value,))
    out, value = bytearray((127,)), value - 127
    while value > 127:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


HEADERS = b"\x88" + field(b"content-type", b"application/grpc")
"""Start of every answer: status 200."""
TRAILERS = field(b"grpc-status", b"0")
"""End of an answer without error."""


def error_trailers(code: int, error: TenureError) -> bytes:
    """Return the trailer block that ends a call with an error: status, text, and when to try again if that helps."""
    block = field(b"grpc-status", b"%d" % code) + field(b"grpc-message", percent_encoded(str(error)))
    if isinstance(error, Overloaded):
        wait_s = max(0.0, error.retry_after_s)
        block += field(b"retry-after-s", f"{wait_s:.3g}".encode())
        block += field(b"grpc-retry-pushback-ms", b"%d" % math.ceil(wait_s * 1000))
    if code == UNIMPLEMENTED:
        block += field(b"grpc-accept-encoding", ",".join(ACCEPTED_ENCODINGS).encode())
    return block


def http_error(status: int) -> bytes:
    """Return the header block for a request that is not gRPC at all."""
    return b"\x08\x03" + str(status).encode()


def percent_encoded(message: str) -> bytes:
    """Return a text as grpc-message carries it, cut to what clients accept."""
    raw = message.encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore").encode()
    return b"".join(b"%c" % byte if byte in _PLAIN else b"%%%02X" % byte for byte in raw)


def parse_timeout(value: bytes) -> float:
    """Return a grpc-timeout in seconds. Raises InputRefused."""
    text = value.decode("latin-1")
    unit = _UNITS_S.get(text[-1:])
    if unit is None or not 1 <= len(text) - 1 <= 8 or not (text[:-1].isascii() and text[:-1].isdigit()):
        raise InputRefused(f"grpc-timeout must be up to 8 digits and one of {', '.join(_UNITS_S)}; found {text[:40]!r}")
    return int(text[:-1]) * unit
