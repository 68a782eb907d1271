"""The gRPC door: Open Inference Protocol v2 by grpc.aio over one data plane.

Not here: ports and signals (`server`), what a message means (`codec_grpc`), running models (`dataplane`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tenure.errors import NotFound, SpecError, TenureError, Unavailable
from tenure.serve import codec_grpc, v2
from tenure.serve.bridge import EXTENSIONS, SERVER_NAME
from tenure.serve.bridge import Bridge as DataPlane
from tenure.serve.faults import InputRefused, Overloaded, TooLarge

_CODES: tuple[tuple[type[TenureError], grpc.StatusCode], ...] = (
    (TooLarge, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SpecError, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.DEADLINE_EXCEEDED),
)
_Handler = Callable[[Any, Any], Awaitable[Any]]


class GrpcDoor:
    """One method per call of the service."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Return what a grpc.aio server needs to offer the service."""
        methods = {}
        for name, (request, response) in v2.METHODS.items():
            if not hasattr(self, f"_{name}"):
                continue
            methods[name] = grpc.unary_unary_rpc_method_handler(
                _guarded(request, getattr(self, f"_{name}")),
                response_serializer=response.SerializeToString,
            )
        return grpc.method_handlers_generic_handler(v2.SERVICE, methods)

    async def _ServerLive(self, message: Any) -> Any:
        return v2.ServerLiveResponse(live=True)

    async def _ServerReady(self, message: Any) -> Any:
        return v2.ServerReadyResponse(ready=self._plane.ready)

    async def _ModelReady(self, message: Any) -> Any:
        return v2.ModelReadyResponse(ready=self._plane.model_ready(message.name, message.version))

    async def _ServerMetadata(self, message: Any) -> Any:
        return v2.ServerMetadataResponse(name=SERVER_NAME, version=self._plane.version, extensions=EXTENSIONS)

    async def _ModelMetadata(self, message: Any) -> Any:
        return codec_grpc.encode_metadata(self._plane.metadata(message.name, message.version))

    async def _ModelInfer(self, message: Any) -> Any:
        size_bytes = message.ByteSize()
        self._plane.hold(size_bytes)
        try:
            return codec_grpc.encode_answer(await self._plane.infer(codec_grpc.decode_request(message)))
        finally:
            self._plane.release(size_bytes)


def make_server(plane: DataPlane) -> grpc.aio.Server:
    """Return a server, not started, that offers the data plane. Its port is exclusive (no SO_REUSEPORT)."""
    limit = plane.limits.max_request_bytes
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limit + (1 << 16)),
            ("grpc.max_send_message_length", -1),
        ],
        maximum_concurrent_rpcs=plane.limits.max_queue * 2,
    )
    server.add_generic_rpc_handlers((GrpcDoor(plane).handlers(),))
    return server


def _guarded(kind: Any, call: Callable[[Any], Awaitable[Any]]) -> _Handler:
    """Wrap a call: parse its request here, so that bytes which are no message are the sender's fault, not "unknown"."""

    async def handler(content: bytes, context: Any) -> Any:
        try:
            try:
                message = kind.FromString(content)
            except DecodeError as error:
                raise InputRefused(f"the request is not a {kind.DESCRIPTOR.name}: {error}") from error
            return await call(message)
        except TenureError as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
            if isinstance(error, Overloaded):
                context.set_trailing_metadata((("retry-after-s", f"{error.retry_after_s:g}"),))
            await context.abort(code, str(error))

    return handler
