"""The client's way over gRPC: raw contents; a blocking channel when sync, a grpc.aio channel when async.

The request's bytes are put together here, by the rule that messages written one after the other merge: all fields but
the tensors are serialized once per shapes, the tensors follow as `raw_input_contents`, each copied once. (Through message
objects each would be copied three times before gRPC copies it itself.)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc

from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve import codec_grpc, v2
from tenure.serve.codec_infer import encode_varint
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge
from tenure.serve.tensors import Array, ModelMetadata, datatype_of, to_raw
from tenure.serve.transports import Stages

_OPTIONS = [
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.http2.write_buffer_size", 4 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]
"""Large windows and frames for tensors; a channel's connection is its own, so that two clients do not share one."""
MAX_CHANNELS = 4
CHANNEL_BYTES = 2 << 20
"""Of requests in flight on the channel with the fewest, past which one more is opened to a server that is far."""
FAR_S = 0.010
"""A server is far while no call has come back sooner. A connection has at most its send buffer under way (Linux: 4 MiB,
bookkeeping of packets included): 2.3 Gbit/s over a round trip of 10 ms, 0.57 Gbit/s over one of 40 ms."""
_RAW = (7 << 3 | 2).to_bytes(1, "little")
"""Tag of ModelInferRequest.raw_input_contents."""
_RETRY_KEYS = ("grpc-retry-pushback-ms", "retry-after-ms", "retry-after-s", "retry-after")
_KEPT_PREFIXES = 256
_SAYS_TOO_LARGE = re.compile(r"larger than|\bbytes\b")
"""RESOURCE_EXHAUSTED also means a message that is too large, ours and gRPC's own; no hint to try again comes with it."""


def open_transport(host: str, port: int, timeout_s: float) -> GrpcTransport:
    """Return a transport; connects on first use."""
    return GrpcTransport(f"{host}:{port}", timeout_s)


