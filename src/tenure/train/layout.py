"""How a gradient's named arrays lie in flat vectors, one for each dtype, and how these are cut into slices.

A slice is a range of whole checksum blocks, so that whoever adds one slice of all nodes reads and verifies nothing else.
Adding is element by element: a slice of a sum has the bits that the whole sum has there. Not here: files (`exchange`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError
from tenure.train.records import BLOCK_BYTES, Arrays

Flats = dict[str, NDArray[Any]]
"""Dtype -> one-dimensional array."""
MIN_BLOCK_BYTES = 4096
BLOCKS = 512
"""About as many blocks has a vector: 64 slices of it differ by no more than an eighth in size."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of one flat vector."""

    dtype: str
    first: int
    """In elements."""
    count: int


class Layout:
    """Names, dtypes and shapes of a gradient, in the order of their names."""

    def __init__(self, entries: Sequence[tuple[str, str, tuple[int, ...]]]) -> None:
        """entries: (name, dtype, shape) of each array. Raises SpecError for dtypes that can't be added."""
        self.entries = tuple(sorted((name, dtype, tuple(shape)) for name, dtype, shape in entries))
        self._expected = {name: (dtype, shape) for name, dtype, shape in self.entries}
        self.sizes: dict[str, int] = {}
        """Dtype -> elements."""
        self._places: dict[str, tuple[str, int, int, tuple[int, ...]]] = {}
        for name, dtype, shape in self.entries:
            if np.dtype(dtype).kind not in "fciu":
                raise SpecError(f"gradient {name!r} has dtype {np.dtype(dtype)}; it must be of numbers that can be added")
            first, count = self.sizes.get(dtype, 0), int(np.prod(shape, dtype=np.int64))
            self._places[name] = (dtype, first, count, shape)
            self.sizes[dtype] = first + count
        bytes_ = sum(np.dtype(dtype).itemsize * size for dtype, size in self.sizes.items())
        self.block_bytes = min(BLOCK_BYTES, max(MIN_BLOCK_BYTES, 1 << max(0, -(-bytes_ // BLOCKS) - 1).bit_length()))

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Layout:
        """Return the layout of a gradient."""
        return cls([(name, values.dtype.str, values.shape) for name, values in arrays.items()])

    @classmethod
    def of_json(cls, data: Sequence[Sequence[Any]]) -> Layout:
        """Return the layout that `to_json` gave."""
        return cls([(name, dtype, tuple(shape)) for name, dtype, shape in data])

    def to_json(self) -> list[list[Any]]:
        """Return name, dtype and shape of each array, JSON-ready."""
        return [[name, dtype, list(shape)] for name, dtype, shape in self.entries]

    def check(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Raise SpecError when a gradient has other arrays than the first one had."""
        found = {name: (values.dtype.str, values.shape) for name, values in arrays.items()}
        if found != self._expected:
            name = sorted(set(found.items()) ^ set(self._expected.items()))[0][0]
            raise SpecError(
                f"the program's gradients differ in their arrays: {name!r} is {found.get(name, 'missing')} here and was "
                f"{self._expected.get(name, 'missing')} at first. Each gradient must have the same names, dtypes and shapes."
            )

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> Flats:
        """Return a gradient as flat vectors of their own."""
        flats = self.empty()
        for name, view in self.views(flats).items():
            view[...] = arrays[name]
        return flats

    def add(self, flats: Flats, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Add a gradient to flat vectors, in place."""
        for name, view in self.views(flats).items():
            np.add(view, arrays[name], out=view)

    def empty(self) -> Flats:
        """Return flat vectors whose content is to be written."""
        return {dtype: np.empty(size, dtype=dtype) for dtype, size in self.sizes.items()}

    def views(self, flats: Flats) -> Arrays:
        """Return the named arrays as views of flat vectors."""
        return {
            name: flats[dtype][first : first + count].reshape(shape)
            for name, (dtype, first, count, shape) in self._places.items()
        }

    def slice(self, number: int, slices: int) -> list[Cut]:
        """Return what belongs to slice `number` of `slices`: whole blocks, as even as can be; none when there are too few."""
        blocks = {dtype: self._blocks(dtype) for dtype in self.sizes}
        every = sum(blocks.values())
        begin, end = every * number // slices, every * (number + 1) // slices
        cuts, before = [], 0
        for dtype, count in blocks.items():
            each = self.block_bytes // np.dtype(dtype).itemsize
            first = max(0, begin - before) * each
            stop = min(self.sizes[dtype], (min(end, before + count) - before) * each)
            if first < stop:
                cuts.append(Cut(dtype, first, stop - first))
            before += count
        return cuts

    def _blocks(self, dtype: str) -> int:
        return -(-self.sizes[dtype] * np.dtype(dtype).itemsize // self.block_bytes)
