"""Mutated HTTP requests, and what sends them: many on one connection where the mutation leaves the framing whole.

| kind | mutated | sent |
| --- | --- | --- |
| http-valid | nothing: the answer must be right | among the others, on the same connections |
| http-json | the tree of the JSON | pipelined; an answer must come, and the next request's too |
| http-text | the bytes of the JSON | " |
| http-sizes | binary sizes, shapes, types, header length | " |
| http-values | the raw values | " |
| http-packed | bodies in gzip: whole, mutated, cut off, 40 MB of zeros in 40 KB | " |
| http-chunked | JSON as above, in chunks of any sizes with extensions and trailers | " |
| http-path | path, method, version | " |
| http-head | headers that are well formed: several, long, contradictory | alone; the connection must end or answer in time |
| http-bytes | any byte of the whole request | " |
"""

from __future__ import annotations

import copy
import socket
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from benchmarks.fuzz.report import Report
from benchmarks.fuzz.values import INTEGERS, SHAPES, TEXT_TRICKS, TEXTS, as_json, junk, mutated_bytes, mutated_tree, packed

MODEL, WIDTH = "same", 16
PIPELINED, ALONE = 32, 8
ANSWER_MAX_S = 20.0
"""Longer than the server's own bounds on a head (10 s): a connection that outlives it leaks."""
_MAX_HEAD = 1 << 16
INFER = f"/v2/models/{MODEL}/infer".encode()
PLANNED = {400, 404, 405, 408, 411, 413, 414, 415, 417, 429, 431}
_LATE = b"did not answer within"
"""In a 503 to a request that was mutated to allow a microsecond."""
PLANNED_ALONE = PLANNED | {200, 501, 505}


@dataclass(slots=True)
class Case:
    """One request."""

    kind: str
    data: bytes
    expected: bytes | None = None
    """What the body of a right answer ends with."""
    bodiless: bool = False
    """Its answer has a head only (HEAD)."""


