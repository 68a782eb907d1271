"""The one data plane behind both doors: checks a request, queues it within bounds, runs it, counts it.

    http door ┐                          ┌ model a: one thread, at most `max_queue` requests in it
              ├─► DataPlane.infer ──────►┤
    grpc door ┘   checks, bound, timeout └ model b: …

One call at a time runs in an instance; batching across requests is a policy of `decide/`, not of this module.
Doors hand in arrays and get arrays: nothing here knows JSON, protobuf or status codes.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from tenure import __version__
from tenure.errors import TenureError, Unavailable
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge
from tenure.serve.messages import InferAnswer, InferRequest
from tenure.serve.repository import LoadedModel, Repository
from tenure.serve.tensors import Array, ModelMetadata, check_inputs, check_outputs

SERVER_NAME = "tenure"
EXTENSIONS = ("binary_tensor_data",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one server."""

    max_request_bytes: int = 64 << 20
    """Largest body of one request."""
    max_held_bytes: int = 512 << 20
    """Request bodies held at once, all together."""
    max_queue: int = 256
    """Requests waiting or running per model."""
    timeout_s: float = 60.0
    """From acceptance to answer; also how long a body may take to arrive."""


@dataclass(slots=True)
class Statistics:
    """Counters of one model since the server started. Times in seconds."""

    outcomes: dict[str, int] = field(default_factory=dict)
    """Requests by how they ended: ok, refused, overloaded, failed, timed_out."""
    rows: int = 0
    """First dimensions of the first inputs, added up over answered requests."""
    queue_s: float = 0.0
    compute_s: float = 0.0

    def count(self, outcome: str) -> None:
        """Count one request."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class _Lane:
    """One model's thread and queue. The place is given back when the call has really ended, not when its caller left."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.statistics = Statistics()
        self.pending = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"model-{model.name}")

    def submit(self, request: InferRequest) -> Future[dict[str, Array]]:
        return self._thread.submit(self._run, request, time.perf_counter())

    def _run(self, request: InferRequest, accepted_at_s: float) -> dict[str, Array]:
        started_at_s = time.perf_counter()
        found = self.model.engine.infer(request.inputs, request.outputs)
        self.statistics.queue_s += started_at_s - accepted_at_s
        self.statistics.compute_s += time.perf_counter() - started_at_s
        return found

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class DataPlane:
    """Answers requests of all doors. Its coroutines belong to one event loop."""

    def __init__(self, repository: Repository, limits: Limits | None = None) -> None:
        self.repository = repository
        self.limits = limits or Limits()
        self.draining = False
        """Set when the server is about to leave: not ready any more, but what was accepted is answered."""
        self.held_bytes = 0
        self._lanes = {(m.name, m.version): _Lane(m) for m in repository.all()}

    @property
    def ready(self) -> bool:
        """Whether requests are welcome."""
        return not self.draining

    @property
    def version(self) -> str:
        """The server's version."""
        return __version__

    def model_ready(self, name: str, version: str = "") -> bool:
        """Return whether a model can answer. Raises NotFound."""
        self.repository.find(name, version)
        return self.ready

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Return what a model takes and gives. Raises NotFound."""
        return self.repository.metadata(name, version)

    def statistics(self) -> dict[tuple[str, str], Statistics]:
        """Return the counters by model name and version."""
        return {key: lane.statistics for key, lane in self._lanes.items()}

    def hold(self, size_bytes: int) -> None:
        """Account for request bytes in memory; `release` gives them back. Raises TooLarge, Overloaded."""
        if size_bytes > self.limits.max_request_bytes:
            raise TooLarge(f"a request may have {self.limits.max_request_bytes} bytes; this one has {size_bytes} or more")
        if self.held_bytes + size_bytes > self.limits.max_held_bytes:
            raise Overloaded(f"requests of {self.limits.max_held_bytes} bytes are held already; try again")
        self.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back what `hold` took."""
        self.held_bytes -= size_bytes

    async def infer(self, request: InferRequest) -> InferAnswer:
        """Check, queue and run one request.

        Raises NotFound, InputRefused, Overloaded, ModelFailed, and Unavailable after `limits.timeout_s`.
        """
        model = self.repository.find(request.model, request.version)
        lane = self._lanes[(model.name, model.version)]
        try:
            check_inputs(request.inputs, model.engine.inputs)
            check_outputs(request.outputs, model.engine.outputs)
            outputs = await self._run(lane, request)
        except TenureError as error:
            lane.statistics.count(_outcome(error))
            raise
        lane.statistics.count("ok")
        first = next(iter(request.inputs.values()), None)
        lane.statistics.rows += first.shape[0] if first is not None and first.ndim else 1
        return InferAnswer(model=model.name, version=model.version, id=request.id, outputs=outputs)

    async def _run(self, lane: _Lane, request: InferRequest) -> dict[str, Array]:
        if lane.pending >= self.limits.max_queue:
            raise Overloaded(f'model "{lane.model.name}" has {lane.pending} requests waiting, its limit; try again')
        lane.pending += 1
        loop = asyncio.get_running_loop()
        future = lane.submit(request)
        wrapped = asyncio.wrap_future(future)
        future.add_done_callback(lambda _: _tell(loop, lane))
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                return await wrapped
        except TimeoutError as error:
            raise Unavailable(f'model "{lane.model.name}" did not answer within {self.limits.timeout_s:g} s') from error
        except TenureError:
            raise
        except Exception as error:  # an engine that breaks its contract must not take the door down
            raise ModelFailed(f"the model failed: {type(error).__name__}: {error}") from error

    async def drain(self, grace_s: float) -> bool:
        """Refuse readiness and wait until every accepted request has ended; False when the grace ran out first."""
        self.draining = True
        ends_at_s = time.monotonic() + grace_s
        while any(lane.pending for lane in self._lanes.values()) and time.monotonic() < ends_at_s:
            await asyncio.sleep(0.01)
        return not any(lane.pending for lane in self._lanes.values())

    def close(self) -> None:
        """End the threads and free the models."""
        for lane in self._lanes.values():
            lane.close()


def _tell(loop: asyncio.AbstractEventLoop, lane: _Lane) -> None:
    """Give the place back on the loop's thread; a loop that is closed has no use for it."""
    try:
        loop.call_soon_threadsafe(_give_back, lane)
    except RuntimeError:
        pass


def _give_back(lane: _Lane) -> None:
    lane.pending -= 1


def _outcome(error: TenureError) -> str:
    kinds = ((InputRefused, "refused"), (Overloaded, "overloaded"), (Unavailable, "timed_out"))
    return next((name for kind, name in kinds if isinstance(error, kind)), "failed")
