"""HTTP/1.1 grammar: what is accepted, two well-kept parsers read the same way; the rest is refused."""

import itertools

import h11
import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tenure.serve.http1 import BadMessage, Chunks, answer_head, parse_head

LINE = b"POST /v2/models/m/infer HTTP/1.1\r\n"


def head(*lines: bytes, first: bytes = LINE, host: bytes = b"Host: x\r\n") -> bytes:
    return first + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def test_a_head_says_what_matters() -> None:
    found = parse_head(
        head(
            b"Content-Length:  12 ",
            b"INFERENCE-header-content-length: 5",
            b"Content-Encoding: GZip",
            b"Accept-Encoding: deflate",
            b"Expect: 100-Continue",
            first=b"POST /v2/models/a%20b/infer/?x=1/2 HTTP/1.1\r\n",
        )
    )
    assert (found.method, found.path) == ("POST", ("v2", "models", "a b", "infer"))
    assert (found.length, found.json_length, found.encoding, found.accept) == (12, 5, "gzip", "deflate")
    assert (found.expects, found.keep_alive, found.chunked, found.plain) == (True, True, False, False)


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: close", False),
        (b"1.1", b"Connection: TE , Close", False),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: Keep-Alive", True),
        (b"1.0", b"Connection: keep-alive, close", False),
    ],
)
def test_who_closes_depends_on_version_and_connection(version: bytes, connection: bytes, kept: bool) -> None:
    lines = [connection] if connection else []
    assert parse_head(head(*lines, first=b"GET /v2 HTTP/%b\r\n" % version)).keep_alive is kept


def test_lists_of_encodings_are_not_taken_as_a_wish_for_compression() -> None:
    assert parse_head(head(b"Accept-Encoding: gzip, deflate, br")).accept == ""


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\r\n\r\n", 400),
        (head(first=b"POST /v2 HTTP/1.1\n"), 400),
        (head(first=b"POST  /v2 HTTP/1.1\r\n"), 400),
        (head(first=b"POST /v2 HTTP/1.1 \r\n"), 400),
        (head(first=b"POST /v 2 HTTP/1.1\r\n"), 400),
        (head(first=b"POST ftp://x/v2 HTTP/1.1\r\n"), 400),
        (head(first=b"post /v2 HTTP/1.1\r\n"), 400),
        (head(first=b"POST v2 HTTP/1.1\r\n"), 400),
        (head(first=b"POST /v2 HTTP/2.0\r\n"), 505),
        (head(first=b"POST /v2 HTTP/1.2\r\n"), 505),
        (head(first=b"POST /v2\r\n"), 400),
        (head(host=b""), 400),
        (head(b"Host: y"), 400),
        (head(b"Content-Length : 3"), 400),
        (head(b" Content-Length: 3"), 400),
        (head(b"A: b", b" folded"), 400),
        (head(b"A: b\n"), 400),
        (head(b"A: b\rc"), 400),
        (head(b"A: b\x00c"), 400),
        (head(b"A\x00: b"), 400),
        (head(b"no colon"), 400),
        (head(b": empty"), 400),
        (head(b"Content-Length: 3", b"Content-Length: 3"), 400),
        (head(b"Content-Length: 3", b"content-length: 4"), 400),
        (head(b"Content-Length: 3, 3"), 400),
        (head(b"Content-Length: +3"), 400),
        (head(b"Content-Length: -3"), 400),
        (head(b"Content-Length: 0x3"), 400),
        (head(b"Content-Length: 3_0"), 400),
        (head(b"Content-Length: \xb2"), 400),
        (head(b"Content-Length:"), 400),
        (head(b"Content-Length: 9999999999999999"), 400),
        (head(b"Content-Length: 3", b"Transfer-Encoding: chunked"), 400),
        (head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
        (head(b"Transfer-Encoding: gzip, chunked"), 501),
        (head(b"Transfer-Encoding: xchunked"), 501),
        (head(b"Transfer-Encoding:"), 501),
        (head(b"Transfer-Encoding: chunked", first=b"POST /v2 HTTP/1.0\r\n"), 400),
        (head(b"Inference-Header-Content-Length: 3", b"Inference-Header-Content-Length: 3"), 400),
        (head(b"Expect: tea"), 417),
    ],
)
def test_what_could_be_read_two_ways_is_refused(raw: bytes, status: int) -> None:
    with pytest.raises(BadMessage) as refused:
        parse_head(raw)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (head(first=b"POST /%ff HTTP/1.1\r\n"), 400),
        (head(b"Inference-Header-Content-Length: x"), 400),
        (head(b"Content-Encoding: br"), 415),
        (head(first=b"OPTIONS * HTTP/1.1\r\n"), 400),
    ],
)
def test_what_is_wrong_within_sure_bounds_is_no_reason_to_close(raw: bytes, status: int) -> None:
    refused = parse_head(raw).refused
    assert refused is not None
    assert refused.status == status


