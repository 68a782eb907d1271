"""Request headers of one HTTP/2 connection: decoded by the hpack library, and looked up where they repeat.

From its second request on a gRPC client sends a block that refers to the decoder's table and does not change it. Such a
block means the same until the table changes, so it is decoded once; any change forgets what was known.
Source: RFC 7541 (2.3.2, 4.2: what changes the table), RFC 9113 (8.2, 8.3: what a request must and may not hold).
"""

from __future__ import annotations

import re
from typing import Any

import hpack

_KNOWN_BLOCKS = 8
_KNOWN_BYTES = 512
"""Longest block that is remembered."""
_SIZE_UPDATES = re.compile(rb"(?:[\x20-\x3e]|\x3f[\x80-\xff]*[\x00-\x7f]){3}")
"""More size updates than there is a use for (RFC 7541, 4.2); thousands would cost milliseconds."""
_PSEUDO = frozenset((b":method", b":path", b":scheme", b":authority"))
_CONNECTION = frozenset((b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"))


class Malformed(ValueError):
    """The peer's header compression cannot be followed any more."""


class Head:
    """One request's header, shared by all requests that sent the same bytes. Treat as frozen, `plan` aside."""

    __slots__ = ("error", "fields", "method", "path", "plan")

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        pseudo: dict[bytes, bytes] = {}
        self.fields: dict[bytes, bytes] = {}
        """First value of each, pseudo-headers left out."""
        self.error = ""
        """Why it is no request; empty where it is one."""
        self.plan: Any = None
        """The owner's own: what it has worked out from this header."""
        for name, value in fields:
            if name[:1] == b":":
                if self.fields or name in pseudo or name not in _PSEUDO:
                    self.error = "a pseudo-header is unknown, doubled or out of place"
                pseudo[name] = value
            else:
                if name in _CONNECTION or name != name.lower() or (name == b"te" and value != b"trailers"):
                    self.error = "a header is not allowed in HTTP/2"
                self.fields.setdefault(name, value)
        self.method = pseudo.get(b":method", b"")
        self.path = pseudo.get(b":path", b"")
        if not (self.method and self.path and b":scheme" in pseudo):
            self.error = self.error or "a pseudo-header is missing"


class HeaderReader:
    """Decoder of one connection."""

    def __init__(self, max_list_bytes: int) -> None:
        self._decoder = hpack.Decoder(max_list_bytes)
        self.known: dict[bytes, Head] = {}
        """What blocks mean while the table is as it is now. Look here first, then `read`."""

    def read(self, block: bytes) -> Head:
        """Return what a block says. Raises Malformed, after which the connection cannot go on."""
        if _SIZE_UPDATES.match(block):
            raise Malformed("a header block changes the table's size more than twice")
        table = self._decoder.header_table
        before = self._state(table)
        try:
            head = Head([(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)])
        except (hpack.HPACKError, IndexError, ValueError) as error:
            raise Malformed(f"a header block cannot be decoded: {error}") from error
        after = self._state(table)
        if before[:2] != after[:2] or before[2] is not after[2]:
            self.known.clear()
        elif len(block) <= _KNOWN_BYTES:
            if len(self.known) >= _KNOWN_BLOCKS:
                del self.known[next(iter(self.known))]
            self.known[block] = head
        return head

    @staticmethod
    def _state(table: Any) -> tuple[int, int, Any]:
        """Return what differs after any change: an insertion puts a new object first, an eviction makes it shorter."""
        entries = table.dynamic_entries
        return table.maxsize, len(entries), entries[0] if entries else None