class GrpcTransport:
    """See Transport."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._sync = Channels(grpc.insecure_channel, address)
        self._prefixes: dict[Any, bytes] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._async: Channels | None = None

    def metadata(self, name: str) -> ModelMetadata:
        """See Transport."""
        try:
            with self._sync.lane(b"") as lane:
                found = _call(lane.channel, "ModelMetadata")(v2.ModelMetadataRequest(name=name), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return codec_grpc.decode_metadata(found)

    def ready(self) -> bool:
        """See Transport."""
        try:
            with self._sync.lane(b"") as lane:
                found = _call(lane.channel, "ServerReady")(v2.ServerReadyRequest(), timeout=min(2.0, self._timeout_s))
        except grpc.RpcError:
            return False
        return bool(found.ready)

    def infer(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        message = self._request(name, inputs, outputs)
        sent_s = time.perf_counter()
        try:
            with self._sync.lane(message) as lane:
                found = lane.infer(message, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        except ValueError as error:  # what grpc raises for a channel that is closed
            raise Unavailable(f"grpc://{self._address} cannot be used: {error}") from error
        return _answered(found, began_s, sent_s)

    def infer_each(
        self, name: str, many: Iterable[Mapping[str, Array]], outputs: Sequence[str], in_flight: int
    ) -> Generator[dict[str, Array] | TenureError, None, None]:
        """See Transport."""
        waiting: deque[tuple[Any, contextlib.ExitStack]] = deque()
        try:
            for inputs in many:
                if len(waiting) >= in_flight:
                    yield self._ended(*waiting.popleft())
                waiting.append(self._begun(name, inputs, outputs))
            while waiting:
                yield self._ended(*waiting.popleft())
        finally:
            for call, lane in waiting:
                lane.close()
                if not isinstance(call, TenureError):
                    call.cancel()

    def _begun(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[Any, contextlib.ExitStack]:
        """Return a call that was sent, or why it could not be; and what gives its place on a channel back."""
        place = contextlib.ExitStack()
        try:
            message = self._request(name, inputs, outputs)
            return place.enter_context(self._sync.lane(message)).infer.future(message, timeout=self._timeout_s), place
        except InputRefused as error:
            return error, place
        except ValueError as error:  # what grpc raises for a channel that is closed
            place.close()
            return Unavailable(f"grpc://{self._address} cannot be used: {error}"), place

    def _ended(self, call: Any, place: contextlib.ExitStack) -> dict[str, Array] | TenureError:
        if isinstance(call, TenureError):
            return call
        try:
            with place:
                return _outputs(call.result())
        except grpc.RpcError as error:
            return self._translated(error)
        except ModelFailed as error:
            return error

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        loop = asyncio.get_running_loop()
        if self._async is None or self._loop is not loop:
            self._loop, self._async = loop, Channels(grpc.aio.insecure_channel, self._address, quickest_s=self._sync.quickest_s)
        message = self._request(name, inputs, outputs)
        sent_s = time.perf_counter()
        try:
            with self._async.lane(message) as lane:
                found = await lane.infer(message, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return _answered(found, began_s, sent_s)

    def close(self) -> None:
        """See Transport."""
        for lane in self._sync.lanes:
            lane.channel.close()
        if self._async is not None and self._loop is not None and not self._loop.is_closed():
            if self._loop.is_running():
                self._closing = self._loop.create_task(_close_all(self._async))
            else:
                self._loop.run_until_complete(_close_all(self._async))
        self._async = self._loop = None

    async def close_async(self) -> None:
        """See Transport."""
        channels, self._async = self._async, None
        if channels is not None:
            await _close_all(channels)
        self.close()

    def _request(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> bytes:
        """Return a serialized ModelInferRequest. Raises InputRefused for types the protocol has no name for."""
        key = (name, tuple([(each, array.dtype, array.shape) for each, array in inputs.items()]), tuple(outputs))
        prefix = self._prefixes.get(key)
        if prefix is None:
            message = v2.ModelInferRequest(model_name=name)
            for each, array in inputs.items():
                message.inputs.add(name=each, datatype=datatype_of(array), shape=array.shape)
            for wanted in outputs:
                message.outputs.add(name=wanted)
            prefix = message.SerializeToString()
            if len(self._prefixes) >= _KEPT_PREFIXES:
                self._prefixes.clear()
            self._prefixes[key] = prefix
        parts: list[bytes | memoryview] = [prefix]
        for array in inputs.values():
            raw = to_raw(array)
            parts += (_RAW, encode_varint(len(raw)), raw)
        return b"".join(parts)

    def _translated(self, error: Any) -> TenureError:
        code, reason = error.code(), str(error.details())
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            after_s = _retry_after_s(error.trailing_metadata() or ())
            if after_s is None and _SAYS_TOO_LARGE.search(reason):
                return TooLarge(reason)
            return Overloaded(reason, retry_after_s=1.0 if after_s is None else after_s)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return Unavailable(f"grpc://{self._address} cannot be used: {reason}")
        kinds: dict[Any, type[TenureError]] = {
            grpc.StatusCode.INVALID_ARGUMENT: InputRefused,
            grpc.StatusCode.NOT_FOUND: NotFound,
        }
        return kinds.get(code, ModelFailed)(reason)


class Lane:
    """One channel, which is one connection."""

    def __init__(self, channel: Any) -> None:
        self.channel, self.infer = channel, _infer_call(channel)
        self.in_flight_bytes = 0


class Channels:
    """Channels of one kind to one server: one, and more where large requests are in flight together to a server that is far."""

    def __init__(
        self,
        make: Callable[..., Any],
        address: str,
        *,
        quickest_s: float = math.inf,
        now_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._make, self._address, self._now_s = make, address, now_s
        self._lock = threading.Lock()
        self.quickest_s = quickest_s
        """What the quickest call took, which no round trip is above."""
        self.lanes = [self._opened()]

    @contextlib.contextmanager
    def lane(self, message: bytes) -> Iterator[Lane]:
        """Give the channel with the fewest bytes in flight for as long as the call with this message takes."""
        began_s = self._now_s()
        with self._lock:
            lane = min(self.lanes, key=_in_flight_bytes) if len(self.lanes) > 1 else self.lanes[0]
            if lane.in_flight_bytes > CHANNEL_BYTES and len(self.lanes) < MAX_CHANNELS and self.quickest_s > FAR_S:
                lane = self._opened()
                self.lanes.append(lane)
            lane.in_flight_bytes += len(message)
        try:
            yield lane
            self.quickest_s = min(self.quickest_s, self._now_s() - began_s)
        finally:
            with self._lock:
                lane.in_flight_bytes -= len(message)

    def _opened(self) -> Lane:
        return Lane(self._make(self._address, options=_OPTIONS))


def _in_flight_bytes(lane: Lane) -> int:
    return lane.in_flight_bytes


async def _close_all(channels: Channels) -> None:
    for lane in channels.lanes:
        await lane.channel.close()


def _call(channel: Any, name: str) -> Any:
    request, response = v2.METHODS[name]
    return channel.unary_unary(
        f"/{v2.SERVICE}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )


def _infer_call(channel: Any) -> Any:
    """Return ModelInfer of a channel, taking serialized requests."""
    response = v2.METHODS["ModelInfer"][1]
    return channel.unary_unary(f"/{v2.SERVICE}/ModelInfer", response_deserializer=response.FromString)


def _retry_after_s(metadata: Any) -> float | None:
    """Return when the server says to try again, seconds; None where it does not."""
    told = {key: value for key, value in metadata if key in _RETRY_KEYS}
    for key in _RETRY_KEYS:
        try:
            value = float(told[key])
        except (KeyError, ValueError):
            continue
        if 0 <= value < 1e9:
            return value / 1000 if key.endswith("-ms") else value
    return None


def _answered(found: Any, began_s: float, sent_s: float) -> tuple[dict[str, Array], Stages]:
    answered_s = time.perf_counter()
    outputs = _outputs(found)
    return outputs, Stages(sent_s - began_s, answered_s - sent_s, time.perf_counter() - answered_s)


def _outputs(message: Any) -> dict[str, Array]:
    try:
        return codec_grpc.decode_outputs(message)
    except (InputRefused, ValueError) as error:  # of the answer, so nothing that the caller could mend
        raise ModelFailed(f"the answer cannot be read: {error}") from error
