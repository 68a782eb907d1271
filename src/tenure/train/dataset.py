"""Makes a data set of pictures: ``x_train.npy y_train.npy x_test.npy y_test.npy`` and ``classes.json``, ready to be mapped.

    list names ──► split per class ──► decode (some threads, in order) ──► append to files ──► rename the folder

Pictures stream through: two batches per decoding thread are in memory at most, whatever the size of the set. The folder
appears whole under its name or not at all; Ctrl-C leaves nothing behind, and what a killed run left goes with the next one.
The same sources, size, split and seed give the same bytes.

One file per array, weighed against many of equal size (shards): a mapped file of any size costs a reader only the pages it
touches, `np.load(mmap_mode="r")` is all a program needs, and sets that do not fit one disk do not fit this design anyway.
Not here: where pictures come from (`sources`), how one is decoded (`images`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tenure.errors import Conflict, SpecError
from tenure.train.images import BadImage
from tenure.train.sources import Example, open_source

BATCH = 64
"""Pictures that a thread decodes at once."""
MAX_SIZE = 1024
"""Pixels a side."""
DEFAULT_SPLIT = 0.2

Progress = Callable[[int, int, int], None]
"""Told of pictures looked at, all pictures, pictures skipped."""
_Row = NDArray[np.uint8] | str
"""A picture, or why it is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """What to make. Raises SpecError when a value is out of range."""

    size: int = 32
    """Pixels a side."""
    split: float | None = None
    """Share of each class held out; None: as the folders train and test say, else DEFAULT_SPLIT."""
    one_hot: bool = False
    """Labels as float32 [images, classes] instead of int64 [images]."""
    seed: int = 0
    """Of the split."""
    max_skipped: float = 0.05
    """Share of pictures that may be bad; more is taken for a mistake."""
    threads: int = 0
    """Decoders; 0: one per core, 8 at most."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise SpecError(f"size must lie between 1 and {MAX_SIZE} pixels; found {self.size}")
        if self.split is not None and not 0 < self.split < 1:
            raise SpecError(f"split is the share held out, above 0 and below 1; found {self.split}")
        if not 0 <= self.max_skipped < 1:
            raise SpecError(f"the share of bad pictures allowed must be at least 0 and below 1; found {self.max_skipped}")
        if not 0 <= self.seed < 1 << 63 or not 0 <= self.threads <= 64:
            raise SpecError(f"seed must not be negative, threads lie between 0 and 64; found {self.seed} and {self.threads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What was made. Also in ``dataset.json``."""

    path: str
    classes: tuple[str, ...]
    """Names, at the place that is their label."""
    train: int
    test: int
    skipped: int
    """Bad pictures; each is in ``skipped.tsv`` with its source, name and reason."""
    spec: dict[str, Any] = field(default_factory=dict)
    """As asked for."""


