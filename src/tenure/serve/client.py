"""The client: one call for a model in this process, behind HTTP, shared memory or gRPC, sync and async.

    with Model("http://127.0.0.1:8000", "digits") as model:
        labels = model.predict(images)["label"]

Importing it loads neither an engine nor a network library: `Model` loads what its target needs.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tenure.errors import NotFound, SpecError, TenureError, Unavailable
from tenure.serve.faults import InputRefused, Overloaded
from tenure.serve.processes import leased_threads
from tenure.serve.tensors import DTYPES, Array, ModelMetadata
from tenure.serve.transports import Stages, open_transport

if TYPE_CHECKING:
    from tenure.serve.images import Classified
    from tenure.serve.pixels import Preparation

SERVER_VARIABLE = "TENURE_SERVE"
"""Environment variable: the server, such as ``http://127.0.0.1:8000``, where a target that is a mere name is looked for."""

IN_FLIGHT = 16
"""Requests that `predict_many` and `predict_each` have on their way at once."""
_MAX_IN_FLIGHT = 256


class Model:
    """A ready model, wherever it is.

    target: path of a model file (in-process), ``http://host:port`` (shared memory by itself where the server is on this
    machine and it pays), ``shm://host:port`` (shared memory or nothing), ``grpc://host:port``; or the name of a model
    that the server in $TENURE_SERVE has.
    name: which model of a server; may be left out in-process. timeout_s: bound of each request.
    threads: per instance, for a model in this process; 0 takes the lease's CPU share.
    instances: loaded copies in this process, so many calls at once.
    shm: False never uses shared memory, True insists on it. retry: an Overloaded server is asked again, when it says and
    with jitter, until `timeout_s` has passed.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        name: str | None = None,
        *,
        timeout_s: float = 30.0,
        threads: int = 0,
        instances: int = 1,
        shm: bool | None = None,
        retry: bool = False,
    ) -> None:
        if not 0 < timeout_s < 1e6:
            raise SpecError(f"timeout_s must be above 0 and below a million; found {timeout_s!r}")
        self.target, self.name = _located(os.fspath(target), name or "")
        self._by_variable = self.target != os.fspath(target)
        self._transport = open_transport(
            self.target,
            timeout_s=timeout_s,
            threads=threads or leased_threads(os.environ),
            instances=instances,
            shm=shm,
        )
        self._timeout_s, self._retry = timeout_s, retry
        self._asking = threading.Lock()
        self._metadata: ModelMetadata | None = None
        self._types: dict[str, np.dtype[Any] | None] = {}

    def metadata(self) -> ModelMetadata:
        """Return what the model takes and gives; asked once. Raises Unavailable, NotFound."""
        with self._asking:
            if self._metadata is None:
                try:
                    found = self._transport.metadata(self.name)
                except NotFound as error:
                    if not self._by_variable:
                        raise
                    raise NotFound(
                        f'"{self.name}" is no file here, and {self.target} (${SERVER_VARIABLE}) does not serve it: {error}'
                    ) from error
                self._types = {meta.name: DTYPES.get(meta.datatype) for meta in found.inputs}
                self._metadata = found
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
        return self._timed(x, outputs, retry=self._retry)

    async def predict_timed_async(self, x: Any, *, outputs: Sequence[str] = ()) -> tuple[dict[str, Array], Stages]:
        """See predict_timed."""
        if self._metadata is None:  # asked once, off the event loop
            import asyncio  # who awaits has it; a sync client stays 4 MB smaller without

            await asyncio.to_thread(self.metadata)
        inputs = self._inputs(x)
        if not self._retry:
            return await self._transport.infer_async(self.name, inputs, outputs)
        import asyncio

        patience = _Patience(self._timeout_s)
        while True:
            try:
                return await self._transport.infer_async(self.name, inputs, outputs)
            except Overloaded as error:
                await asyncio.sleep(patience.pause_s(error))

    def predict_many(self, xs: Iterable[Any], *, outputs: Sequence[str] = (), in_flight: int = IN_FLIGHT) -> list[Any]:
        """Return the answers of `predict_each`, all together."""
        return list(self.predict_each(xs, outputs=outputs, in_flight=in_flight))

    def predict_each(self, xs: Iterable[Any], *, outputs: Sequence[str] = (), in_flight: int = IN_FLIGHT) -> Iterator[Any]:
        """Yield the answer to each of many requests, in their order and as predict gives it, without an event loop.

        Up to `in_flight` requests (1 to 256) are on their way at once, so that neither side waits for the other; the next
        is taken from `xs` when an answer has been read, and memory stays bounded however many there are. An overloaded
        server is asked again for what it refused, as with ``retry=True``. Raises as predict, in the place of the request
        that failed; those sent after it are given up then.
        """
        if not 1 <= in_flight <= _MAX_IN_FLIGHT:
            raise SpecError(f"in_flight must be 1 to {_MAX_IN_FLIGHT}; found {in_flight!r}")
        return self._each(xs, outputs, in_flight)

    def _each(self, xs: Iterable[Any], outputs: Sequence[str], in_flight: int) -> Iterator[Any]:
        asked: deque[Mapping[str, Array]] = deque()

        def inputs() -> Iterator[Mapping[str, Array]]:
            for x in xs:
                asked.append(self._inputs(x))
                yield asked[-1]

        with contextlib.closing(self._transport.infer_each(self.name, inputs(), outputs, in_flight)) as answers:
            for found in answers:
                again = asked.popleft()
                if isinstance(found, Overloaded):
                    found = self._timed(again, outputs, retry=True)[0]
                elif isinstance(found, TenureError):
                    raise found
                yield _one_or_all(found)

    def classify(
        self,
        files: Iterable[str | os.PathLike[str]],
        *,
        top: int = 5,
        preparation: Preparation | None = None,
        output: str = "",
        batch: int = 0,
        workers: int = 0,
    ) -> Iterator[Classified]:
        """Yield the best `top` classes of each image file, in order; reading, decoding and inference overlap.

        Files that can't be read or decoded come back with their reason and no classes. Memory is bounded however many
        files there are. preparation: how a picture becomes the model's input (`pixels.preparation_for`); None finds it
        out, for a model that takes integers. output: which one holds the scores, where there are several. batch: files
        per request, 0: 8 where the model takes any number. workers: threads that decode; 0: half as many again as usable cores.
        A model in this process answers as many requests at once as it has instances: for files, one of one thread per core.
        Raises SpecError (the model takes no pictures, or something has to be said), and as predict.
        """
        from tenure.serve.images import classify  # pictures bring Pillow along

        return classify(self, files, top=top, preparation=preparation, output=output, batch=batch, workers=workers)

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

    def _timed(self, x: Any, outputs: Sequence[str], *, retry: bool) -> tuple[dict[str, Array], Stages]:
        inputs = self._inputs(x)
        if not retry:
            return self._transport.infer(self.name, inputs, outputs)
        patience = _Patience(self._timeout_s)
        while True:
            try:
                return self._transport.infer(self.name, inputs, outputs)
            except Overloaded as error:
                time.sleep(patience.pause_s(error))

    def _inputs(self, x: Any) -> Mapping[str, Array]:
        if self._metadata is None:
            self.metadata()
        types = self._types
        if not isinstance(x, Mapping):
            if len(types) != 1:
                raise InputRefused(f"the model takes the inputs {', '.join(types)}: hand in a dict of arrays by these names")
            ((name, dtype),) = types.items()
            return {name: _converted(x, dtype)}
        return {name: _converted(array, types.get(name)) for name, array in x.items()}


class _Patience:
    """How long one call goes on asking an overloaded server."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_at_s = time.monotonic() + timeout_s

    def pause_s(self, error: Overloaded) -> float:
        """Return how long to wait: what the server said and up to half as much again, so that clients do not come back
        together. Raises the error where the time is up before.
        """
        pause_s = max(error.retry_after_s, 0.001) * random.uniform(1.0, 1.5)
        if time.monotonic() + pause_s >= self._ends_at_s:
            raise error
        return pause_s


