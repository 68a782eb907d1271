"""The one data plane behind all doors: memory for requests, models, queues, counters. Implements `plane.Plane`.

It runs on one event loop and does no work on tensors itself: models run in processes of their own (`served`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tenure.decide.retries import Retries
from tenure.decide.threads import choose_threads
from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve.arena import Arena
from tenure.serve.faults import InputRefused, Overloaded
from tenure.serve.instances import LOADER, InstanceSpec
from tenure.serve.lane import Lane
from tenure.serve.modelconfig import model_config
from tenure.serve.plane import EXTENSIONS, SHARED_MEMORY, Buffer, Call, IndexEntry, ModelOptions, ModelStatistics, RegionStatus
from tenure.serve.regions import Regions
from tenure.serve.repository import ModelFiles, version_order
from tenure.serve.served import Served, Shared
from tenure.serve.tensors import ModelMetadata

DEFAULT_BUDGET_BYTES = 256 << 20
_TRIM_S = 10.0
"""How often memory that only a burst of requests needed is given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one server."""

    max_request_bytes: int = 64 << 20
    memory_budget_bytes: int = DEFAULT_BUDGET_BYTES
    """Request bodies held at once, all together."""
    max_answer_bytes: int = 64 << 20
    """Outputs of one call, and of one batch."""
    shared_memory: bool = True
    """Whether clients may name shared-memory objects of this machine: the server opens them with its own rights."""
    options: ModelOptions = field(default_factory=ModelOptions)
    """Of models that name none of their own."""
    threads: int = 1
    """Of all instances of a model together, where its options name none."""


class DataPlane:
    """See Plane. `open` before anything else, `close` at the end."""

    def __init__(self, files: ModelFiles, limits: Limits | None = None, *, loader: str = LOADER) -> None:
        """loader: ``module:function`` that loads an engine in an instance."""
        self.files = files
        self.limits = limits or Limits()
        self.draining = False
        self._closed = False
        self._loader = loader
        self._arena = Arena(self.limits.memory_budget_bytes, max_request_bytes=self.limits.max_request_bytes)
        self._regions = Regions()
        self._shared = Shared(self._arena, self._regions, self._arena.release)
        self._models: dict[str, dict[str, Served]] = {}
        """name → version → what answers; versions in order, the default one last."""
        self._routes: dict[tuple[str, str], Served] = {}
        self._changing: dict[str, asyncio.Lock] = {}
        self._states: dict[str, tuple[str, str]] = {}
        """Of models that are not served: state and reason."""
        self._retries = Retries()
        """Of those refused for want of memory."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._old: list[Served] = []
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Load every model. Raises NotFound, SpecError, MissingExtra, Unavailable; nothing runs then."""
        try:
            await _together([self.load(name) for name in sorted(self.files.scan())])
        except BaseException:
            await self.close()
            raise
        self._tick()

    def _tick(self) -> None:
        self._arena.trim()
        self._timer = asyncio.get_running_loop().call_later(_TRIM_S, self._tick)

    # ---- memory

    @property
    def extensions(self) -> Sequence[str]:
        """See Plane."""
        return (*EXTENSIONS, SHARED_MEMORY) if self.limits.shared_memory else EXTENSIONS

    @property
    def held_bytes(self) -> int:
        """Memory held by requests now."""
        return self._arena.held_bytes

    @property
    def memory(self) -> Arena:
        """The memory for requests: its size, what is held by which door, the peak."""
        return self._arena

    def reserve(self, nbytes: int, door: str) -> Buffer:
        """See Plane."""
        try:
            return self._arena.reserve(nbytes, door)
        except Overloaded as error:
            pace_s = max((served.lane.pace_s() for served in self._routes.values()), default=(1.0, 0.0))
            error.retry_after_s = self._retries.after_s(time.monotonic(), *pace_s)
            raise

    def release(self, buffer: Buffer) -> None:
        """See Plane."""
        self._arena.release(buffer)

    # ---- calls

    def submit(self, call: Call) -> None:
        """See Plane."""
        served: Served | None = None
        try:
            if self.draining:
                raise Unavailable("the server is about to leave; try another")
            served = self._routes.get((call.model, call.version)) or self._find(call.model, call.version)
            served.lane.submit(call, served.signature.form(call))
        except TenureError as error:
            if call.buffer is not None:
                self._arena.release(call.buffer)
            if served is not None:
                served.lane.refused(error)
            raise

    def cancel(self, call: Call) -> None:
        """See Plane."""
        ticket = call.ticket
        if ticket is not None:
            ticket.lane.cancel(ticket)

    # ---- what there is

    @property
    def ready(self) -> bool:
        """See Plane."""
        return not self.draining and all(served.ready for served in self._routes.values())

    def model_ready(self, name: str, version: str = "") -> bool:
        """See Plane."""
        served = self._routes.get((name, version))
        if served is None:
            try:
                self._find(name, version)
            except Unavailable:
                return False
        return served is not None and served.ready and not self.draining

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        """See Plane."""
        found = self._find(name, version).lane.metadata
        return ModelMetadata(
            name=name,
            versions=tuple(self._models[name]),
            platform=found.platform,
            inputs=found.inputs,
            outputs=found.outputs,
        )

    def config(self, name: str, version: str = "") -> Mapping[str, Any]:
        """See Plane."""
        served = self._find(name, version)
        return model_config(served.lane.metadata, served.options, batchable=served.batchable and not served.lane.mixed_up)

    def statistics(self, name: str = "", version: str = "") -> Mapping[tuple[str, str], ModelStatistics]:
        """See Plane."""
        if name:
            served = self._find(name, version)
            if version:
                return {(name, version): served.lane.statistics}
        return {
            (model, each): served.lane.statistics
            for model, versions in self._models.items()
            for each, served in versions.items()
            if name in ("", model)
        }

    def index(self, *, ready_only: bool = False) -> Sequence[IndexEntry]:
        """See Plane."""
        entries = []
        for name, versions in {**{name: list(found) for name, found in self.files.scan().items()}, **self._models}.items():
            state, reason = self._states.get(name, ("UNAVAILABLE", "not loaded"))
            for version in versions:
                served = self._routes.get((name, version))
                if served is None:
                    entries.append(IndexEntry(name, version, state, reason))
                elif served.ready:
                    entries.append(IndexEntry(name, version, "READY"))
                else:
                    entries.append(IndexEntry(name, version, "UNAVAILABLE", served.reason))
        entries.sort(key=lambda entry: (entry.name, version_order(entry.version)))
        return [entry for entry in entries if entry.state == "READY"] if ready_only else entries

    def _find(self, name: str, version: str) -> Served:
        served = self._routes.get((name, version))
        if served is not None:
            return served
        versions = self._models.get(name)
        if versions is not None:
            raise NotFound(f'model "{name}" has no version "{version[:80]}"; there are: {", ".join(versions)}')
        if name in self._states:
            state, reason = self._states[name]
            raise Unavailable(f'model "{name}" is not served: {state.lower()}{", " + reason if reason else ""}')
        raise NotFound(f'there is no model "{name[:80]}"; served here: {", ".join(self._models)}')

    # ---- loading

    async def load(self, name: str) -> None:
        """See Plane."""
        async with self._changing.setdefault(name, asyncio.Lock()):
            versions = self.files.scan().get(name)
            if versions is None:
                self._changing.pop(name, None)
                raise NotFound(f'the repository holds no model "{name[:80]}"')
            fresh = {version: self._made(name, version) for version in versions}
            self._states[name] = ("LOADING", "")
            try:
                await _open(list(fresh.values()))
            except BaseException as error:
                self._states[name] = ("UNAVAILABLE", str(error)[:400] or "its loading was called off")
                raise
            self._states[name] = ("READY", "")
            self._swap(name, fresh)

    async def unload(self, name: str) -> None:
        """See Plane."""
        if name not in self._models and name not in self._states:
            raise NotFound(f'there is no model "{name[:80]}"; served here: {", ".join(self._models)}')
        async with self._changing.setdefault(name, asyncio.Lock()):
            self._states[name] = ("UNAVAILABLE", "unloaded")
            gone = list(self._models.get(name, {}).values())
            self._swap(name, {}, leave=False)
            self._old += gone
            await asyncio.gather(*(self._leave(served) for served in gone))

    def _made(self, name: str, version: str) -> Served:
        model = self.files.find(name, version)
        options = self.files.options(name, self.limits.options)
        chosen = choose_threads(
            self.limits.threads,
            kind=model.suffix,
            model_bytes=model.stat().st_size,
            device=options.device,
            instances=options.instances,
            threads=options.threads,
        )
        options = dataclasses.replace(options, instances=chosen.instances, threads=chosen.threads)
        spec = InstanceSpec(
            path=model,
            threads=chosen.threads,
            device=options.device,
            precision=options.precision,
            max_batch_rows=options.max_batch_rows,
            max_answer_bytes=self.limits.max_answer_bytes,
            loader=self._loader,
        )
        return Served(name, version, spec, options, self._shared)

    def _swap(self, name: str, fresh: dict[str, Served], *, leave: bool = True) -> None:
        """From here on requests go to what is fresh; what was served before answers what it has accepted."""
        old = self._models.pop(name, {})
        for key in [key for key in self._routes if key[0] == name]:
            del self._routes[key]
        if fresh:
            self._models[name] = fresh
            self._routes.update({(name, version): served for version, served in fresh.items()})
            self._routes[(name, "")] = next(reversed(fresh.values()))
        if leave:
            for served in old.values():
                self._old.append(served)
                task = asyncio.get_running_loop().create_task(self._leave(served))
                self._leaving.add(task)
                task.add_done_callback(self._leaving.discard)

    async def _leave(self, served: Served) -> None:
        await served.close()
        self._old.remove(served)

    # ---- shared memory

    def register_region(self, name: str, key: str, offset: int, nbytes: int) -> None:
        """See Plane."""
        if not self.limits.shared_memory:
            raise InputRefused(
                "this server takes no shared memory: send tensors with the request (--shared-memory on allows it)"
            )
        region = self._regions.register(name, key, offset, nbytes)
        for instance in self._instances():
            instance.map_region(region)

    def unregister_region(self, name: str = "") -> None:
        """See Plane."""
        for region in self._regions.unregister(name):
            for instance in self._instances():
                instance.drop_region(region)

    def regions(self, name: str = "") -> Sequence[RegionStatus]:
        """See Plane."""
        return self._regions.status(name)

    def _instances(self) -> list[Any]:
        every = [*(served for versions in self._models.values() for served in versions.values()), *self._old]
        return [instance for served in every for instance in served.each_instance()]

    # ---- the end

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests and wait until every accepted one has ended; False when the grace ran out first."""
        self.draining = True
        lanes: list[Lane] = [served.lane for served in {*self._routes.values(), *self._old}]
        try:
            async with asyncio.timeout(grace_s):
                for lane in lanes:
                    await lane.drained()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """End every process at once, and free the memory. Further calls do nothing."""
        if self._closed:
            return
        self._closed = self.draining = True
        if self._timer is not None:
            self._timer.cancel()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*(served.kill() for served in {*self._routes.values(), *self._old}))
        self._regions.unregister()
        self._arena.close()


async def _open(fresh: Sequence[Served]) -> None:
    """Open all versions of a model, or none."""
    try:
        await _together([served.open() for served in fresh])
    except BaseException:
        await asyncio.gather(*(served.kill() for served in fresh))
        raise


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait for all; at the first error cancel the others, wait for them too, and raise that error by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
