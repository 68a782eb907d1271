"""The calls of the v2 gRPC service and of gRPC's health check, but inference: one function per call, message to message.

Not here: framing and flow control (`http2`), inference and its streams (`grpc_connection`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from tenure import __version__
from tenure.errors import NotFound, Unavailable
from tenure.serve import codec_grpc, v2
from tenure.serve.faults import InputRefused
from tenure.serve.grpc_status import UNIMPLEMENTED, StatusError
from tenure.serve.plane import SERVER_NAME, Durations, ModelStatistics, Plane

UNARY, INFER, STREAM = range(3)
NS = 1e9


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the service."""

    kind: int
    """UNARY: `run` answers a whole message. INFER, STREAM: the connection does."""
    name: str
    run: Callable[[bytes], bytes | Awaitable[bytes]] | None = None


class Service:
    """The calls over one data plane, by path."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self.methods: dict[bytes, Method] = {}
        for name, (request, response) in v2.METHODS.items():
            path = f"/{v2.SERVICE}/{name}".encode()
            if name == "ModelInfer":
                self.methods[path] = Method(INFER, name)
            elif name == "ModelStreamInfer":
                self.methods[path] = Method(STREAM, name)
            elif hasattr(self, f"_{name}"):
                self.methods[path] = Method(UNARY, name, _served(request, response, getattr(self, f"_{name}")))
        request, response = v2.HEALTH_METHODS["Check"]
        self.methods[f"/{v2.HEALTH}/Check".encode()] = Method(UNARY, "Check", _served(request, response, self._Check))

    def find(self, path: bytes) -> Method:
        """Return the call with a path. Raises StatusError (UNIMPLEMENTED)."""
        method = self.methods.get(path)
        if method is None:
            raise StatusError(UNIMPLEMENTED, f"there is no call {path[:120].decode('latin-1')} here")
        return method

    def _ServerLive(self, message: Any, answer: Any) -> None:
        answer.live = True

    def _ServerReady(self, message: Any, answer: Any) -> None:
        answer.ready = self._plane.ready

    def _ModelReady(self, message: Any, answer: Any) -> None:
        answer.ready = self._plane.model_ready(message.name, message.version)

    def _ServerMetadata(self, message: Any, answer: Any) -> None:
        answer.name, answer.version = SERVER_NAME, __version__
        answer.extensions.extend(self._plane.extensions)

    def _ModelMetadata(self, message: Any, answer: Any) -> None:
        answer.CopyFrom(codec_grpc.encode_metadata(self._plane.metadata(message.name, message.version)))

    def _ModelConfig(self, message: Any, answer: Any) -> None:
        json_format.ParseDict(
            dict(self._plane.config(message.name, message.version)), answer.config, ignore_unknown_fields=True
        )

    def _ModelStatistics(self, message: Any, answer: Any) -> None:
        for (name, version), found in self._plane.statistics(message.name, message.version).items():
            _fill_statistics(answer.model_stats.add(name=name, version=version), found)

    def _RepositoryIndex(self, message: Any, answer: Any) -> None:
        for entry in self._plane.index(ready_only=message.ready):
            answer.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)

    async def _RepositoryModelLoad(self, message: Any, answer: Any) -> None:
        if message.parameters:
            found = ", ".join(sorted(message.parameters))[:200]
            raise InputRefused(f"load takes no parameters here; found {found}. Change the repository's files")
        await self._plane.load(message.model_name)

    async def _RepositoryModelUnload(self, message: Any, answer: Any) -> None:
        await self._plane.unload(message.model_name)

    def _SystemSharedMemoryStatus(self, message: Any, answer: Any) -> None:
        for region in self._plane.regions(message.name):
            found = answer.regions[region.name]
            found.name, found.key = region.name, region.key
            found.offset, found.byte_size = region.offset, region.nbytes

    def _SystemSharedMemoryRegister(self, message: Any, answer: Any) -> None:
        self._plane.register_region(message.name, message.key, message.offset, message.byte_size)

    def _SystemSharedMemoryUnregister(self, message: Any, answer: Any) -> None:
        self._plane.unregister_region(message.name)

    def _CudaSharedMemoryStatus(self, message: Any, answer: Any) -> None:
        if message.name:
            raise NotFound(f'there is no CUDA shared-memory region "{message.name[:80]}"; none can be registered here')

    def _CudaSharedMemoryRegister(self, message: Any, answer: Any) -> None:
        raise StatusError(
            UNIMPLEMENTED, "CUDA shared memory cannot be registered: this server has no GPU memory. Use system shared memory"
        )

    def _CudaSharedMemoryUnregister(self, message: Any, answer: Any) -> None:
        """Forget nothing: nothing can be registered, and unknown names are no error."""

    def _Check(self, message: Any, answer: Any) -> None:
        kinds = v2.HealthCheckResponse
        ready = self._plane.ready
        if message.service not in ("", v2.SERVICE, v2.HEALTH):
            try:
                ready = self._plane.model_ready(message.service)
            except Unavailable:
                ready = False
        answer.status = kinds.SERVING if ready else kinds.NOT_SERVING


def _served(request: Any, response: Any, call: Callable[[Any, Any], Awaitable[None] | None]) -> Any:
    """Wrap a call: bytes that are no message are the sender's fault."""

    def run(content: bytes) -> bytes | Awaitable[bytes]:
        try:
            message = request.FromString(content)
        except DecodeError as error:
            raise InputRefused(f"the request is not a {request.DESCRIPTOR.name}: {error}") from error
        answer = response()
        waiting = call(message, answer)
        if waiting is None:
            content = answer.SerializeToString()
            return content

        async def later() -> bytes:
            await waiting
            return bytes(answer.SerializeToString())

        return later()

    return run


def _fill_statistics(place: Any, found: ModelStatistics) -> None:
    place.last_inference = int(found.last_inference_at_s * 1000)  # the extension: milliseconds since the epoch
    place.inference_count = found.inference_count
    place.execution_count = found.execution_count
    for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
        _fill(getattr(place.inference_stats, name), getattr(found, name))
    for rows in sorted(found.batches):
        batch = place.batch_stats.add(batch_size=rows)
        for name, durations in zip(("compute_input", "compute_infer", "compute_output"), found.batches[rows], strict=True):
            _fill(getattr(batch, name), durations)


def _fill(place: Any, durations: Durations) -> None:
    place.count, place.ns = durations.count, int(durations.total_s * NS)
