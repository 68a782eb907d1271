"""The HTTP door: Open Inference Protocol v2 as a raw ASGI application, one per data plane.

GET /v2, /v2/health/live, /v2/health/ready, /v2/models/M[/versions/V][/ready], /metrics; POST …/infer.
Not here: sockets and signals (`server`), what a body means (`codec_http`), running models (`dataplane`).
No web framework: routing is a split of the path, which is a visible part of a small request's cost otherwise.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

import msgspec

from tenure.errors import NotFound, SpecError, TenureError, Unavailable
from tenure.serve import codec_http
from tenure.serve.bridge import EXTENSIONS, SERVER_NAME
from tenure.serve.bridge import Bridge as DataPlane
from tenure.serve.faults import InputRefused, Overloaded, TooLarge
from tenure.serve.messages import InferAnswer, InferRequest
from tenure.serve.plane import Answer, Output
from tenure.serve.tensors import datatype_of, from_raw, to_raw

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_STATUS: tuple[tuple[type[TenureError], int], ...] = (
    (TooLarge, 413),
    (SpecError, 400),
    (NotFound, 404),
    (Overloaded, 429),
    (Unavailable, 503),
)
_JSON = (b"content-type", b"application/json")
_HEADER_LENGTH = codec_http.HEADER_LENGTH.lower().encode()


class _Left(Exception):
    """The client went away while its body was read."""


class _Method(SpecError):
    """Another method is needed. `allow` names it."""

    def __init__(self, allow: str) -> None:
        super().__init__(f"this address takes {allow} only")
        self.allow = allow


class HttpDoor:
    """ASGI application over a data plane."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request. Whatever is wrong with it becomes a status and a JSON body {"error": reason}."""
        if scope["type"] != "http":
            return
        try:
            await self._route(scope, receive, send)
        except _Left:
            return
        except TenureError as error:
            await _refuse(send, error)

    async def _route(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        parts = [unquote(part) for part in scope["raw_path"].decode("latin-1").split("?")[0].strip("/").split("/")]
        if parts[:2] == ["v2", "models"] and len(parts) >= 3:
            await self._model(parts[2], parts[3:], scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            raise _Method("GET")
        plane = self._plane
        match parts:
            case ["v2"]:
                about = {"name": SERVER_NAME, "version": plane.version, "extensions": EXTENSIONS}
                await _answer(send, 200, msgspec.json.encode(about))
            case ["v2", "health", "live"]:
                await _answer(send, 200, b'{"live":true}')
            case ["v2", "health", "ready"]:
                await _answer(send, 200 if plane.ready else 503, b'{"ready":true}' if plane.ready else b'{"ready":false}')
            case ["metrics"]:
                from tenure.serve.metrics import render  # not needed to start serving

                await _answer(send, 200, render(plane), ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),))
            case _:
                raise NotFound(f"there is nothing at {scope['path'][:200]!r}; this server speaks /v2 and /metrics")

    async def _model(self, name: str, rest: list[str], scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        version = ""
        if rest[:1] == ["versions"] and len(rest) >= 2:
            version, rest = rest[1], rest[2:]
        if rest == ["infer"]:
            if scope["method"] != "POST":
                raise _Method("POST")
            await self._infer(name, version, scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD"):
            raise _Method("GET")
        if rest == ["ready"]:
            ready = self._plane.model_ready(name, version)
            body = msgspec.json.encode({"name": name, "ready": ready})
            await _answer(send, 200 if ready else 503, body)
        elif not rest:
            await _answer(send, 200, codec_http.encode_metadata(self._plane.metadata(name, version)))
        else:
            raise NotFound(f"there is nothing at {scope['path'][:200]!r}")

    async def _infer(self, name: str, version: str, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        held = _Held(self._plane)
        try:
            header_length = _read_headers(scope["headers"], held)
            body = await self._read(receive, held)
            request, template = _request(body, header_length, name, version)
            content, raw = _answer_parts(await self._plane.infer(request), template)
        finally:
            held.release()
        if not raw:
            await _answer(send, 200, content)
        else:
            headers = ((b"content-type", b"application/octet-stream"), (_HEADER_LENGTH, str(len(content)).encode()))
            await _answer(send, 200, b"".join((content, *raw)), headers)

    async def _read(self, receive: Receive, held: _Held) -> bytes:
        """Return the whole body, its bytes accounted for. Raises TooLarge, Overloaded, Unavailable when it does not come."""
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._plane.limits.timeout_s):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise _Left
                    chunk = event.get("body", b"")
                    held.arrived(len(chunk))
                    chunks.append(chunk)
                    if not event.get("more_body", False):
                        break
        except TimeoutError as error:
            raise Unavailable(f"the body did not arrive within {self._plane.limits.timeout_s:g} s") from error
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _Held:
    """What one request accounts for in the data plane: its claimed length at once, more as it arrives."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        self._held = 0
        self._arrived = 0

    def claim(self, size_bytes: int) -> None:
        """Account for a claimed length before anything of it is read. Raises TooLarge, Overloaded."""
        self._plane.hold(size_bytes)
        self._held += size_bytes

    def arrived(self, size_bytes: int) -> None:
        """Account for bytes beyond the claim (bodies without one). Raises TooLarge, Overloaded."""
        self._arrived += size_bytes
        if self._arrived > self._held:
            if self._arrived > self._plane.limits.max_request_bytes:
                raise TooLarge(f"a request may have {self._plane.limits.max_request_bytes} bytes; this one has more")
            self.claim(self._arrived - self._held)

    def release(self) -> None:
        self._plane.release(self._held)


def _request(body: bytes, header_length: int | None, model: str, version: str) -> tuple[InferRequest, codec_http.Template]:
    content, raw = codec_http.split(memoryview(body), header_length)
    found = codec_http.decode_request(content)
    template = found.template if isinstance(found, codec_http.TypedRequest) else found
    if any(ref.region for ref in template.inputs) or any(wanted.region for wanted in template.outputs):
        raise InputRefused("shared memory is not offered")
    if raw.nbytes != template.raw_bytes:
        raise InputRefused(f"the raw inputs take {template.raw_bytes} bytes; {raw.nbytes} follow the JSON")
    if isinstance(found, codec_http.TypedRequest):
        filled = memoryview(bytearray(found.nbytes))
        found.write(filled, raw)
        raw = filled
    inputs = {
        ref.name: from_raw(raw[ref.offset : ref.offset + ref.nbytes], ref.datatype, ref.shape, tensor=ref.name)
        for ref in template.inputs
    }
    outputs = tuple(wanted.name for wanted in template.outputs)
    return InferRequest(model=model, version=version, id=template.id, inputs=inputs, outputs=outputs), template


def _answer_parts(answer: InferAnswer, template: codec_http.Template) -> tuple[bytes, list[memoryview]]:
    outputs = tuple(
        Output(name, datatype_of(array), array.shape, memoryview(to_raw(array))) for name, array in answer.outputs.items()
    )
    return codec_http.answer_json(Answer(answer.model, answer.version, outputs), answer.id, template.raw_outputs)


def _read_headers(headers: list[tuple[bytes, bytes]], held: _Held) -> int | None:
    header_length = None
    for name, value in headers:
        if name == b"content-length":
            held.claim(_whole(value, "Content-Length"))
        elif name == _HEADER_LENGTH:
            header_length = _whole(value, codec_http.HEADER_LENGTH)
        elif name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise InputRefused(f"Content-Encoding {value[:40].decode('latin-1')!r} is not understood; send the body as it is")
    return header_length


def _whole(value: bytes, name: str) -> int:
    if not value.isdigit() or len(value) > 18:
        raise InputRefused(f"{name} must be a whole number; found {value[:40].decode('latin-1')!r}")
    return int(value)


async def _refuse(send: Send, error: TenureError) -> None:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)
    if isinstance(error, Overloaded):
        headers += ((b"retry-after", str(math.ceil(error.retry_after_s)).encode()),)
    if isinstance(error, _Method):
        status, headers = 405, (*headers, (b"allow", error.allow.encode()))
    if status == 413:  # the rest of the body is not read: the connection cannot be used again
        headers += ((b"connection", b"close"),)
    await _answer(send, status, msgspec.json.encode({"error": str(error)}), headers)


async def _answer(
    send: Send, status: int, body: bytes | memoryview, headers: tuple[tuple[bytes, bytes], ...] = (_JSON,)
) -> None:
    sized = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": sized})
    await send({"type": "http.response.body", "body": body})
