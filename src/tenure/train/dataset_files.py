"""The folder of a data set while it is made: its place, its arrays, its list of bad pictures.

A folder beside the final one is filled and then renamed: the set appears whole or not at all. Not here: what is written into
it, and in which order (`dataset`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tenure.errors import Conflict, SpecError
from tenure.train.images import Size

SHOWN = 3
"""Bad pictures that an error message names."""


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` that is this process's own, and is gone afterwards unless it was renamed."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise SpecError(f"{out} is there already; a data set is not changed. Name another folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft, lock = (out.parent / f".{out.name}.{kind}" for kind in ("partial", "lock"))
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(held.fileno()).st_nlink == 0:  # its holder removed the file between our open and our lock
                raise BlockingIOError
        except BlockingIOError as error:
            raise Conflict(f"another process is making {out}; wait for its end, or name another folder") from error
        try:
            if draft.exists():
                shutil.rmtree(draft)  # left by a process that was killed
            draft.mkdir()
            yield draft
        except OSError as error:
            error.filename = error.filename or str(out)  # a write says nothing of where
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            lock.unlink(missing_ok=True)


def publish(draft: Path, out: Path) -> None:
    """Give the folder its name, once its files are on disk: a power cut leaves no set that only looks whole."""
    for path in (*draft.iterdir(), draft):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    try:
        os.rename(draft, out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise SpecError(f"{out} appeared while it was being made; it was left as it is. Name another folder.") from error
        raise


class Skipped:
    """The list of bad pictures, on disk. Raises SpecError as soon as there are too many."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
        self._file.write("source\tname\treason\n")
        self._first: list[str] = []
        self._all = 0
        self._limit_bad = 1.0
        self.count = 0

    def __enter__(self) -> Skipped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def expect(self, pictures: int, limit_bad: float) -> None:
        """Say how many pictures there are, and which share of them may be bad."""
        self._all, self._limit_bad = pictures, limit_bad
        self._check()

    def note(self, source: str, name: str, reason: str) -> None:
        """Keep one line; control characters, which a name may hold, are written out."""
        self.count += 1
        texts = ["".join(c if c.isprintable() else repr(c)[1:-1] for c in text) for text in (source, name, reason)]
        if len(self._first) < SHOWN:
            self._first.append(f"\n  {texts[0]}: {texts[1]}: {texts[2]}")
        self._file.write("\t".join(texts) + "\n")
        self._check()

    def examples(self) -> str:
        """Return the first ones, for an error message."""
        return f". The first of {self.count} that were skipped:{''.join(self._first)}" if self.count else ""

    def close(self) -> None:
        """Write what is left."""
        self._file.close()

    def _check(self) -> None:
        if self._all and self.count > self._limit_bad * self._all:
            raise SpecError(
                f"{self.count} of the {self._all} pictures are bad so far; at most {self._limit_bad:.3g} of all may be. Mend "
                f"or remove them, or allow more with --limit-bad{self.examples()}"
            )


class Writer:
    """Appends rows to one part's two files. Their headers are written last, when the number of rows is known."""

    def __init__(self, folder: Path, part: str, classes: Mapping[str, int], size: Size, *, one_hot: bool) -> None:
        self._classes = classes
        self._one_hot = np.zeros(len(classes), np.float32) if one_hot else None
        width, height = size
        self._x = Growing(folder / f"x_{part}.npy", np.dtype(np.uint8), (height, width, 3))
        label = () if self._one_hot is None else self._one_hot.shape
        self._y = Growing(folder / f"y_{part}.npy", np.dtype(np.float32 if one_hot else np.int64), label)
        self.counts = [0] * len(classes)
        """Rows of each class."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._x.close()
        self._y.close()

    def add(self, pixels: NDArray[np.uint8], label: str) -> None:
        """Append one example."""
        number = self._classes[label]
        self._x.append(pixels)
        if self._one_hot is None:
            self._y.append(number)
        else:
            self._one_hot[number] = 1
            self._y.append(self._one_hot)
            self._one_hot[number] = 0
        self.counts[number] += 1


class Growing:
    """An .npy file whose first dimension is written at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._dtype, self._row, self._rows = dtype, row, 0
        self._write_header()
        self._data_at = self._file.tell()

    def append(self, values: Any) -> None:
        """Write one row."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self._rows += 1

    def close(self) -> None:
        """Write how many rows there are."""
        try:
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._data_at, "NumPy leaves room for any length of the first dimension"
        finally:
            self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)
