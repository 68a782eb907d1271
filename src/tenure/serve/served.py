"""One loaded version of one model: its lane, and the processes that work for it, started again when they die.

A process that dies is replaced after 0.1 s, one that dies again without having answered anything after twice as long as
before, up to 10 s. Other models never wait for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from tenure.errors import SpecError, TenureError, Unavailable
from tenure.serve import batchwire as wire
from tenure.serve.arena import Arena
from tenure.serve.instances import Instance, InstanceSpec
from tenure.serve.lane import Lane
from tenure.serve.plane import ModelOptions
from tenure.serve.regions import Regions
from tenure.serve.signature import Signature, chosen_rows
from tenure.serve.tensors import DTYPES, ModelMetadata, TensorMetadata

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 10.0
LOAD_TIMEOUT_S = 300.0
_PATIENT_FAILURES = 2
"""Deaths in a row after which new requests are refused until the model lives again."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What all models of a plane share."""

    arena: Arena
    regions: Regions
    release: Callable[..., None]


class Served:
    """See the module. `open` first; `close` at the end."""

    def __init__(self, name: str, version: str, spec: InstanceSpec, options: ModelOptions, shared: Shared) -> None:
        """spec: its `warmup_rows` is chosen here. options: zeros are chosen here."""
        self.name = name
        self.version = version
        self.options = options
        self.batchable = False
        """Whether its rows do not depend on each other, so that calls could be run as one."""
        self.lane: Lane
        self.signature: Signature
        self._spec = spec
        self._shared = shared
        self._instances: list[Instance] = []
        self._failures = 0
        """Deaths since the last batch that was answered."""
        self._leaving = False
        self._closed = False
        self._restarts: set[asyncio.Task[None]] = set()
        self.reason = ""
        """Why no instance lives."""

    @property
    def ready(self) -> bool:
        """Whether an instance lives."""
        return bool(self.lane.instances)

    async def open(self) -> None:
        """Start the instances and wait until they are ready; after an error there are none.

        Raises SpecError, MissingExtra, NotFound, Unavailable.
        """
        rows = 0 if not self.options.warmup else self.options.max_batch_rows or -1
        self._spec = dataclasses.replace(self._spec, warmup_rows=rows)
        try:
            instances = [self._start() for _ in range(self.options.instances or 1)]
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                loaded = [await asyncio.shield(instance.loaded) for instance in instances]
        except TimeoutError as error:
            await self.kill()
            raise Unavailable(f'model "{self.name}" did not load within {LOAD_TIMEOUT_S:g} s') from error
        except BaseException:
            await self.kill()
            raise
        metadata = _metadata(self.name, loaded[0])
        asked = self.options.max_batch_rows > 1  # whoever asks for batches gets them, whether or not it was seen to pay
        self.options = _chosen(self.options, metadata)
        self.batchable = self.options.max_batch_rows > 1 and all(each.stackable for each in loaded)
        self.signature = Signature(metadata, self._shared.regions.find)
        self.lane = Lane(
            metadata,
            self.version,
            self.options,
            stackable=self.batchable and (asked or all(each.pays for each in loaded)),
            batchable=self.batchable,
            release=self._shared.release,
        )
        for instance in instances:
            if instance.ready:
                self.lane.add(instance)
            else:
                self._replace()

    async def close(self) -> None:
        """Answer what was accepted, then end the processes."""
        self._leaving = True
        self.lane.accepting = False
        await self.lane.drained()
        self._closed = True
        for instance in self._instances:
            instance.close()
        await self._all_ended()

    async def kill(self) -> None:
        """End the processes at once; what they had to answer is not answered."""
        self._closed = True
        for task in self._restarts:
            task.cancel()
        for instance in self._instances:
            instance.kill("it is not needed any more")
        await self._all_ended()

    async def _all_ended(self) -> None:
        for instance in list(self._instances):
            await instance.ended.wait()

    def _start(self) -> Instance:
        instance = Instance(self._spec, self._shared.arena.reader, on_done=self._on_done, on_end=self._on_end)
        self._instances.append(instance)
        for region in self._shared.regions.all():
            instance.map_region(region)
        return instance

    def each_instance(self) -> list[Instance]:
        """Return the processes, those that load among them."""
        return list(self._instances)

    def _on_done(self, instance: Instance, report: wire.Done) -> None:
        self._failures = 0
        self.lane.on_done(instance, report)

    def _on_end(self, instance: Instance, why: str) -> None:
        self._instances.remove(instance)
        if not hasattr(self, "lane"):
            return
        self.reason = why
        self.lane.on_end(instance, why)
        if not self._closed:
            self._replace()

    def _replace(self) -> None:
        self._failures += 1
        self.lane.statistics.restarts += 1
        if self._failures > _PATIENT_FAILURES and not self.lane.instances:
            self.lane.accepting = False
        task = asyncio.get_running_loop().create_task(self._restart())
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _restart(self) -> None:
        await asyncio.sleep(min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (self._failures - 1)))
        if self._closed:
            return
        instance = self._start()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                loaded = await asyncio.shield(instance.loaded)
        except TimeoutError:
            instance.kill(f"it did not load within {LOAD_TIMEOUT_S:g} s")
            return  # its end starts the next one
        except TenureError:
            return
        if _metadata(self.name, loaded) != self.lane.metadata:
            instance.kill("its file holds another model by now: load it again")
            return
        if not self._leaving:
            self.lane.accepting = True
        self.lane.add(instance)


def _metadata(name: str, loaded: wire.Loaded) -> ModelMetadata:
    for tensor in (*loaded.inputs, *loaded.outputs):
        if tensor.datatype not in DTYPES:
            raise SpecError(f'tensor "{tensor.name}" of model "{name}" has the unknown type {tensor.datatype}')
    return ModelMetadata(
        name=name,
        platform=loaded.platform,
        inputs=tuple(TensorMetadata(t.name, t.datatype, t.shape) for t in loaded.inputs),
        outputs=tuple(TensorMetadata(t.name, t.datatype, t.shape) for t in loaded.outputs),
    )


def _chosen(options: ModelOptions, metadata: ModelMetadata) -> ModelOptions:
    rows = options.max_batch_rows or chosen_rows(metadata.inputs)
    return dataclasses.replace(options, max_batch_rows=rows, instances=options.instances or 1)
