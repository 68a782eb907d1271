"""Runs the calls of one batch in an instance's process: tensors out of shared memory, engine, answers into shared memory.

A stacked run that fails, or whose outputs have not one row for each row, is taken apart and its calls are run one by one:
one bad call fails alone, and rows are never mixed up. Not here: the process and its socket (`instance`).
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np

from tenure.serve import batchwire as wire
from tenure.serve.engines import Engine
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.tensors import DTYPES, Array, datatype_of, from_raw, to_raw

_ALIGNMENT = 64
_MAX_LAYOUTS = 512
_KEPT_BYTES = 1 << 20
"""Of an answer memory that stay with an idle instance."""
_MAX_REASON = 300
"""Characters of a failure that are told."""


class _AnswerFull(Exception):
    """The answers do not fit into the answer memory. `needed` bytes would."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _NotStackable(Exception):
    """An output has not one row for each row."""


class Runner:
    """One engine and the memory it reads from and writes to."""

    def __init__(self, engine: Engine, arena: mmap.mmap, answers: Sequence[mmap.mmap]) -> None:
        self._engine = engine
        self._arena = memoryview(arena)
        self._answers = [memoryview(answer) for answer in answers]
        self._mapped = answers
        self._touched = [0] * len(answers)
        self._regions: dict[int, memoryview] = {}
        self._layouts: dict[bytes, wire.Layout] = {}
        self._inputs = [(meta.name, meta.datatype, DTYPES[meta.datatype]) for meta in engine.inputs]
        self._plain = all(meta.datatype not in ("BYTES", "BOOL") for meta in engine.inputs)
        self._index = {meta.name: index for index, meta in enumerate(engine.outputs)}

    def map_region(self, order: wire.MapRegion, fd: int) -> None:
        """Map a shared-memory object by its descriptor, which stays the caller's."""
        start = order.offset - order.offset % mmap.ALLOCATIONGRANULARITY
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if order.writable else 0)
        mapped = mmap.mmap(fd, order.offset - start + order.nbytes, mmap.MAP_SHARED, protection, offset=start)
        self._regions[order.region] = memoryview(mapped)[order.offset - start :]

    def drop_region(self, region: int) -> None:
        """Forget a region."""
        self._regions.pop(region, None)

    def run(self, order: wire.Run) -> wire.Done:
        """Run a batch."""
        layouts = [self._layouts.get(code) or self._decoded(code) for code in order.layouts]
        done = wire.Done(order.number, 0, 0.0, 0.0, 0.0, [], [])
        space = _Space(self._answers[order.slot])
        if not (order.stacked and len(layouts) > 1 and self._ran_stacked(order.offsets, layouts, space, done)):
            space.used = 0
            for offset, layout in zip(order.offsets, layouts, strict=True):
                done.ended.append(self._run_alone(offset, layout, space, done, first=not done.ended))
        self._touched[order.slot] = max(self._touched[order.slot], space.used)
        return done

    def _ran_stacked(self, offsets: Sequence[int], layouts: Sequence[wire.Layout], space: _Space, done: wire.Done) -> bool:
        try:
            self._run_stacked(offsets, layouts, space, done)
            return True
        except _NotStackable:
            done.stackable = False
        except Exception:  # a model may raise anything; which call it was for shows when each runs by itself
            pass
        return False

    def trim(self) -> None:
        """Give the pages of the answer memory back to the system; the server has read all of it when this one is idle."""
        for slot, touched in enumerate(self._touched):
            if touched > _KEPT_BYTES:
                self._mapped[slot].madvise(mmap.MADV_REMOVE)
                self._touched[slot] = 0

    def _decoded(self, code: bytes) -> wire.Layout:
        if len(self._layouts) >= _MAX_LAYOUTS:
            self._layouts.clear()
        layout = self._layouts[code] = wire.decode_layout(code)
        return layout

    def _run_stacked(self, offsets: Sequence[int], layouts: Sequence[wire.Layout], space: _Space, done: wire.Done) -> None:
        began_s = time.perf_counter()
        feed: dict[str, Array] = {}
        for index, (name, _, _) in enumerate(self._inputs):
            parts = [self._array(index, offset, layout.inputs[index]) for offset, layout in zip(offsets, layouts, strict=True)]
            feed[name] = np.concatenate(parts)
        ready_s = time.perf_counter()
        first = layouts[0]
        found = self._infer(feed, first.targets)
        ran_s = time.perf_counter()
        rows = [layout.rows for layout in layouts]
        total = sum(rows)
        if any(not array.ndim or array.shape[0] != total for array in found.values()):
            raise _NotStackable
        ended: list[wire.Ended] = []
        by_rows: list[wire.Rows] = []
        if any(target.region for target in first.targets) or any(a.dtype.kind in "OSU" for a in found.values()):
            ends = [0, *accumulate(rows)]
            for at, layout in enumerate(layouts):
                part = {name: array[ends[at] : ends[at + 1]] for name, array in found.items()}
                ended.append(wire.Ended(wire.OK, "", self._written(part, layout, space)))
        else:
            for index, array in self._chosen(found, first.targets):
                by_rows.append(wire.Rows(index, array.shape[1:], space.put(array), array.nbytes // total))
        done.ended, done.rows = ended, by_rows
        done.runs += 1
        done.input_s += ready_s - began_s
        done.infer_s += ran_s - ready_s
        done.output_s += time.perf_counter() - ran_s

    def _run_alone(self, offset: int, layout: wire.Layout, space: _Space, done: wire.Done, *, first: bool) -> wire.Ended:
        began_s = time.perf_counter()
        try:
            feed = {name: self._array(i, offset, layout.inputs[i]) for i, (name, _, _) in enumerate(self._inputs)}
            ready_s = time.perf_counter()
            done.input_s += ready_s - began_s
            found = self._infer(feed, layout.targets)
            ran_s = time.perf_counter()
            done.infer_s += ran_s - ready_s
            done.runs += 1
            outputs = self._written(found, layout, space)
            done.output_s += time.perf_counter() - ran_s
            return wire.Ended(wire.OK, "", outputs)
        except _AnswerFull as error:
            if not first:
                return wire.Ended(wire.AGAIN)
            return wire.Ended(
                wire.FAILED, f"the answer has {error.needed} bytes or more; an answer may have {len(space.view)} in all"
            )
        except InputRefused as error:
            return wire.Ended(wire.REFUSED, str(error)[:_MAX_REASON])
        except ModelFailed as error:
            return wire.Ended(wire.FAILED, str(error)[:_MAX_REASON])
        except Exception as error:  # a model may raise anything, and none of it may end the instance
            return wire.Ended(wire.FAILED, f"the model failed: {type(error).__name__}: {error}"[:_MAX_REASON])

    def _infer(self, feed: Mapping[str, Array], targets: Sequence[wire.Target]) -> dict[str, Array]:
        offered = self._engine.outputs
        names = [offered[target.output].name for target in targets]
        found = self._engine.infer(feed, names)
        for name in names or self._index:
            array = found.get(name)
            expected = offered[self._index[name]].datatype
            if array is None or datatype_of(array) != expected:
                given = "nothing" if array is None else datatype_of(array)
                raise ModelFailed(f'the model gave {given} for output "{name}", which is {expected} by its signature')
        return found

    def _array(self, index: int, offset: int, ref: wire.Input) -> Array:
        name, datatype, dtype = self._inputs[index]
        if ref.region:
            memory = self._regions.get(ref.region)
            if memory is None:
                raise InputRefused(f'the shared memory of input "{name}" is not mapped')
            start = ref.offset
        else:
            memory, start = self._arena, offset + ref.offset
        if self._plain and start % dtype.itemsize == 0:
            return np.frombuffer(memory, dtype, ref.nbytes // dtype.itemsize, start).reshape(ref.shape)
        return from_raw(memory[start : start + ref.nbytes], datatype, ref.shape, tensor=name)

    def _chosen(self, found: Mapping[str, Array], targets: Sequence[wire.Target]) -> list[tuple[int, Array]]:
        offered = self._engine.outputs
        if targets:
            return [(target.output, found[offered[target.output].name]) for target in targets]
        return [(index, found[meta.name]) for index, meta in enumerate(offered)]

    def _written(self, found: Mapping[str, Array], layout: wire.Layout, space: _Space) -> list[wire.Found]:
        outputs = []
        regions = [target.region for target in layout.targets] or [0] * len(self._engine.outputs)
        for at, (index, array) in enumerate(self._chosen(found, layout.targets)):
            if not regions[at]:
                raw = to_raw(array) if array.dtype.kind in "OSU" else array
                size = len(raw) if isinstance(raw, (bytes, memoryview)) else raw.nbytes
                outputs.append(wire.Found(index, array.shape, space.put(raw), size))
                continue
            raw = to_raw(array)
            target = layout.targets[at]
            memory = self._regions.get(target.region)
            if memory is None or memory.readonly:
                raise InputRefused(f'the shared memory of output "{self._engine.outputs[index].name}" cannot be written')
            if len(raw) > target.nbytes:
                name = self._engine.outputs[index].name
                raise InputRefused(f'output "{name}" has {len(raw)} bytes; its shared memory has room for {target.nbytes}')
            memory[target.offset : target.offset + len(raw)] = raw
            outputs.append(wire.Found(index, array.shape, target.offset, len(raw)))
        return outputs


class _Space:
    """What is left of one answer memory."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.used = 0

    def put(self, content: Array | bytes | memoryview) -> int:
        """Write behind what was written before; return where. Raises _AnswerFull."""
        size = content.nbytes if not isinstance(content, bytes) else len(content)
        offset = self.used
        if offset + size > len(self.view):
            raise _AnswerFull(offset + size)
        if isinstance(content, (bytes, memoryview)):
            self.view[offset : offset + size] = content
        elif size:
            place = np.frombuffer(self.view, content.dtype.newbyteorder("<"), content.size, offset)
            np.copyto(place.reshape(content.shape), content)
        self.used = (offset + size + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
        return offset
