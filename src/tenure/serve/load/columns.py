"""Room for the record of one run: columns that are filled while it runs, in memory or in a folder's .npy files.

In a folder they are there from the start, so that a run that is cut off leaves what it saw. The pages of a file may leave
memory again; of what is not in a file, `MAX_REQUESTS` rows are 500 MB. Not here: what a record is (`records`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import CorruptData, NotFound, SpecError
from tenure.serve.load.records import Record
from tenure.serve.load.schedule import MAX_REQUESTS

PENDING = 255
"""In the column of outcomes: not ended yet."""
_TIMES = ("due_s", "issued_s", "ended_s")


class Columns:
    """Writable columns, as plain memory: setting an item of an array takes thrice as long."""

    def __init__(self, capacity: int, folder: Path | None = None) -> None:
        if not 0 < capacity <= MAX_REQUESTS:
            raise SpecError(f"one run takes 1 to {MAX_REQUESTS} requests; found {capacity}")
        self.capacity, self._folder = capacity, folder
        due, issued, ended = (_made(folder, name, np.float64, capacity) for name in _TIMES)
        outcome = _made(folder, "outcome", np.uint8, capacity)
        outcome[:] = PENDING
        self._arrays = (due, issued, ended, outcome)
        # as Any: no type tells what a memoryview holds
        views: Any = tuple(memoryview(column.data) for column in self._arrays)
        self.due, self.issued, self.ended, self.outcome = views

    def begin(self, count: int) -> None:
        """Write to every page that `count` rows take, so that none has to be found while the clock runs."""
        for column in self._arrays[:3]:
            column[:count] = np.nan

    def record(self, count: int) -> Record:
        """Return the first `count` rows, and cut the files to them."""
        found = Record(*(column[:count] for column in self._arrays))
        if self._folder is not None and count < self.capacity:
            write_record(self._folder, found)
        return found


def write_record(folder: Path, record: Record) -> None:
    """Write a record's columns below `folder`, one .npy file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*_TIMES, "outcome"):
        partial = folder / f".{name}.npy"
        np.save(partial, getattr(record, name))
        partial.rename(folder / f"{name}.npy")


def read_record(folder: Path | str) -> Record:
    """Return the record in a folder. Raises NotFound, CorruptData; of a run that was cut off, requests still under way are
    not part of it.
    """
    folder = Path(folder)
    try:
        columns = [np.load(folder / f"{name}.npy", allow_pickle=False) for name in (*_TIMES, "outcome")]
    except OSError as error:
        raise NotFound(f"{folder} holds no record of a run: {error}") from error
    except ValueError as error:
        raise CorruptData(f"{folder} holds no record of a run: {error}") from error
    ended = columns[3] != PENDING
    try:
        return Record(*(column[ended] for column in columns))
    except (SpecError, IndexError) as error:
        raise CorruptData(f"{folder} holds no record of a run: {error}") from error


def _made(folder: Path | None, name: str, dtype: type[np.generic], count: int) -> NDArray[Any]:
    if folder is None:
        return np.empty(count, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(count,))
