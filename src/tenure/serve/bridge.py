"""The data plane for doors that hand in arrays and await their answer, until they speak to `plane.Plane` themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenure import __version__
from tenure.serve.dataplane import DataPlane
from tenure.serve.faults import Overloaded, TooLarge
from tenure.serve.messages import InferAnswer, InferRequest
from tenure.serve.plane import Call, TensorRef, Wanted
from tenure.serve.tensors import Array, ModelMetadata, datatype_of, from_raw, to_raw

SERVER_NAME = "tenure"
EXTENSIONS = ("binary_tensor_data",)


@dataclass(frozen=True, slots=True)
class BridgeLimits:
    """Bounds that doors keep themselves."""

    max_request_bytes: int
    timeout_s: float
    max_queue: int


class Bridge:
    """See the module."""

    def __init__(self, plane: DataPlane) -> None:
        self._plane = plane
        limits = plane.limits
        self.limits = BridgeLimits(limits.max_request_bytes, limits.options.timeout_s, limits.options.max_queue)
        self.held_bytes = 0
        self.version = __version__

    @property
    def ready(self) -> bool:
        """Whether requests are welcome."""
        return self._plane.ready

    def model_ready(self, name: str, version: str = "") -> bool:
        """See Plane."""
        return self._plane.model_ready(name, version)

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """See Plane."""
        return self._plane.metadata(name, version)

    def statistics(self) -> Mapping[tuple[str, str], Any]:
        """See Plane."""
        return self._plane.statistics()

    def hold(self, size_bytes: int) -> None:
        """Account for request bytes in memory; `release` gives them back. Raises TooLarge, Overloaded."""
        if size_bytes > self.limits.max_request_bytes:
            raise TooLarge(f"a request may have {self.limits.max_request_bytes} bytes; this one has {size_bytes} or more")
        if self.held_bytes + size_bytes > self._plane.limits.memory_budget_bytes:
            raise Overloaded(f"requests of {self.held_bytes} bytes are held already; try again")
        self.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back what `hold` took."""
        self.held_bytes -= size_bytes

    async def infer(self, request: InferRequest) -> InferAnswer:
        """Run one request. Raises what `Plane.submit` does or `done` is told."""
        parts = {name: to_raw(array) for name, array in request.inputs.items()}
        buffer = self._plane.reserve(sum(len(part) + 63 & ~63 for part in parts.values()) or 1, "bridge")
        refs, at = [], 0
        for name, array in request.inputs.items():
            part = parts[name]
            buffer.view[at : at + len(part)] = part
            refs.append(TensorRef(name, datatype_of(array), array.shape, at, len(part)))
            at += len(part) + 63 & ~63
        future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        call = Call(
            model=request.model,
            version=request.version,
            inputs=tuple(refs),
            done=_done,
            buffer=buffer,
            outputs=tuple(Wanted(name) for name in self._ordered(request)),
            state=future,
        )
        self._plane.submit(call)
        try:
            outputs = await future
        except asyncio.CancelledError:
            self._plane.cancel(call)
            raise
        assert call.answer is not None
        return InferAnswer(model=call.answer.model, version=call.answer.version, id=request.id, outputs=outputs)

    def _ordered(self, request: InferRequest) -> list[str]:
        """Return the outputs asked for in the model's order, as these doors give them; the plane refuses unknown ones."""
        if not request.outputs:
            return []
        known = [meta.name for meta in self._plane.metadata(request.model, request.version).outputs]
        unknown = [name for name in request.outputs if name not in known]
        return unknown or [name for name in known if name in request.outputs]


def _done(call: Call) -> None:
    if call.state.done():
        return
    if call.error is not None:
        call.state.set_exception(call.error)
    elif call.answer is not None:
        call.state.set_result(
            {o.name: np.array(from_raw(bytes(o.data or b""), o.datatype, o.shape, tensor=o.name)) for o in call.answer.outputs}
        )
