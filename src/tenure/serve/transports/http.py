"""The client's way over HTTP, and over shared memory to a server on this machine: raw tensors, kept-alive connections.

    inputs ──► request head (made once per shapes) + tensors ──► socket            the server is anywhere
           └─► copied into a part of /dev/shm, head alone    ──► socket            the server sees this machine's /dev/shm

Shared memory is used by itself where it pays and the server agrees; where it can't be had, the request travels in its
body, and nobody notices. Sync requests use plain sockets, async ones the running event loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tenure.errors import TenureError, Unavailable
from tenure.serve.http_client import v2json
from tenure.serve.http_client.blocking import Answered, Buffer, Connections, Pending
from tenure.serve.http_client.regions import Part
from tenure.serve.http_client.response import NotHttp
from tenure.serve.http_client.shared import SharedInputs, here
from tenure.serve.tensors import Array, ModelMetadata, to_raw
from tenure.serve.transports import Stages

if TYPE_CHECKING:
    import asyncio

    from tenure.serve.http_client.streaming import Streams

_KEPT_HEADS = 256
_READY_TIMEOUT_S = 2.0
T = TypeVar("T")


class _Begun(NamedTuple):
    """One of several requests in flight."""

    inputs: Mapping[str, Array]
    part: Part | None
    pending: Pending | TenureError
    """Or why it was not sent."""


def open_transport(host: str, port: int, timeout_s: float, *, shm: bool | None = None) -> HttpTransport:
    """Return a transport; connects on first use. shm: True insists on shared memory, False never uses it."""
    return HttpTransport(host, port, timeout_s, shm=shm)


class HttpTransport:
    """See Transport."""

    def __init__(self, host: str, port: int, timeout_s: float, *, shm: bool | None = None) -> None:
        self._host, self._port, self._timeout_s = host.strip("[]"), port, timeout_s
        self._named = f"{host}:{port}"
        self._sync = Connections(self._host, port)
        self._async: Streams | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heads: dict[v2json.Key, bytes] = {}
        self._shared = SharedInputs(
            self._named, self._ask, insist=bool(shm), off=not shm and (shm is False or not here(self._host))
        )

    def metadata(self, name: str) -> ModelMetadata:
        """See Transport."""
        head, body, *_ = self._ask([v2json.get_head(self._named, v2json.model_path(name))])
        if head.status != 200:
            raise v2json.told_error(head, body)
        return v2json.read_metadata(body)

    def ready(self) -> bool:
        """See Transport."""
        try:
            head = self._ask([v2json.get_head(self._named, "/v2/health/ready")], _READY_TIMEOUT_S)[0]
        except Unavailable:
            return False
        return head.status == 200

    def infer(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        key = v2json.request_key(name, inputs, outputs)
        for _ in range(2 if self._shared.fits(inputs) else 0):  # once more with a new region where the server lost the first
            part = self._shared.take(inputs)
            if part is None:
                break
            try:
                answered = self._ask([self._shared.request(part, key, name, inputs, outputs)])
            finally:
                self._shared.give(part)
            if not self._shared.was_lost(part, answered[0].status):
                return _finished(answered, began_s)
        return _finished(self._ask(self._request(key, name, inputs, outputs)), began_s)

    def infer_each(
        self, name: str, many: Iterable[Mapping[str, Array]], outputs: Sequence[str], in_flight: int
    ) -> Generator[dict[str, Array] | TenureError, None, None]:
        """See Transport. Each request in flight has a connection of its own, which are kept."""
        waiting: deque[_Begun] = deque()
        try:
            for inputs in many:
                if len(waiting) >= in_flight:
                    yield self._ended(waiting.popleft(), name, outputs)
                waiting.append(self._begun(name, inputs, outputs))
            while waiting:
                yield self._ended(waiting.popleft(), name, outputs)
        finally:
            for begun in waiting:
                if begun.part is not None:
                    self._shared.give(begun.part)
                if isinstance(begun.pending, Pending):
                    self._sync.abandon(begun.pending)

    def _begun(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> _Begun:
        """Send a request; why it could not be sent is told in its turn."""
        part: Part | None = None
        try:
            key = v2json.request_key(name, inputs, outputs)
            if self._shared.fits(inputs):
                part = self._shared.take(inputs)
            if part is None:
                request: Sequence[Buffer] = self._request(key, name, inputs, outputs)
            else:
                request = [self._shared.request(part, key, name, inputs, outputs)]
            return _Begun(inputs, part, self._sync.begin(request, self._timeout_s))
        except (TenureError, OSError) as error:
            return _Begun(inputs, part, self._unavailable(error) if isinstance(error, OSError) else error)
        except BaseException:
            if part is not None:
                self._shared.give(part)
            raise

    def _ended(self, begun: _Begun, name: str, outputs: Sequence[str]) -> dict[str, Array] | TenureError:
        """Return what came of a request; once more, by itself, where the server lost its region."""
        inputs, part, pending = begun
        try:
            try:
                if isinstance(pending, TenureError):
                    return pending
                head, body, *_ = self._sync.finish(pending)
            finally:
                if part is not None:
                    self._shared.give(part)
            if part is not None and self._shared.was_lost(part, head.status):
                return self.infer(name, inputs, outputs)[0]
            return v2json.read_answer(head, body)
        except (OSError, NotHttp) as error:
            return self._unavailable(error)
        except TenureError as error:
            return error

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        streams = self._opened()
        key = v2json.request_key(name, inputs, outputs)
        for _ in range(2 if self._shared.fits(inputs) else 0):
            part = self._shared.take_nowait(inputs) or await _aside(self._shared.take, inputs)
            if part is None:
                break
            try:
                request = self._shared.request(part, key, name, inputs, outputs)
                answered = await self._ask_async(streams, [request])
            finally:
                self._shared.give(part)
            status = answered[0].status
            if status == 200 or not await _aside(self._shared.was_lost, part, status):
                return _finished(answered, began_s)
        return _finished(await self._ask_async(streams, self._request(key, name, inputs, outputs)), began_s)

    def close(self) -> None:
        """See Transport."""
        self._shared.close()
        self._sync.close()
        streams, self._async = self._async, None
        if streams is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(streams.close)

    async def close_async(self) -> None:
        """See Transport."""
        streams, self._async = self._async, None
        if streams is not None:
            await streams.close_async()
        self.close()

    def _opened(self) -> Streams:
        import asyncio  # who awaits has it; a sync client stays 4 MB smaller without

        loop = asyncio.get_running_loop()
        if self._async is None or self._loop is not loop:
            from tenure.serve.http_client.streaming import Streams

            self._async, self._loop = Streams(self._host, self._port), loop
        return self._async

    def _request(self, key: v2json.Key, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Buffer]:
        """Return head and raw tensors; arrays in the protocol's layout are not copied."""
        raw = [to_raw(array) for array in inputs.values()]
        head = self._heads.get(key)
        if head is None:
            head = v2json.infer_head(self._named, name, inputs, [len(one) for one in raw], outputs)
            if not any(array.dtype.kind in "OSU" for array in inputs.values()):  # their size is not in the key
                if len(self._heads) >= _KEPT_HEADS:
                    self._heads.clear()
                self._heads[key] = head
        return [head, *raw]

    def _ask(self, buffers: Sequence[Buffer], timeout_s: float | None = None) -> Answered:
        try:
            return self._sync.exchange(buffers, min(timeout_s or self._timeout_s, self._timeout_s))
        except (OSError, NotHttp) as error:
            raise self._unavailable(error) from error

    async def _ask_async(self, streams: Streams, buffers: Sequence[Buffer]) -> Answered:
        try:
            return await streams.exchange(buffers, self._timeout_s)
        except (OSError, NotHttp) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: OSError | NotHttp) -> Unavailable:
        reason = f"no answer within {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(error) or repr(error)
        return Unavailable(f"http://{self._named} cannot be used: {reason}")


def _finished(answered: Answered, began_s: float) -> tuple[dict[str, Array], Stages]:
    head, body, sent_s, answered_s = answered
    outputs = v2json.read_answer(head, body)
    return outputs, Stages(sent_s - began_s, answered_s - sent_s, time.perf_counter() - answered_s)


async def _aside(function: Callable[..., T], *arguments: Any) -> T:
    """Run what asks the server by the sync client off the event loop."""
    import asyncio

    return await asyncio.to_thread(function, *arguments)