class _Heard:
    """What httptools calls."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.done = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.done = True


KNOWN_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
fields = st.sampled_from(
    [
        b"Content-Length: 5",
        b"Content-Length: 05",
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: identity",
        b"Connection: close",
        b"Connection: keep-alive",
        b"Inference-Header-Content-Length: 4",
        b"X: \xff\t y",
        b"Expect: 100-continue",
        b"Accept: */*",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(fields, max_size=4, unique=True),
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from(b"\r\n \t:\x00,;/aA0\x7f\xff")), max_size=3),
    st.sampled_from([b"GET", b"POST", b"HEAD"]),
    st.sampled_from([b"1.1", b"1.0"]),
)
@example([b"Content-Length: 5"], [(26, 13)], b"POST", b"1.1")
def test_accepted_heads_mean_the_same_to_other_parsers(lines, changes, method, version) -> None:
    raw = bytearray(head(*lines, first=method + b" /v2/models/m/infer HTTP/" + version + b"\r\n"))
    for at, code in changes:
        raw[at % (len(raw) - 4)] = code
    raw = bytes(raw)
    raw = raw[: raw.find(b"\r\n\r\n") + 4]
    try:
        found = parse_head(raw)
    except BadMessage:
        return
    if found.method not in KNOWN_METHODS:
        return
    heard = _Heard()
    parser = httptools.HttpRequestParser(heard)
    parser.feed_data(raw)
    assert heard.done
    assert parser.get_method().decode() == found.method
    event = _read_by_h11(raw)
    for headers in (heard.headers, event.headers):
        assert [int(value) for name, value in headers if name == b"content-length"] in ([found.length], [])
        assert any(name == b"transfer-encoding" for name, _ in headers) is found.chunked
        json_lengths = [value.lstrip(b"0") for name, value in headers if name == b"inference-header-content-length"]
        assert found.refused or json_lengths == ([] if found.json_length is None else [b"%d" % found.json_length])
    assert event.target == heard.url


def _read_by_h11(raw: bytes) -> h11.Request:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    event = connection.next_event()
    assert isinstance(event, h11.Request)
    return event


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_head_or_refused(raw: bytes) -> None:
    try:
        parse_head(raw + b"\r\n\r\n")
    except BadMessage:
        pass


def chunked(pieces: list[bytes], extension: bytes = b"") -> bytes:
    return b"".join(b"%x%b\r\n%b\r\n" % (len(p), extension, p) for p in pieces if p) + b"0\r\n\r\n"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=4), st.lists(st.integers(0, 150), max_size=6), st.binary(max_size=9))
def test_a_chunked_body_is_the_same_however_it_is_cut(pieces, cuts, after) -> None:
    wire = chunked(pieces, b" ; a=b") + after
    bounds = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    chunks, found, used = Chunks(), [], 0
    for start, stop in itertools.pairwise(bounds):
        if chunks.ended:
            break
        got, count = chunks.feed(wire[start:stop])
        found += got
        used += count
    assert chunks.ended
    assert b"".join(found) == b"".join(pieces)
    assert wire[used:] == after


@pytest.mark.parametrize(
    "wire",
    [
        b"x\r\n",
        b"-1\r\n",
        b"+1\r\na\r\n",
        b"0x1\r\na\r\n",
        b"1\na\r\n",
        b"1\r\nab\r\n",
        b"1\r\na\n",
        b"\r\n",
        b" 1\r\n",
        b"1\r\r\na",
        b"fffffffffffff\r\n",
        b"1;" + b"x" * 2000,
        b"0\r\n" + b"a: b\r\n" * 2000,
    ],
)
def test_chunks_that_could_be_read_two_ways_are_refused(wire: bytes) -> None:
    with pytest.raises(BadMessage):
        Chunks().feed(wire)


def test_answers_close_or_keep_as_they_say() -> None:
    plain = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n"
    assert answer_head(200, 2) == plain
    assert b"\r\nConnection: close\r\n" in answer_head(200, 2, close=True, old=True)
    assert b"\r\nConnection: keep-alive\r\n" in answer_head(200, 2, old=True)