def make_dataset(sources: Sequence[Path], out: Path, spec: DatasetSpec, *, progress: Progress | None = None) -> Dataset:
    """Make the folder `out` of all sources together, and return what is in it.

    Raises SpecError: a source or `out` does not fit, no picture is left of a class or too many are bad; Conflict: another
    process makes the same folder; OSError, e.g. for a full disk. Then there is no `out`.
    """
    if not sources:
        raise SpecError("nothing to make a data set of: name a folder, a zip or arrays")
    with _scratch(out) as draft, warnings.catch_warnings(), contextlib.ExitStack() as open_:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        (draft / "unpacked").mkdir()
        bad = open_.enter_context(_Skipped(draft / "skipped.tsv"))
        found: list[Example] = []
        for path in sources:
            source = open_source(path, draft / "unpacked")
            open_.callback(source.close)
            found += source.examples(bad.note)
        if not found:
            raise SpecError(f"no picture in a folder that names its class in {_names(sources)}{bad.first()}")
        classes = _classes(found)
        parts = _parts(found, spec)
        seen = 0
        counts: dict[str, NDArray[np.int64]] = {}
        for part, examples in parts.items():
            with _Writer(draft, part, spec.size, classes, spec.one_hot) as writer:
                for example, row in _decoded(examples, spec):
                    seen += 1
                    if isinstance(row, str):
                        bad.note("", example.name, row)
                    else:
                        writer.add(row, example.label)
                    if progress:
                        progress(seen, len(found), bad.count)
                counts[part] = writer.counts
        _check_left(counts, classes, bad, len(found), spec)
        shutil.rmtree(draft / "unpacked")
        made = Dataset(
            path=str(out),
            classes=tuple(classes),
            train=int(counts["train"].sum()),
            test=int(counts["test"].sum()),
            skipped=bad.count,
            spec={**asdict(spec), "sources": [str(path) for path in sources]},
        )
        (draft / "classes.json").write_text(json.dumps(list(classes), ensure_ascii=False) + "\n", encoding="utf-8")
        (draft / "dataset.json").write_text(json.dumps(asdict(made), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        bad.close()
        os.rename(draft, out)
    return made


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` that is this process's own, and is gone afterwards unless it was renamed."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise SpecError(f"{out} is there already; a data set is not changed. Name another folder, or remove it first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft, lock = (out.parent / f".{out.name}.{kind}" for kind in ("partial", "lock"))
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"another process is making {out}; wait for its end, or name another folder") from error
        try:
            shutil.rmtree(draft, ignore_errors=True)  # left by a process that was killed
            draft.mkdir()
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            lock.unlink(missing_ok=True)


class _Skipped:
    """The list of bad pictures, on disk."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", errors="backslashreplace")
        self._first = ""
        self.count = 0

    def __enter__(self) -> _Skipped:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, source: str, name: str, reason: str) -> None:
        """Keep one line; control characters, which a name may hold, are written out."""
        self.count += 1
        line = "\t".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in text) for text in (source, name, reason))
        self._first = self._first or line.replace("\t", " ").strip()
        self._file.write(line + "\n")

    def first(self) -> str:
        """Return an example, for an error message."""
        return f". {self.count} were skipped, the first: {self._first}" if self.count else ""

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


class _Writer:
    """Appends rows to one part's two files. Their headers are written last, when the number of rows is known."""

    def __init__(self, folder: Path, part: str, size: int, classes: dict[str, int], one_hot: bool) -> None:
        self._classes = classes
        self._one_hot = np.eye(len(classes), dtype=np.float32) if one_hot else None
        width = (len(classes),) if one_hot else ()
        self._x = _Growing(folder / f"x_{part}.npy", np.dtype(np.uint8), (size, size, 3))
        self._y = _Growing(folder / f"y_{part}.npy", np.dtype(np.float32 if one_hot else np.int64), width)
        self.counts = np.zeros(len(classes), np.int64)
        """Rows of each class."""

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._x.close()
        self._y.close()

    def add(self, pixels: NDArray[np.uint8], label: str) -> None:
        """Append one example."""
        number = self._classes[label]
        self._x.append(pixels)
        self._y.append(np.int64(number) if self._one_hot is None else self._one_hot[number])
        self.counts[number] += 1


class _Growing:
    """An .npy file whose first dimension is written at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
        self._file: BinaryIO = path.open("wb", buffering=1 << 20)
        self._dtype, self._row, self._rows = dtype, row, 0
        self._write_header()
        self._data_at = self._file.tell()

    def append(self, values: Any) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self._rows += 1

    def close(self) -> None:
        try:
            self._file.seek(0)
            self._write_header()
            assert self._file.tell() == self._data_at, "NumPy leaves room for any length of the first dimension"
        finally:
            self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _classes(found: Sequence[Example]) -> dict[str, int]:
    """Return class -> label, in the order of names; numbers in the order of numbers."""
    names = {example.label for example in found}
    numeric = all(name.lstrip("-").isdigit() for name in names)
    return {name: number for number, name in enumerate(sorted(names, key=int if numeric else None))}


def _parts(found: list[Example], spec: DatasetSpec) -> dict[str, list[Example]]:
    """Return the examples to train with and those held out, each by class and name."""
    told = {example.part for example in found}
    if {"train", "test"} <= told:
        if spec.split is not None:
            raise SpecError("the sources have their own train and test parts; leave --split away, or name one part alone")
        if "" in told:
            outside = next(example for example in found if not example.part)
            raise SpecError(f"{outside.name} lies neither in train nor in test, though others do; split all or none by folders")
        split = {part: [example for example in found if example.part == part] for part in ("train", "test")}
    else:
        split = _drawn(found, spec.split or DEFAULT_SPLIT, spec.seed)
    return {part: sorted(examples, key=lambda example: (example.label, example.name)) for part, examples in split.items()}


def _drawn(found: list[Example], share: float, seed: int) -> dict[str, list[Example]]:
    """Hold out a share of each class, drawn from (seed, class): at least one, and at least one to train with."""
    by_class: dict[str, list[Example]] = {}
    for example in found:
        by_class.setdefault(example.label, []).append(example)
    split: dict[str, list[Example]] = {"train": [], "test": []}
    for number, (_, examples) in enumerate(sorted(by_class.items())):
        examples.sort(key=lambda example: example.name)
        held_out = min(max(1, round(share * len(examples))), max(1, len(examples) - 1))
        order = np.random.default_rng((seed, number)).permutation(len(examples))
        split["test"] += [examples[index] for index in order[:held_out]]
        split["train"] += [examples[index] for index in order[held_out:]]
    return split


def _decoded(examples: Sequence[Example], spec: DatasetSpec) -> Iterator[tuple[Example, _Row]]:
    """Yield each example with its pixels, or the reason why it has none, in order."""
    threads = spec.threads or min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Sequence[Example], Future[list[_Row]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for at in range(0, len(examples), BATCH):
                batch = examples[at : at + BATCH]
                waiting.append((batch, pool.submit(_decode_batch, batch, spec.size)))
                if len(waiting) > 2 * threads:
                    batch, rows = waiting.popleft()
                    yield from zip(batch, rows.result(), strict=True)
            for batch, rows in waiting:
                yield from zip(batch, rows.result(), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _decode_batch(batch: Sequence[Example], size: int) -> list[_Row]:
    rows: list[_Row] = []
    for example in batch:
        try:
            rows.append(example.source.load(example.key, size))
        except BadImage as error:
            rows.append(str(error))
    return rows


def _check_left(
    counts: dict[str, NDArray[np.int64]], classes: dict[str, int], bad: _Skipped, looked_at: int, spec: DatasetSpec
) -> None:
    for part, found in counts.items():
        empty = [name for name, number in classes.items() if not found[number]]
        if len(empty) == len(classes) or (part == "train" and empty):
            raise SpecError(
                f"no picture of {', '.join(empty[:5])} is left {'to train with' if part == 'train' else 'to hold out'}; each "
                f"class needs two{bad.first()}"
            )
    if bad.count > spec.max_skipped * looked_at:
        raise SpecError(
            f"{bad.count} of {looked_at} pictures are bad; at most {spec.max_skipped:.0%} may be{bad.first()}. Mend or remove "
            "them, or allow more with --max-skipped."
        )


def _names(sources: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in sources[:5]) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")
