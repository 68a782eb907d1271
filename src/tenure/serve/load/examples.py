"""What a load application sends and what must come back: rows of an array, or picture files that become the same rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np

from tenure.errors import NotFound, SpecError
from tenure.serve.pixels import BadImage, Preparation, decode, fill, read_file
from tenure.serve.tensors import DTYPES, Array, ModelMetadata

_TOLERANCE = 1e-4


class Data:
    """The rows to send and what their answers must be."""

    def __init__(self, metadata: ModelMetadata, inputs: str, expected: str, *, output: str = "", mapped: bool = False) -> None:
        """mapped: rows are read from the file as they are used, from the page cache that all applications share.

        Raises NotFound, SpecError.
        """
        if len(metadata.inputs) != 1:
            raise SpecError(f"the load application feeds models with one input; {metadata.name} has {len(metadata.inputs)}")
        self.rows = _load(inputs, mapped)
        self.expected = _load(expected, False)
        if len(self.rows) != len(self.expected) or not len(self.rows):
            raise SpecError(f"{inputs} has {len(self.rows)} rows, {expected} has {len(self.expected)}")
        self.dtype = DTYPES[metadata.inputs[0].datatype]
        self.name = metadata.inputs[0].name
        self.labels = self.expected.dtype.kind in "iu"
        whole = {meta.name for meta in metadata.outputs if meta.datatype.startswith(("INT", "UINT"))}
        fitting = [meta.name for meta in metadata.outputs if (meta.name in whole) == self.labels]
        self.output = output or (fitting or [meta.name for meta in metadata.outputs])[0]
        if self.output not in {meta.name for meta in metadata.outputs}:
            raise SpecError(f"load.output {output!r} is none of {', '.join(m.name for m in metadata.outputs)}")

    def starts(self, seed: int, count: int) -> Iterator[int]:
        """Yield first rows of requests, seeded, at most `count`."""
        chance = random.Random(seed)
        return (chance.randrange(len(self.rows)) for _ in range(count))

    def cut(self, start: int, batch: int) -> dict[str, Array]:
        """Return one request's rows, cycling past the end."""
        part = self.rows.take(np.arange(start, start + batch), axis=0, mode="wrap")
        return {self.name: np.ascontiguousarray(part, dtype=self.dtype)}

    def answer(self, found: dict[str, Array]) -> Array:
        """Return the output that is compared: one label or one row of values per row."""
        answer = found[self.output]
        if self.labels and answer.ndim == self.expected.ndim + 1 and answer.dtype.kind == "f":
            return np.asarray(answer.argmax(axis=-1))
        if answer.ndim == self.expected.ndim + 1 and answer.shape[-1] == 1:  # Triton has no row without a dimension
            return answer.reshape(answer.shape[:-1])
        return answer

    def right(self, found: dict[str, Array], start: int, batch: int) -> bool:
        """Return whether every row of an answer is as expected."""
        wanted = self.expected.take(np.arange(start, start + batch), axis=0, mode="wrap")
        answer = self.answer(found)
        if answer.shape != wanted.shape:
            return False
        if self.labels:
            return bool(np.array_equal(answer, wanted))
        return bool(np.allclose(answer, wanted, rtol=0.0, atol=_TOLERANCE))


class Files:
    """The same rows as picture files, for an application that reads and decodes by itself."""

    def __init__(self, data: Data, paths: Sequence[str], how: Preparation) -> None:
        """Raises SpecError when there is not one file per row."""
        if len(paths) != len(data.rows):
            raise SpecError(f"there are {len(paths)} picture files for {len(data.rows)} rows of inputs")
        self._data, self._paths, self._how = data, paths, how

    def load(self, start: int, batch: int) -> list[bytes]:
        """Return the contents of one request's files, cycling past the end. Raises BadImage."""
        return [read_file(self._paths[row % len(self._paths)]) for row in range(start, start + batch)]

    def prepare(self, contents: Sequence[bytes]) -> dict[str, Array]:
        """Decode, cut and convert them into one request. Raises BadImage."""
        x = np.empty((len(contents), *self._how.shape), self._how.dtype)
        for row, content in zip(x, contents, strict=True):
            fill(row, decode(content, self._how), self._how)
        return {self._data.name: x}


__all__ = ["BadImage", "Data", "Files"]


def _load(path: str, mapped: bool) -> Array:
    try:
        found: Array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except OSError as error:
        raise NotFound(f"the data file {path} cannot be read: {error}") from error
    except ValueError as error:
        raise SpecError(f"{path} is not a .npy file of plain numbers: {error}") from error
    return found
