"""HTTP/1.1 messages without sockets: request heads, chunked bodies, answers' heads. Source: RFC 9110, RFC 9112.

A head that two parsers could read in two ways is refused, not interpreted (request smuggling lives of such): bare line feeds,
folded lines, blanks before a colon, a length given twice, a length beside chunks. One regular expression holds a head to the
grammar as a whole, after which taking it apart has only one outcome; the tests hold it against two well-kept parsers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from tenure.errors import TenureError

_HEAD = re.compile(
    rb"([A-Z]{1,20}) ((?:/|http://)[!-~]*|\*) HTTP/([0-9])\.([0-9])\r\n"
    rb"((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n"
)
_ONCE = (
    b"host",
    b"content-length",
    b"transfer-encoding",
    b"content-encoding",
    b"inference-header-content-length",
    b"expect",
)
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_MAX_DIGITS = 15
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = "application/json"


class BadMessage(TenureError):
    """A message that is no HTTP/1.1, or more of it than is understood. The connection can't be used again."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status that says so."""


@dataclass(slots=True, eq=False)
class Head:
    """One request's line and headers, as far as they matter here."""

    raw: bytes
    """Its bytes, the blank line included."""
    method: str
    path: tuple[str, ...]
    """Decoded segments, empty ones at both ends left out."""
    keep_alive: bool
    old: bool
    """HTTP/1.0: keeping the connection must be said in the answer."""
    length: int = 0
    """Of the body as it is sent; 0 where it is chunked."""
    chunked: bool = False
    encoding: str = ""
    """Of the body: gzip, deflate, or as it is."""
    accept: str = ""
    """The answer's encoding, only where the client names exactly one: libraries offer lists that nobody asked for."""
    json_length: int | None = None
    """Inference-Header-Content-Length."""
    expects: bool = False
    """The client waits for 100 Continue before it sends the body."""
    refused: BadMessage | None = None
    """What is wrong with it, where it is still sure where the request ends: the connection goes on."""
    target: tuple[str, str] | None = None
    """Model and version to infer with; the door sets it."""
    direct: bool = False
    """Its body can be read straight into its buffer; the door sets it."""
    plain: bool = False
    """The answer's head depends on nothing in this one."""


def parse_head(raw: bytes) -> Head:
    """Return a request head. raw: all of it, to the end of the blank line. Raises BadMessage where its end is not sure."""
    found = _HEAD.fullmatch(raw)
    if found is None:
        raise BadMessage("the request's head does not follow HTTP/1.1")
    method, target, major, minor, fields = found.groups()
    if major != b"1" or minor not in b"01":
        raise BadMessage(f"this server speaks HTTP/1.1; found HTTP/{major.decode()}.{minor.decode()}", 505)
    headers: dict[bytes, bytes] = {}
    for line in fields.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        if name in headers:
            if name in _ONCE:
                raise BadMessage(f"the header {name.decode()} is given twice")
            value = headers[name] + b"," + value
        headers[name] = value
    old = minor == b"0"
    if not old and b"host" not in headers:
        raise BadMessage("HTTP/1.1 needs a Host header")
    options = {option.strip(b" \t").lower() for option in headers.get(b"connection", b"").split(b",")}
    head = Head(
        raw=raw,
        method=method.decode(),
        path=(),
        keep_alive=b"close" not in options and (not old or b"keep-alive" in options),
        old=old,
        length=_whole(headers, b"content-length") or 0,
        chunked=_chunked(headers, old),
    )
    expect = headers.get(b"expect")
    if expect is not None:
        if expect.lower() != b"100-continue":
            raise BadMessage("the only expectation met here is 100-continue", 417)
        head.expects = not old
    accept = headers.get(b"accept-encoding", b"").lower()
    head.accept = accept.decode() if accept in (b"gzip", b"deflate") else ""
    head.plain = head.keep_alive and not old and not head.accept
    try:
        head.path = _path(target)
        head.encoding = _encoding(headers.get(b"content-encoding", b""))
        head.json_length = _whole(headers, b"inference-header-content-length")
    except BadMessage as error:
        head.refused = error
    return head


def answer_head(
    status: int, length: int, *, content_type: str = JSON, extra: tuple[str, ...] = (), close: bool = False, old: bool = False
) -> bytes:
    """Return an answer's status line and headers. extra: further header lines. old: the request was HTTP/1.0."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}", f"Content-Type: {content_type}", *extra]
    if close:
        lines.append("Connection: close")
    elif old:
        lines.append("Connection: keep-alive")
    return "\r\n".join((*lines, f"Content-Length: {length}", "", "")).encode()


class Chunks:
    """A chunked body being read. Extensions and trailers are skipped, within bounds."""

    _MAX_LINE_BYTES = 1024
    _MAX_TRAILER_BYTES = 8 << 10

    def __init__(self) -> None:
        self.ended = False
        self._line = bytearray()
        self._left = 0
        """Bytes of the present chunk still to come; -1: its line end; -2: trailers."""
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> tuple[list[bytes], int]:
        """Return the content in `data`, and how many of its bytes belong to this body. Raises BadMessage."""
        pieces: list[bytes] = []
        at = 0
        while at < len(data) and not self.ended:
            if self._left > 0:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if not self._left:
                    self._left = -1
                continue
            end = data.find(b"\n", at)
            stop = len(data) if end < 0 else end + 1
            self._line += data[at:stop]
            at = stop
            if len(self._line) > self._MAX_LINE_BYTES:
                raise BadMessage("a chunk's line is too long")
            if end >= 0:
                self._take_line(bytes(self._line))
                self._line.clear()
        return pieces, at

    def _take_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise BadMessage("a line of a chunked body does not end in CR LF")
        if self._left == -1:
            if line != b"\r\n":
                raise BadMessage("a chunk is longer than its size says")
            self._left = 0
        elif self._left == -2:
            self._trailer_bytes += len(line)
            if self._trailer_bytes > self._MAX_TRAILER_BYTES:
                raise BadMessage("a chunked body's trailers are too long")
            self.ended = line == b"\r\n"
        else:
            size = line[:-2].partition(b";")[0].rstrip(b" \t")
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,12}", size):
                raise BadMessage("a chunk's size is no hexadecimal number")
            self._left = int(size, 16) or -2


def _path(target: bytes) -> tuple[str, ...]:
    if target.startswith(b"http://"):
        target = b"/" + target[7:].partition(b"/")[2]
    if not target.startswith(b"/"):
        raise BadMessage("the request's target must be a path")
    path = target.partition(b"?")[0].decode("latin-1")
    try:
        return tuple(unquote(part, errors="strict") for part in path.strip("/").split("/"))
    except UnicodeDecodeError as error:
        raise BadMessage("the request's path is no UTF-8") from error


def _whole(headers: dict[bytes, bytes], name: bytes) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > _MAX_DIGITS:
        raise BadMessage(f"{name.decode()} must be a whole number; found {value[:40].decode('latin-1')!r}")
    return int(value)


def _chunked(headers: dict[bytes, bytes], old: bool) -> bool:
    coding = headers.get(b"transfer-encoding")
    if coding is None:
        return False
    if b"content-length" in headers or old:
        raise BadMessage("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
    if coding.lower() != b"chunked":
        raise BadMessage("the only transfer encoding understood is chunked", 501)
    return True


def _encoding(value: bytes) -> str:
    name = value.lower().decode("latin-1")
    if name in ("", "identity"):
        return ""
    if name in ("gzip", "x-gzip"):
        return "gzip"
    if name == "deflate":
        return name
    raise BadMessage(f"Content-Encoding {name[:40]!r} is not understood; send gzip, deflate, or the body as it is", 415)
