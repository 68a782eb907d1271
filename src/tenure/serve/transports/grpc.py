"""The client's way over gRPC: raw contents; a blocking channel when sync, a grpc.aio channel when async."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve import codec_grpc, v2
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded
from tenure.serve.messages import InferRequest
from tenure.serve.tensors import Array, ModelMetadata
from tenure.serve.transports import Stages

_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def open_transport(host: str, port: int, timeout_s: float) -> GrpcTransport:
    """Return a transport; connects on first use."""
    return GrpcTransport(f"{host}:{port}", timeout_s)


class GrpcTransport:
    """See Transport."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._infer = _call(self._channel, "ModelInfer")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._async_channel: Any = None
        self._async_infer: Any = None

    def metadata(self, name: str) -> ModelMetadata:
        """See Transport."""
        try:
            found = _call(self._channel, "ModelMetadata")(v2.ModelMetadataRequest(name=name), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return codec_grpc.decode_metadata(found)

    def ready(self) -> bool:
        """See Transport."""
        try:
            found = _call(self._channel, "ServerReady")(v2.ServerReadyRequest(), timeout=min(2.0, self._timeout_s))
        except grpc.RpcError:
            return False
        return bool(found.ready)

    def infer(self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        message = codec_grpc.encode_request(InferRequest(model=name, inputs=inputs, outputs=outputs))
        sent_s = time.perf_counter()
        try:
            found = self._infer(message, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return _answered(found, began_s, sent_s)

    async def infer_async(
        self, name: str, inputs: Mapping[str, Array], outputs: Sequence[str]
    ) -> tuple[dict[str, Array], Stages]:
        """See Transport."""
        began_s = time.perf_counter()
        message = codec_grpc.encode_request(InferRequest(model=name, inputs=inputs, outputs=outputs))
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._async_channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
            self._async_infer = _call(self._async_channel, "ModelInfer")
        sent_s = time.perf_counter()
        try:
            found = await self._async_infer(message, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._translated(error) from error
        return _answered(found, began_s, sent_s)

    def close(self) -> None:
        """See Transport."""
        self._channel.close()
        if self._async_channel is not None and self._loop is not None and not self._loop.is_closed():
            if self._loop.is_running():
                self._closing = self._loop.create_task(self._async_channel.close())
            else:
                self._loop.run_until_complete(self._async_channel.close())
        self._async_channel = self._loop = None

    async def close_async(self) -> None:
        """See Transport."""
        channel, self._async_channel = self._async_channel, None
        if channel is not None:
            await channel.close()
        self.close()

    def _translated(self, error: Any) -> TenureError:
        code, reason = error.code(), str(error.details())
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(reason)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return Unavailable(f"grpc://{self._address} cannot be used: {reason}")
        kinds: dict[Any, type[TenureError]] = {
            grpc.StatusCode.INVALID_ARGUMENT: InputRefused,
            grpc.StatusCode.NOT_FOUND: NotFound,
        }
        return kinds.get(code, ModelFailed)(reason)


def _call(channel: Any, name: str) -> Any:
    request, response = v2.METHODS[name]
    return channel.unary_unary(
        f"/{v2.SERVICE}/{name}", request_serializer=request.SerializeToString, response_deserializer=response.FromString
    )


def _answered(found: Any, began_s: float, sent_s: float) -> tuple[dict[str, Array], Stages]:
    answered_s = time.perf_counter()
    outputs = dict(codec_grpc.decode_answer(found).outputs)
    return outputs, Stages(sent_s - began_s, answered_s - sent_s, time.perf_counter() - answered_s)