def _request(path: bytes, body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: fuzz", b"Content-Length: %d" % len(body), *headers, b"", b""]
    return b"\r\n".join(lines) + body


class Cases:
    """An endless source of requests, all drawn from one seed."""

    def __init__(self, seed: int, regions: list[str]) -> None:
        self._rng = Random(seed)
        self._regions = regions
        self._values = np.random.default_rng(seed)

    def _tree(self, raw: bytes | None, rows: int) -> dict[str, Any]:
        tensor: dict[str, Any] = {"name": "x", "shape": [rows, WIDTH], "datatype": "FP32"}
        if raw is not None:
            tensor["parameters"] = {"binary_data_size": len(raw)}
            return {"id": "7", "inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
        tensor["data"] = list(range(rows * WIDTH))
        return {"inputs": [tensor], "parameters": {"priority": 1, "timeout": 10_000_000}}

    def _raw(self) -> tuple[bytes, int]:
        rows = 1 if self._rng.random() < 0.98 else self._rng.choice((2, 7, 64, 4096))
        return self._values.standard_normal(rows * WIDTH).astype("<f4").tobytes(), rows

    def pipelined(self) -> Case:
        """Return a request whose framing is whole."""
        rng, choice = self._rng, self._rng.random()
        if choice < 0.08:
            raw, rows = self._raw()
            return Case("http-valid", _binary(as_json(self._tree(raw, rows)), raw), expected=raw)
        if choice < 0.36:
            return Case("http-json", _request(INFER, as_json(mutated_tree(rng, self._tree(None, 1)))))
        if choice < 0.52:
            text = rng.choice(TEXT_TRICKS) if rng.random() < 0.01 else mutated_bytes(rng, as_json(self._tree(None, 1)))
            return Case("http-text", _request(INFER, text))
        if choice < 0.80:
            return Case("http-sizes", self._sizes())
        if choice < 0.84:
            return Case("http-packed", _request(INFER, packed(rng, as_json(self._tree(None, 1))), b"Content-Encoding: gzip"))
        if choice < 0.87:
            tree = self._tree(None, 1)
            return Case("http-chunked", self._chunked(as_json(mutated_tree(rng, tree) if rng.random() < 0.5 else tree)))
        if choice < 0.92:
            raw, rows = self._raw()
            values = mutated_bytes(rng, raw)[: len(raw)].ljust(len(raw), b"\xff")
            return Case("http-values", _binary(as_json(self._tree(raw, rows)), values), expected=values)
        return self._path()

    def _chunked(self, body: bytes) -> bytes:
        rng, chunks, at = self._rng, bytearray(), 0
        while at < len(body):
            size = rng.choice((1, 2, 7, 64, 4096))
            part = body[at : at + size]
            extension = rng.choice((b"", b"", b";a=b", b';c="d"'))
            chunks += b"%x%b\r\n%b\r\n" % (len(part), extension, part)
            at += size
        trailers = rng.choice((b"", b"X-After: 1\r\n"))
        lines = (b"POST " + INFER + b" HTTP/1.1", b"Host: fuzz", b"Transfer-Encoding: chunked", b"", b"")
        return b"\r\n".join(lines) + bytes(chunks) + b"0\r\n" + trailers + b"\r\n"

    def _sizes(self) -> bytes:
        rng = self._rng
        raw, rows = self._raw()
        tree = self._tree(raw, rows)
        tensor = tree["inputs"][0]
        choice = rng.randrange(8)
        if choice == 0:
            tensor["parameters"]["binary_data_size"] = rng.choice((*INTEGERS, "64", None, 64.0, [64], True, len(raw) - 1))
        elif choice == 1:
            tensor["shape"] = copy.deepcopy(rng.choice(SHAPES))
        elif choice == 2:
            tensor["datatype"] = rng.choice(("FP64", "INT32", "BYTES", "BOOL", "FP16", "BF16", "x", 7, None, *TEXTS))
        elif choice == 3:
            raw = raw[: rng.randrange(len(raw))] if rng.random() < 0.5 else raw + rng.randbytes(rng.randint(1, 99))
        elif choice == 4:
            where = {"shared_memory_region": rng.choice((*self._regions, "none", *TEXTS))}
            sizes = {"shared_memory_byte_size": rng.choice((64, *INTEGERS)), "shared_memory_offset": rng.choice((0, *INTEGERS))}
            tensor["parameters"] = where | sizes
            raw = raw if rng.random() < 0.3 else b""
        elif choice == 5:
            tree["inputs"] = tree["inputs"] * rng.choice((2, 3, 50))
        elif choice == 6:
            tree["outputs"] = [{"name": rng.choice(("y", "z", "")), "parameters": {"binary_data": junk(rng)}}] * rng.choice(
                (1, 2, 40)
            )
        text = as_json(tree)
        if choice == 7:
            length = rng.choice((len(text) - 1, len(text) + 1, 0, len(text) + len(raw), *INTEGERS))
            return _binary(text, raw, length=str(length).encode())
        return _binary(text, raw)

    def _path(self) -> Case:
        rng = self._rng
        path = rng.choice(
            (
                *(b"/", b"/v2", b"/v2/", b"/v2/health/live", b"/v2/health/ready", b"/v2/models", b"/v2/models/same"),
                *(b"/v2/models/same/ready", b"/v2/models/same/stats", b"/v2/models/same/config", b"/v2/repository/index"),
                *(b"/v2/models/same/versions/1/infer", b"/v2/models/same/versions/9/infer", b"/v2/models//infer", INFER),
                *(b"/v2/repository/models/none/load", b"/v2/repository/models/none/unload", b"/v2/systemsharedmemory/status"),
                *(b"/v2/systemsharedmemory/region/r9/register", b"/v2/systemsharedmemory/region/r9/unregister"),
                *(b"/v2/systemsharedmemory/region/r0/status", b"/v2/logging", b"/v2/trace/setting", b"/v2/models/stats"),
            )
        )
        if rng.random() < 0.5:
            extra = rng.choice(
                (b"%2e%2e/", b"%00", b"%ff%fe", b"%", b"%zz", b"?a=b", b"//", b"/x" * 300, b"a" * 2000, b"%2F", b";")
            )
            place = rng.randint(1, len(path))
            path = path[:place] + extra + path[place:]
        body = as_json(mutated_tree(rng, {"key": "/none", "offset": 0, "byte_size": 64, "ready": True}))
        method = rng.choice((b"GET", b"GET", b"POST", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"))
        return Case("http-path", _request(path, body, method=method), bodiless=method == b"HEAD")

    def alone(self) -> Case:
        """Return a request that may end its connection."""
        rng = self._rng
        raw, rows = self._raw()
        body = as_json(self._tree(None, 1)) if rng.random() < 0.5 else b""
        if rng.random() < 0.5:
            whole = _binary(as_json(self._tree(raw, rows)), raw) if not body else _request(INFER, body)
            return Case("http-bytes", mutated_bytes(rng, whole, most=6))
        length = b"%d" % len(body)
        chunked = b"Transfer-Encoding: chunked"
        headers = rng.choice(
            (
                [
                    b"Content-Length: "
                    + rng.choice((b"-1", b"+5", b"0x10", b"1e3", b"", b" ", b"10, 10", b"9" * 30, b"1000000000000000"))
                ],
                [b"Content-Length: " + length, b"Content-Length: " + rng.choice((length, b"0", b"99"))],
                [b"Content-Length: " + length, chunked],
                [chunked, b"Transfer-Encoding: identity"],
                [
                    b"Transfer-Encoding: "
                    + rng.choice((b"gzip", b"chunked, gzip", b"xchunked", b"", b" chunked", b"chunked;x=y"))
                ],
                [b"Content-Length: " + length, b"Expect: " + rng.choice((b"100-continue", b"200-maybe"))],
                [b"Content-Length: " + length, b"X-%d: %s" % (rng.randrange(99), b"v" * rng.choice((1, 1000, 70_000)))],
                [b"Content-Length: " + length, *(b"X-%d: y" % n for n in range(rng.choice((10, 2000))))],
                [
                    b"Content-Length: " + length,
                    b"Content-Encoding: " + rng.choice((b"gzip", b"deflate", b"br", b"identity", b"zstd")),
                ],
                [
                    b"Content-Length: " + length,
                    b"Inference-Header-Content-Length: " + rng.choice((b"-1", b"x", b"", b"9" * 25)),
                ],
                [
                    b"Content-Length: " + length,
                    rng.choice((b" folded: yes", b"no colon", b": empty", b"a\x00b: c", b"a b: c", b"\xff: \xff")),
                ],
                [b"Content-Length: " + length, b"Connection: " + rng.choice((b"close", b"upgrade", b"keep-alive, x", b""))],
                [
                    b"Content-Length: " + length,
                    b"Upgrade: h2c",
                    b"Connection: Upgrade, HTTP2-Settings",
                    b"HTTP2-Settings: AAMAAABk",
                ],
            )
        )
        if chunked in headers:
            chunk = rng.choice(
                (b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), b"ffffffffffffffffff\r\n", b"-1\r\n", b"5;x=" + b"y" * 5000)
            )
            body = mutated_bytes(rng, chunk) if rng.random() < 0.5 else chunk
        line = (
            b"POST "
            + INFER
            + b" "
            + rng.choice((b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/1.1 x", b""))
        )
        return Case("http-head", b"\r\n".join([line, b"Host: fuzz", *headers, b"", b""]) + body)


def _binary(text: bytes, raw: bytes, *, length: bytes = b"") -> bytes:
    header = b"Inference-Header-Content-Length: " + (length or b"%d" % len(text))
    return _request(INFER, text + raw, header)


class Sender:
    """One thread's connections to the HTTP door."""

    def __init__(self, address: tuple[str, int], cases: Cases, report: Report) -> None:
        self._address, self._cases, self._report = address, cases, report
        self._link: _Link | None = None
        self._again: list[Case] = []

    def batch(self, *, alone: bool) -> None:
        """Send one batch and see it answered."""
        if alone:
            self._one_by_one([self._cases.alone() for _ in range(ALONE)])
        else:
            fresh = PIPELINED - len(self._again)
            self._pipelined([*self._again, *(self._cases.pipelined() for _ in range(fresh))])

    def close(self) -> None:
        """Close the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None

    def _pipelined(self, cases: list[Case]) -> None:
        self._again = []
        if self._link is None:
            self._link = _Link(self._address)
        try:
            self._link.send(b"".join(case.data for case in cases))
            for index, case in enumerate(cases):
                try:
                    answer = self._link.answer(bodiless=case.bodiless)
                except (OSError, ValueError) as error:
                    answer, how = None, f" ({error!r})"
                else:
                    how = ""
                if answer is None:
                    self._report.fail(f"{case.kind}: the connection ended{how} instead of an answer to {case.data[:300]!r}")
                    self.close()
                    self._again = cases[index + 1 :]
                    return
                status, closes, body = answer
                self._judge(case, status, body)
                if closes:
                    self.close()
                    self._again = cases[index + 1 :]
                    return
        except OSError as error:
            self._report.fail(f"{cases[0].kind} and those after it: {error!r}; first: {cases[0].data[:200]!r}")
            self.close()

    def _judge(self, case: Case, status: int, body: bytes) -> None:
        self._report.ended(case.kind, str(status), body[10:] if status == 400 else b"")
        if case.kind == "http-valid" and (status != 200 or not body.endswith(case.expected or b"")) and status != 429:
            self._report.fail(f"a valid request among the mutated ones got {status}: {body[:200]!r}")
        elif case.expected is not None and status == 200 and not body.endswith(case.expected):
            self._report.fail(f"{case.kind}: 200 with other values than were sent: {case.data[:200]!r}")
        elif status != 200 and status not in PLANNED and _LATE not in body:
            self._report.fail(f"{case.kind}: {status} {body[:200]!r} for {case.data[:300]!r}")

    def _one_by_one(self, cases: list[Case]) -> None:
        links = [_Link(self._address) for _ in cases]
        try:
            for link, case in zip(links, cases, strict=True):
                link.send(case.data, last=True)
            for link, case in zip(links, cases, strict=True):
                self._report.ended(case.kind, self._end_of(link, case))
        finally:
            for link in links:
                link.close()

    def _end_of(self, link: _Link, case: Case) -> str:
        first = ""
        try:
            while (answer := link.answer(bodiless=False)) is not None:
                first = first or str(answer[0])
                if answer[0] not in PLANNED_ALONE:
                    self._report.fail(f"{case.kind}: {answer[0]} {answer[2][:200]!r} for {case.data[:400]!r}")
                if answer[1]:
                    break
        except TimeoutError:
            self._report.fail(f"{case.kind}: neither an answer nor an end within {ANSWER_MAX_S:g} s for {case.data[:300]!r}")
            return "stuck"
        except (OSError, ValueError):
            return first or "reset"
        return first or "closed"


class _Link:
    """One connection, read answer by answer."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=ANSWER_MAX_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._seen = bytearray()

    def send(self, data: bytes, *, last: bool = False) -> None:
        try:
            self._socket.sendall(data)
            if last:
                self._socket.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise

    def answer(self, *, bodiless: bool) -> tuple[int, bool, bytes] | None:
        """Return status, whether the connection ends with it, and body; None at the end. Raises ValueError, OSError."""
        seen = self._seen
        while (end := seen.find(b"\r\n\r\n")) < 0:
            if len(seen) > _MAX_HEAD:
                raise ValueError("a head without an end")
            if not self._more():
                return None
        head = bytes(seen[:end]).lower()
        status = int(head[9:12])
        if status == 100:
            del seen[: end + 4]
            return self.answer(bodiless=bodiless)
        place = head.find(b"\r\ncontent-length:")
        length = 0 if place < 0 or bodiless else int(head[place + 17 :].split(b"\r\n", 1)[0])
        while len(seen) < end + 4 + length:
            if not self._more():
                raise ValueError(f"an answer that is cut off: {bytes(seen[:300])!r}, {len(seen)} bytes")
        body = bytes(seen[end + 4 : end + 4 + length])
        del seen[: end + 4 + length]
        return status, b"\r\nconnection: close" in head, body

    def _more(self) -> bool:
        data = self._socket.recv(1 << 18)
        self._seen += data
        return bool(data)

    def close(self) -> None:
        self._socket.close()