def _located(target: str, name: str) -> tuple[str, str]:
    """Return the target to open and the model's name there. Raises NotFound, saying where was looked; InputRefused."""
    if "://" in target:
        if not name:
            raise InputRefused(f"{target} may serve several models: name the one you mean, as in Model(target, name)")
        return target, name
    if os.path.exists(target):
        return target, name
    server = os.environ.get(SERVER_VARIABLE, "")
    plain = not name and os.sep not in target
    if server and plain:
        if "://" not in server:
            raise SpecError(f"${SERVER_VARIABLE} must be a server such as http://127.0.0.1:8000; found {server!r}")
        return server, target
    hint = f"; no server was asked, as ${SERVER_VARIABLE} is not set (such as http://127.0.0.1:8000)" if plain else ""
    raise NotFound(f'there is no model file "{target}" (looked in {os.getcwd()}){hint}')


def _converted(x: Any, dtype: np.dtype[Any] | None) -> Array:
    array: Array = x if isinstance(x, np.ndarray) else np.asarray(x)
    if dtype is None or array.dtype == dtype or not np.can_cast(array.dtype, dtype, "same_kind"):
        return array  # what does not fit is refused, with the reason, where the model is
    return array.astype(dtype)


def _one_or_all(outputs: dict[str, Array]) -> Any:
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs
