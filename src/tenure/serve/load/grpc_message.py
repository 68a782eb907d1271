"""A gRPC call as the load generator sends and reads it: frames made ready once, header blocks known by their bytes.

Sources: gRPC over HTTP/2 (message prefix, status), RFC 7541 (header blocks). Not here: the connection (`grpc_connection`).
"""

from __future__ import annotations

from urllib.parse import unquote

import hpack

from tenure.serve import v2
from tenure.serve.codec_infer import encode_varint
from tenure.serve.http2_headers import Malformed
from tenure.serve.http2_send import DATA, END_HEADERS, END_STREAM, HEADERS, frame

_KNOWN_BLOCKS = 64
_KNOWN_BYTES = 512
NO_STATUS = -1


class Message:
    """One request, as a gRPC message, and its frames ready to be sent."""

    __slots__ = ("_block", "_templates", "body", "nbytes")

    def __init__(self, block: bytes, message: bytes) -> None:
        self._block = block
        self.body = b"\0" + len(message).to_bytes(4, "big") + message
        self.nbytes = len(self.body)
        self._templates: dict[int, tuple[bytearray, tuple[int, ...]]] = {}

    def headers(self, stream_id: int) -> bytes:
        """Return the frame that opens a stream."""
        return frame(HEADERS, END_HEADERS, stream_id, self._block)

    def template(self, max_frame: int) -> tuple[bytearray, tuple[int, ...]]:
        """Return all frames of a stream, and where in them its number belongs."""
        found = self._templates.get(max_frame)
        if found is None:
            frames, places = bytearray(self.headers(0)), [5]
            for at in range(0, self.nbytes, max_frame):
                part = self.body[at : at + max_frame]
                places.append(len(frames) + 5)
                frames += frame(DATA, END_STREAM if at + max_frame >= self.nbytes else 0, 0, part)
            found = self._templates[max_frame] = (frames, tuple(places))
        return found


def header_block(authority: str) -> bytes:
    """Return the header block of ModelInfer, which changes no table: literals without indexing, RFC 7541, 6.2.2."""
    named = {
        b":path": f"/{v2.SERVICE}/ModelInfer".encode(),
        b":authority": authority.encode(),
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"user-agent": b"tenure-load",
    }
    block = b"\x83\x86"  # :method POST and :scheme http, from the static table
    for name, value in named.items():
        block += b"\x00" + _string(name) + _string(value)
    return block


class StatusReader:
    """What the header blocks of one connection say of their calls. Equal blocks are decoded once, while no table changes."""

    def __init__(self) -> None:
        self._decoder = hpack.Decoder()
        self.known: dict[bytes, tuple[int, str]] = {}
        """Look here first, then `read`."""

    def read(self, block: bytes) -> tuple[int, str]:
        """Return a block's gRPC status, `NO_STATUS` where it has none, and the reason in words where it isn't 0.

        Raises Malformed, after which the connection cannot go on.
        """
        before = self._table()
        try:
            fields = {bytes(name): bytes(value) for name, value in self._decoder.decode(block, raw=True)}
        except (hpack.HPACKError, IndexError, ValueError) as error:
            raise Malformed(f"a header block cannot be decoded: {error}") from error
        told = fields.get(b"grpc-status", b"")
        status = int(told) if told.isdigit() else NO_STATUS
        if status == NO_STATUS:
            reason = f"no gRPC status came, but HTTP {fields.get(b':status', b'?').decode(errors='replace')}"
        else:
            words = unquote(fields.get(b"grpc-message", b"").decode(errors="replace"))
            reason = f"gRPC status {status}: {words}"[:200] if status else ""
        after = self._table()
        if before[0] != after[0] or before[1] is not after[1]:
            self.known.clear()
        elif len(block) <= _KNOWN_BYTES and not 0x20 <= block[0] < 0x40:  # a block that begins so sizes the table
            if len(self.known) >= _KNOWN_BLOCKS:
                self.known.clear()
            self.known[block] = (status, reason)
        return status, reason

    def _table(self) -> tuple[int, object]:
        """Return what differs after any change: an insertion puts a new object first, an eviction makes it shorter."""
        entries = self._decoder.header_table.dynamic_entries
        return len(entries), entries[0] if entries else None


def _string(value: bytes) -> bytes:
    """Return a literal of a header block, not Huffman-coded (RFC 7541, 5.2)."""
    if len(value) < 127:
        return bytes((len(value),)) + value
    return b"\x7f" + encode_varint(len(value) - 127) + value
