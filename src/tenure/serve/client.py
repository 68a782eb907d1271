"""The client: one call for a model in this process, behind HTTP or behind gRPC, sync and async.

    with Model("http://127.0.0.1:8000", "digits") as model:
        labels = model.predict(images)["label"]

Importing it loads neither an engine nor a network library: `Model` loads what its target needs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from tenure.errors import Unavailable
from tenure.serve.faults import InputRefused
from tenure.serve.processes import leased_threads
from tenure.serve.tensors import DTYPES, Array, ModelMetadata
from tenure.serve.transports import Stages, open_transport


class Model:
    """A ready model, wherever it is.

    target: path of a model file (in-process), ``http://host:port`` or ``grpc://host:port``.
    name: which model of a server; may be left out in-process. timeout_s: bound of each request.
    threads: for a model in this process; 0 takes the lease's CPU share.
    """

    def __init__(self, target: str, name: str | None = None, *, timeout_s: float = 30.0, threads: int = 0) -> None:
        target = os.fspath(target)
        self.target = target
        self.name = name or ""
        if "://" in target and not self.name:
            raise InputRefused(f"{target} may serve several models: name the one you mean, as in Model(target, name)")
        self._transport = open_transport(target, timeout_s=timeout_s, threads=threads or leased_threads(os.environ))
        self._metadata: ModelMetadata | None = None

    def metadata(self) -> ModelMetadata:
        """Return what the model takes and gives; asked once. Raises Unavailable, NotFound."""
        if self._metadata is None:
            self._metadata = self._transport.metadata(self.name)
        return self._metadata

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Block until requests are welcome. Raises Unavailable after `timeout_s`."""
        ends_at_s = time.monotonic() + timeout_s
        while not self._transport.ready():
            if time.monotonic() > ends_at_s:
                raise Unavailable(f"{self.target} was not ready within {timeout_s:g} s")
            time.sleep(0.02)

    def predict(self, x: Any, *, outputs: Sequence[str] = ()) -> Any:
        """Return the model's answer: an array when it has one output, else a dict of arrays by name.

        x: one array for a model with one input, or a dict of arrays by input name. Arrays are converted to the model's
        type where that loses no kind (float64 to float32, not float to int).
        Raises InputRefused, TooLarge, Overloaded, ModelFailed, NotFound, Unavailable.
        """
        return _one_or_all(self.predict_timed(x, outputs=outputs)[0])

    async def predict_async(self, x: Any, *, outputs: Sequence[str] = ()) -> Any:
        """See predict."""
        return _one_or_all((await self.predict_timed_async(x, outputs=outputs))[0])

    def predict_timed(self, x: Any, *, outputs: Sequence[str] = ()) -> tuple[dict[str, Array], Stages]:
        """Return all outputs by name, and where the time went. Raises as predict."""
        return self._transport.infer(self.name, self._inputs(x), outputs)

    async def predict_timed_async(self, x: Any, *, outputs: Sequence[str] = ()) -> tuple[dict[str, Array], Stages]:
        """See predict_timed."""
        if self._metadata is None:  # asked once, off the event loop
            import asyncio  # who awaits has it; a sync client stays 4 MB smaller without

            await asyncio.to_thread(self.metadata)
        return await self._transport.infer_async(self.name, self._inputs(x), outputs)

    def close(self) -> None:
        """Close connections, or free the model."""
        self._transport.close()

    async def close_async(self) -> None:
        """See close; for a client whose async calls were used."""
        await self._transport.close_async()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close_async()

    def _inputs(self, x: Any) -> dict[str, Array]:
        expected = self.metadata().inputs
        if not isinstance(x, Mapping):
            if len(expected) != 1:
                names = ", ".join(meta.name for meta in expected)
                raise InputRefused(f"the model takes the inputs {names}: hand in a dict of arrays by these names")
            x = {expected[0].name: x}
        types = {meta.name: DTYPES.get(meta.datatype) for meta in expected}
        return {name: _converted(np.asarray(array), types.get(name)) for name, array in x.items()}


def _converted(array: Array, dtype: np.dtype[Any] | None) -> Array:
    if dtype is None or array.dtype == dtype or not np.can_cast(array.dtype, dtype, "same_kind"):
        return array  # what does not fit is refused, with the reason, where the model is
    return array.astype(dtype)


def _one_or_all(outputs: dict[str, Array]) -> Any:
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs
