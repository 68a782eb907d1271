"""A data plane in this process, for the doors' own tests: calls run NumPy functions, nothing is started.

    plane = FakePlane("double")              # kinds of tests.serve.models; or FakePlane(mine=Kind(...))
    plane.paused = True; …; plane.resume()   # calls wait until they are let go
    plane.refuse_with = Overloaded("full")   # the next submits raise it

Within a running event loop `done` is called in a later iteration of it, as the real plane does; without one, at once.
"""

from __future__ import annotations

import asyncio
import math
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tenure.errors import NotFound, TenureError, Unavailable
from tenure.serve.faults import InputRefused, ModelFailed, Overloaded, TooLarge
from tenure.serve.plane import (
    EXTENSIONS,
    SHARED_MEMORY,
    Answer,
    Buffer,
    Call,
    IndexEntry,
    ModelStatistics,
    Output,
    RegionStatus,
    TensorRef,
    Wanted,
)
from tenure.serve.tensors import ModelMetadata, check_inputs, check_outputs, from_raw, to_raw

from .models import KINDS, Kind


class FakePlane:
    """See Plane."""

    def __init__(self, *names: str, budget_bytes: int = 64 << 20, max_request_bytes: int = 64 << 20, **kinds: Kind) -> None:
        self.known: dict[str, Kind] = {**{name: KINDS[name] for name in names}, **kinds}
        """What the repository holds, by model name."""
        self.loaded = set(self.known)
        self.draining = False
        self.paused = False
        self.refuse_with: TenureError | None = None
        self.fail_with: TenureError | None = None
        """Given to `done` in place of an answer."""
        self.budget_bytes = budget_bytes
        self.max_request_bytes = max_request_bytes
        self.held: dict[str, int] = {}
        """Bytes reserved by door."""
        self.calls: list[Call] = []
        """Every call accepted so far."""
        self.cancelled: list[Call] = []
        self._waiting: list[Call] = []
        self._statistics = {name: ModelStatistics() for name in self.known}
        self._regions: dict[str, RegionStatus] = {}
        self._buffers: set[int] = set()

    @property
    def ready(self) -> bool:
        return not self.draining

    @property
    def extensions(self) -> Sequence[str]:
        return (*EXTENSIONS, SHARED_MEMORY)

    @property
    def held_bytes(self) -> int:
        return sum(self.held.values())

    def reserve(self, nbytes: int, door: str) -> Buffer:
        if nbytes > min(self.max_request_bytes, self.budget_bytes):
            raise TooLarge(f"a request may have {self.max_request_bytes} bytes; this one has {nbytes}")
        if self.held_bytes + nbytes > self.budget_bytes:
            raise Overloaded("the memory for requests is full; try again", retry_after_s=0.5)
        self.held[door] = self.held.get(door, 0) + nbytes
        buffer = Buffer(offset=0, view=memoryview(bytearray(nbytes)), door=door)
        self._buffers.add(id(buffer))
        return buffer

    def release(self, buffer: Buffer) -> None:
        assert id(buffer) in self._buffers, "a buffer is given back once, and only where it came from"
        self._buffers.remove(id(buffer))
        self.held[buffer.door] -= len(buffer.view)

    def submit(self, call: Call) -> None:
        try:
            if self.refuse_with is not None:
                raise self.refuse_with
            if self.draining:
                raise Unavailable("the server is about to leave; try another")
            self._check(call)
        except TenureError:
            if call.buffer is not None:
                self.release(call.buffer)
            raise
        self.calls.append(call)
        self._waiting.append(call)
        if self.paused:
            return
        try:
            asyncio.get_running_loop().call_soon(self._run)
        except RuntimeError:
            self._run()

    def cancel(self, call: Call) -> None:
        self.cancelled.append(call)
        if call in self._waiting:
            self._waiting.remove(call)
            self._give_back(call)

    def resume(self) -> None:
        """Answer what waits, at once."""
        self.paused = False
        self._run()

    def model_ready(self, name: str, version: str = "") -> bool:
        self._kind(name, version, loaded=False)
        return name in self.loaded and not self.draining

    def metadata(self, name: str, version: str = "") -> ModelMetadata:
        kind = self._kind(name, version)
        return ModelMetadata(name=name, versions=("1",), platform="numpy_fake", inputs=kind.inputs, outputs=kind.outputs)

    def config(self, name: str, version: str = "") -> Mapping[str, Any]:
        kind = self._kind(name, version)

        def described(tensors: Any) -> list[dict[str, Any]]:
            return [
                {
                    "name": t.name,
                    "data_type": "TYPE_STRING" if t.datatype == "BYTES" else f"TYPE_{t.datatype}",
                    "dims": list(t.shape),
                }
                for t in tensors
            ]

        return {
            "name": name,
            "platform": "numpy_fake",
            "backend": "numpy",
            "max_batch_size": 0,
            "input": described(kind.inputs),
            "output": described(kind.outputs),
        }

    def statistics(self, name: str = "", version: str = "") -> Mapping[tuple[str, str], ModelStatistics]:
        if name:
            self._kind(name, version, loaded=False)
        return {(key, "1"): found for key, found in self._statistics.items() if name in ("", key)}

    def index(self, *, ready_only: bool = False) -> Sequence[IndexEntry]:
        entries = [
            IndexEntry(name, "1", "READY") if name in self.loaded else IndexEntry(name, "1", "UNAVAILABLE", "unloaded")
            for name in sorted(self.known)
        ]
        return [entry for entry in entries if entry.state == "READY" or not ready_only]

    async def load(self, name: str) -> None:
        self._kind(name, "", loaded=False)
        self.loaded.add(name)

    async def unload(self, name: str) -> None:
        self._kind(name, "", loaded=False)
        self.loaded.discard(name)

    def register_region(self, name: str, key: str, offset: int, nbytes: int) -> None:
        if name in self._regions:
            raise InputRefused(f'region "{name}" is registered already')
        try:
            size = os.stat(_shared(key)).st_size
        except OSError as error:
            raise InputRefused(f'there is no shared memory "{key}"') from error
        if offset < 0 or nbytes < 1 or offset + nbytes > size:
            raise InputRefused(f'shared memory "{key}" has {size} bytes; {offset} + {nbytes} are asked for')
        self._regions[name] = RegionStatus(name, key, offset, nbytes)

    def unregister_region(self, name: str = "") -> None:
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def regions(self, name: str = "") -> Sequence[RegionStatus]:
        if name and name not in self._regions:
            raise NotFound(f'there is no region "{name}"')
        return [self._regions[name]] if name else list(self._regions.values())

    def _kind(self, name: str, version: str = "", *, loaded: bool = True) -> Kind:
        if name not in self.known or version not in ("", "1"):
            raise NotFound(f'there is no model "{name[:80]}" version "{version[:80]}"')
        if loaded and name not in self.loaded:
            raise Unavailable(f'model "{name}" is not loaded')
        return self.known[name]

    def _check(self, call: Call) -> None:
        kind = self._kind(call.model, call.version)
        check_inputs({ref.name: np.empty(ref.shape, _dtype(ref)) for ref in call.inputs if _sane(ref)}, kind.inputs)
        if len(call.inputs) != len(kind.inputs):
            raise InputRefused("an input is given twice")
        check_outputs([wanted.name for wanted in call.outputs], kind.outputs)
        for ref in call.inputs:
            held = self._region(ref.region).nbytes if ref.region else len(call.buffer.view) if call.buffer else 0
            if ref.offset < 0 or ref.nbytes < 0 or ref.offset + ref.nbytes > held:
                raise InputRefused(f'input "{ref.name}" lies outside of its memory')
            width = _dtype(ref).itemsize if ref.datatype != "BYTES" else 0
            if width and ref.nbytes != width * math.prod(ref.shape):
                raise InputRefused(f'input "{ref.name}" carries {ref.nbytes} bytes, which do not fit its shape')
        for wanted in call.outputs:
            if wanted.region and wanted.offset + wanted.nbytes > self._region(wanted.region).nbytes:
                raise InputRefused(f'output "{wanted.name}" would lie outside of region "{wanted.region}"')

    def _region(self, name: str) -> RegionStatus:
        if name not in self._regions:
            raise InputRefused(f'there is no region "{name}"')
        return self._regions[name]

    def _run(self) -> None:
        if self.paused:
            return
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            statistics = self._statistics[call.model]
            try:
                if self.fail_with is not None:
                    raise self.fail_with
                call.answer = self._answer(call)
            except TenureError as error:
                call.error = error
            except Exception as error:
                call.error = ModelFailed(f"the model failed: {type(error).__name__}: {error}")
            outcome = "ok" if call.error is None else "refused" if isinstance(call.error, InputRefused) else "failed"
            statistics.outcomes[outcome] = statistics.outcomes.get(outcome, 0) + 1
            (statistics.success if outcome == "ok" else statistics.fail).add(0.001)
            if outcome == "ok":
                statistics.inference_count += 1
                statistics.execution_count += 1
                statistics.last_inference_at_s = time.time()
            call.done(call)
            self._give_back(call)

    def _give_back(self, call: Call) -> None:
        if call.buffer is not None:
            self.release(call.buffer)

    def _answer(self, call: Call) -> Answer:
        kind = self.known[call.model]
        arrays = {}
        for ref in call.inputs:
            raw = self._read(ref, call)
            arrays[ref.name] = from_raw(raw, ref.datatype, ref.shape, tensor=ref.name)
        found = kind.function(arrays)
        wanted = call.outputs or tuple(Wanted(meta.name) for meta in kind.outputs)
        types = {meta.name: meta.datatype for meta in kind.outputs}
        outputs = []
        for each in wanted:
            array = found[each.name]
            raw = memoryview(to_raw(array))
            if not each.region:
                outputs.append(Output(each.name, types[each.name], array.shape, raw, nbytes=len(raw)))
                continue
            if len(raw) > each.nbytes:
                raise InputRefused(f'output "{each.name}" has {len(raw)} bytes; its region has room for {each.nbytes}')
            status = self._region(each.region)
            self._map(status, status.offset + each.offset, raw)
            outputs.append(
                Output(each.name, types[each.name], array.shape, None, each.region, each.offset, len(raw)),
            )
        return Answer(call.model, "1", tuple(outputs))

    def _read(self, ref: TensorRef, call: Call) -> bytes | memoryview:
        if not ref.region:
            assert call.buffer is not None
            return call.buffer.view[ref.offset : ref.offset + ref.nbytes]
        status = self._region(ref.region)
        with open(_shared(status.key), "rb") as file:
            file.seek(status.offset + ref.offset)
            return file.read(ref.nbytes)

    def _map(self, status: RegionStatus, at: int, raw: memoryview) -> None:
        with open(_shared(status.key), "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[at : at + len(raw)] = raw


def _shared(key: str) -> str:
    return f"/dev/shm/{os.path.basename(key)}"


def _sane(ref: TensorRef) -> bool:
    if math.prod(abs(length) for length in ref.shape) > 1 << 24 or any(length < 0 for length in ref.shape):
        raise InputRefused(f'input "{ref.name}" has an impossible shape {list(ref.shape)}')
    return True


def _dtype(ref: TensorRef) -> np.dtype[Any]:
    from tenure.serve.tensors import dtype_of

    return dtype_of(ref.datatype, tensor=ref.name)
