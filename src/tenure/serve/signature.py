"""What a model takes and gives, held against a request before anything of it is queued. No arrays: names, types, sizes.

The result is a `Form`: all that the plane and the instance need to know of a request besides where its buffer lies. Doors
describe requests of the same head by the same objects, so a form is looked up by their identity and made only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

from tenure.serve import batchwire as wire
from tenure.serve.faults import InputRefused
from tenure.serve.plane import Call, TensorRef, Wanted
from tenure.serve.regions import Region
from tenure.serve.tensors import DTYPES, ModelMetadata, TensorMetadata

_MAX_FORMS = 512
_BATCH_BYTES = 4 << 20
"""How large a batch's inputs are where the rows of a batch were not chosen: past that company saves nothing."""
_MAX_CHOSEN_ROWS = 64
_WIDTHS = {name: 0 if name == "BYTES" else dtype.itemsize for name, dtype in DTYPES.items()}


class Form:
    """One form of request to one model."""

    __slots__ = ("end", "inputs", "kind", "layout", "outputs", "regions", "rows")

    def __init__(
        self,
        inputs: Sequence[TensorRef],
        outputs: Sequence[Wanted],
        layout: wire.Layout,
        kind: Hashable,
        end: int,
        regions: dict[Region, int],
    ) -> None:
        self.inputs = inputs
        """Kept, so that no other object can have its identity."""
        self.outputs = outputs
        self.layout = wire.encode(layout)
        self.kind = kind
        """Equal for forms whose calls may be stacked."""
        self.rows = layout.rows
        self.end = end
        """Bytes of the buffer that are used."""
        self.regions = regions
        """To the bytes of each that are used."""


class Signature:
    """Inputs and outputs of one loaded model."""

    def __init__(self, metadata: ModelMetadata, find_region: Callable[[str], Region]) -> None:
        """find_region: raises InputRefused for a name that is not registered."""
        self.metadata = metadata
        self._find_region = find_region
        self._inputs = {meta.name: (index, meta) for index, meta in enumerate(metadata.inputs)}
        self._outputs = {meta.name: index for index, meta in enumerate(metadata.outputs)}
        self._forms: dict[tuple[int, int], Form] = {}

    def form(self, call: Call) -> Form:
        """Return the call's form. Raises InputRefused."""
        key = (id(call.inputs), id(call.outputs))
        form = self._forms.get(key)
        if form is None or (form.regions and not _still_there(form.regions)):
            form = self._made(call)
            if len(self._forms) >= _MAX_FORMS:
                self._forms.clear()
            self._forms[key] = form
        buffer = call.buffer
        if form.end and (buffer is None or form.end > len(buffer.view)):
            size = 0 if buffer is None else len(buffer.view)
            raise InputRefused(f"the inputs take {form.end} bytes; the request carries {size}")
        return form

    def _made(self, call: Call) -> Form:
        expected = self.metadata.inputs
        if len(call.inputs) != len(expected) or {ref.name for ref in call.inputs} != self._inputs.keys():
            wanted = ", ".join(meta.name for meta in expected)
            found = ", ".join(str(ref.name)[:80] for ref in call.inputs[:32])
            raise InputRefused(f"the model takes the inputs {wanted}; the request carries {found or 'none'}")
        places: list[wire.Input] = [wire.Input(0, 0, 0, ())] * len(expected)
        end, regions = 0, dict[Region, int]()
        for ref in call.inputs:
            index, meta = self._inputs[ref.name]
            _check(ref, meta)
            if ref.region:
                region = self._used(regions, ref.region, ref.offset + ref.nbytes, f'input "{ref.name}"')
                places[index] = wire.Input(region.number, ref.offset, ref.nbytes, tuple(ref.shape))
            else:
                end = max(end, ref.offset + ref.nbytes)
                places[index] = wire.Input(0, ref.offset, ref.nbytes, tuple(ref.shape))
        targets = self._targets(call.outputs, regions)
        rows = places[0].shape[0] if places and places[0].shape else 1
        aligned = all(place.shape[:1] == (rows,) for place in places)
        kind = (
            tuple(place.shape[1:] if aligned else place.shape for place in places),
            tuple(target.output for target in targets),
            any(target.region for target in targets),
            aligned,
        )
        return Form(call.inputs, call.outputs, wire.Layout(rows, tuple(places), targets), kind, end, regions)

    def _targets(self, outputs: Sequence[Wanted], regions: dict[Region, int]) -> tuple[wire.Target, ...]:
        targets, seen = [], set()
        for wanted in outputs:
            index = self._outputs.get(wanted.name)
            if index is None:
                raise InputRefused(f'the model has no output "{wanted.name[:80]}"; it gives {", ".join(sorted(self._outputs))}')
            if index in seen:
                raise InputRefused(f'output "{wanted.name}" is asked for twice')
            seen.add(index)
            number = 0
            if wanted.region:
                if wanted.offset < 0 or wanted.nbytes < 0:
                    raise InputRefused(f'output "{wanted.name}" is to go to offset {wanted.offset}, {wanted.nbytes} bytes')
                region = self._used(regions, wanted.region, wanted.offset + wanted.nbytes, f'output "{wanted.name}"')
                if not region.writable:
                    raise InputRefused(f'shared memory "{wanted.region}" cannot be written')
                number = region.number
            targets.append(wire.Target(index, number, wanted.offset if number else 0, wanted.nbytes if number else 0))
        return tuple(targets)

    def _used(self, regions: dict[Region, int], name: str, end: int, what: str) -> Region:
        region = self._find_region(name)
        if end > region.status.nbytes:
            raise InputRefused(f'{what} ends at byte {end} of shared memory "{name}", which has {region.status.nbytes}')
        region.check()
        regions[region] = max(regions.get(region, 0), end)
        return region


def chosen_rows(inputs: Sequence[TensorMetadata]) -> int:
    """Return how many rows a batch has where nobody chose: as many as make 4 MiB of input, 1 to 64."""
    row_bytes = sum(math.prod(abs(length) for length in meta.shape[1:]) * (_WIDTHS[meta.datatype] or 8) for meta in inputs)
    return max(1, min(_MAX_CHOSEN_ROWS, _BATCH_BYTES // max(row_bytes, 1)))


def _still_there(regions: dict[Region, int]) -> bool:
    for region in regions:
        if region.fd < 0:
            return False
        region.check()
    return True


def _check(ref: TensorRef, meta: TensorMetadata) -> None:
    if ref.datatype != meta.datatype:
        raise InputRefused(f'input "{meta.name}" must be {meta.datatype}; found {str(ref.datatype)[:40]}')
    shape = ref.shape
    if len(shape) != len(meta.shape) or not all(
        have > 0 if want < 0 else have == want for have, want in zip(shape, meta.shape, strict=True)
    ):
        found = list(shape)[:33]
        raise InputRefused(f'input "{meta.name}" must have shape {list(meta.shape)} (-1: any length above 0); found {found}')
    count, width = math.prod(shape), _WIDTHS[meta.datatype]
    if ref.offset < 0 or ref.nbytes < 0:
        raise InputRefused(f'input "{meta.name}" has offset {ref.offset} and {ref.nbytes} bytes')
    if width and ref.nbytes != count * width:
        raise InputRefused(
            f'tensor "{meta.name}" carries {ref.nbytes} bytes; {meta.datatype} of shape {list(shape)} takes {count * width}'
        )
    if not width and count * 4 > ref.nbytes:
        raise InputRefused(f'tensor "{meta.name}" claims {count} elements; its {ref.nbytes} bytes cannot hold them')
