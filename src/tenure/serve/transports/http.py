"""The client's way over HTTP: raw tensors, kept-alive connections; standard library when sync, aiohttp when async."""

from __future__ import annotations

import http.client
import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve import codec_http
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge
from tenure.serve.tensors import Array, ModelMetadata
from tenure.serve.transports import Stages

if TYPE_CHECKING:
    import asyncio

    import aiohttp

_Parts = list[bytes | memoryview]


def open_transport(host: str, port: int, timeout_s: float) -> HttpTransport:
    """Return a transport; connects on first use."""
    return HttpTransport(host, port, timeout_s)


class HttpTransport:
    """See Transport."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._host, self._port, self._timeout_s = host.strip("[]"), port, timeout_s
        self._address = f"http://{host}:{port}"
        self._idle: deque[http.client.HTTPConnection] = deque(maxlen=64)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def metadata(self, name: str) -> ModelMetadata:
        """See Transport."""
        status, headers, body, _ = self._exchange("GET", f"/v2/models/{quote(name, safe='')}", None, {})
        _check(status, headers, body)
        return codec_http.decode_metadata(body)

    def ready(self) -> bool:
        """See Transport."""
        try:
            return self._exchange("GET", "/v2/health/ready", None, {})[0] == 200
        except Unavailable:
            return False

    def infer(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        parts, headers = _request(name, inputs, outputs)
        status, found, body, (sent_s, answered_s) = self._exchange("POST", _path(name), parts, headers)
        answer = _outputs(status, found, body)
        return answer, Stages(sent_s - began_s, answered_s - sent_s, time.perf_counter() - answered_s)

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        import aiohttp

        began_s = time.perf_counter()
        parts, headers = _request(name, inputs, outputs)
        session = await self._opened()
        sent_s = time.perf_counter()
        try:
            async with session.post(self._address + _path(name), data=b"".join(parts), headers=headers) as response:
                answered_s = time.perf_counter()
                answer = _outputs(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unavailable(error) from error
        return answer, Stages(sent_s - began_s, answered_s - sent_s, time.perf_counter() - answered_s)

    def close(self) -> None:
        """See Transport."""
        while self._idle:
            self._idle.pop().close()
        if self._session is not None and self._loop is not None and not self._loop.is_closed():
            if self._loop.is_running():
                self._closing = self._loop.create_task(self._session.close())
            else:
                self._loop.run_until_complete(self._session.close())
        self._session = None

    async def close_async(self) -> None:
        """See Transport."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
        self.close()

    async def _opened(self) -> aiohttp.ClientSession:
        import asyncio  # who awaits has it; a sync client stays 4 MB smaller without

        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:
            import aiohttp  # only an async client pays for it

            timeout = aiohttp.ClientTimeout(total=self._timeout_s)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
            self._loop = loop
        return self._session

    def _exchange(
        self, method: str, path: str, parts: _Parts | None, headers: Mapping[str, str]
    ) -> tuple[int, Any, bytes, tuple[float, float]]:
        """Return status, headers, body, and when the request was written and the answer began.

        A kept connection that the server has closed meanwhile is replaced once: inference changes nothing, so it may be
        sent again.
        """
        while True:
            try:
                connection, kept = self._idle.pop(), True
            except IndexError:
                connection, kept = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s), False
            try:
                connection.request(method, path, body=parts, headers=dict(headers))
                sent_s = time.perf_counter()
                response = connection.getresponse()
                answered_s = time.perf_counter()
                body = response.read()
            except (http.client.HTTPException, OSError) as error:
                connection.close()
                if kept and isinstance(error, (ConnectionError, http.client.RemoteDisconnected)):
                    continue
                raise self._unavailable(error) from error
            if response.will_close or len(self._idle) >= 64:
                connection.close()
            else:
                self._idle.append(connection)
            return response.status, response.headers, body, (sent_s, answered_s)

    def _unavailable(self, error: BaseException) -> Unavailable:
        reason = f"no answer within {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
        return Unavailable(f"{self._address} cannot be used: {reason}")


def _path(name: str) -> str:
    return f"/v2/models/{quote(name, safe='')}/infer"


def _request(name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[_Parts, dict[str, str]]:
    parts, length = codec_http.encode_request(inputs, outputs)
    headers = {
        "Content-Type": "application/octet-stream",
        codec_http.HEADER_LENGTH: str(length),
        "Content-Length": str(sum(len(part) for part in parts)),
    }
    return parts, headers


def _outputs(status: int, headers: Any, body: bytes) -> dict[str, Array]:
    _check(status, headers, body)
    length = headers.get(codec_http.HEADER_LENGTH)
    return codec_http.decode_answer(body, int(length) if length else None).outputs


def _check(status: int, headers: Any, body: bytes) -> None:
    """Raise what a status means, with the server's reason."""
    if status == 200:
        return
    try:
        reason = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP {status}: {body[:200]!r}"
    if status == 429:
        after = headers.get("Retry-After", "1")
        raise Overloaded(reason, retry_after_s=float(after) if after.isdigit() else 1.0)
    kinds: dict[int, type[TenureError]] = {400: InputRefused, 404: NotFound, 413: TooLarge, 503: Unavailable}
    raise kinds.get(status, ModelFailed)(reason)
