"""Makes a data set of pictures: ``x_train.npy y_train.npy x_test.npy y_test.npy`` and ``classes.json``, ready to be mapped.

    list names ──► split per class ──► decode (some threads, in order) ──► append to files ──► rename the folder

Pictures stream through: two batches per decoding thread are in memory at most, whatever the size of the set. The folder
appears whole under its name or not at all; Ctrl-C leaves nothing behind, and what a killed run left goes with the next one.
The same sources, size, split and seed give the same bytes.

One mapped file per array, weighed against several shards: a map may be as large as the disk and costs a reader only the pages
it touches, `np.load(mmap_mode="r")` is all a program needs, and the shards of a round are ranges of indexes into it anyway.
Not here: where pictures come from (`sources`), how one is decoded (`images`), how the folder is written (`dataset_files`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tenure.errors import SpecError
from tenure.train.dataset_files import Skipped, Writer, publish, scratch
from tenure.train.images import BadImage, Size
from tenure.train.sources import Example, open_sources

BATCH = 64
"""Pictures that a thread decodes at once, or fewer that have together …"""
BATCH_BYTES = 4 << 20
"""… so many bytes."""
MAX_SIZE = 1024
"""Pixels of width or height."""
DEFAULT_SPLIT = 0.2

Progress = Callable[[int, int, int], None]
"""Told of pictures looked at, all pictures, pictures skipped."""
_Row = NDArray[np.uint8] | str
"""A picture, or why it is skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """What to make. Raises SpecError when a value is out of range."""

    size: Size = (32, 32)
    """Width and height in pixels."""
    split: float | None = None
    """Share of each class held out; None: as the folders train and test say, else DEFAULT_SPLIT."""
    one_hot: bool = False
    """Labels as float32 [images, classes] instead of int64 [images]."""
    seed: int = 0
    """Of the split."""
    limit_bad: float = 0.05
    """Share of pictures that may be bad; more is taken for a mistake."""
    threads: int = 0
    """Decoders; 0: one per core, 8 at most."""

    def __post_init__(self) -> None:
        if not all(1 <= pixels <= MAX_SIZE for pixels in self.size):
            raise SpecError(f"size must lie between 1 and {MAX_SIZE} pixels; found {self.size[0]} x {self.size[1]}")
        if self.split is not None and not 0 < self.split < 1:
            raise SpecError(f"split is the share held out, above 0 and below 1; found {self.split}")
        if not 0 <= self.limit_bad < 1:
            raise SpecError(
                f"limit_bad, the share of pictures that may be bad, is at least 0 and below 1; found {self.limit_bad}"
            )
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


def parse_size(text: str) -> Size:
    """Return width and height from "32" or "32x48". Raises SpecError."""
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if not found:
        raise SpecError(f'size must read "32" or, width x height, "32x48"; found {text!r}')
    return int(found[1]), int(found[2] or found[1])


def make_dataset(sources: Sequence[Path], out: Path, spec: DatasetSpec, *, progress: Progress | None = None) -> Dataset:
    """Make the folder `out` of all sources together, and return what is in it.

    Raises SpecError: a source or `out` does not fit, no picture is left of a class or too many are bad; Conflict: another
    process makes the same folder; OSError, e.g. for a full disk. Then there is no `out`.
    """
    if not sources:
        raise SpecError("nothing to make a data set of: name a folder, a zip or arrays")
    with scratch(out) as draft, warnings.catch_warnings(), contextlib.ExitStack() as open_:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        unpacked = draft / "unpacked"
        unpacked.mkdir()
        bad = open_.enter_context(Skipped(draft / "skipped.tsv"))
        found: list[Example] = []
        for source in open_sources(sources, unpacked):
            open_.callback(source.close)
            found += source.examples(bad.note)
        if not found:
            raise SpecError(f"no picture in a folder that names its class in {_names(sources)}{bad.examples()}")
        bad.expect(len(found) + bad.count, spec.limit_bad)
        classes = _classes(found)
        counts = _write_parts(draft, _parts(found, spec), classes, spec, bad, progress)
        _check_left(counts, classes, bad)
        shutil.rmtree(unpacked)
        made = Dataset(
            path=str(out),
            classes=tuple(classes),
            train=sum(counts["train"]),
            test=sum(counts["test"]),
            skipped=bad.count,
            spec={**asdict(spec), "sources": [str(path) for path in sources]},
        )
        (draft / "classes.json").write_text(json.dumps(list(classes)) + "\n")
        (draft / "dataset.json").write_text(json.dumps(asdict(made), indent=1) + "\n")
        bad.close()
        publish(draft, out)
    return made


def _write_parts(
    draft: Path,
    parts: dict[str, list[Example]],
    classes: dict[str, int],
    spec: DatasetSpec,
    bad: Skipped,
    progress: Progress | None,
) -> dict[str, list[int]]:
    """Decode and write all examples; return for each part how many there are of each class."""
    seen, count = 0, sum(map(len, parts.values()))
    counts = {}
    for part, examples in parts.items():
        with Writer(draft, part, classes, spec.size, one_hot=spec.one_hot) as writer:
            for example, row in _decoded(examples, spec):
                seen += 1
                if isinstance(row, str):
                    bad.note(example.source.where, example.name, row)
                else:
                    writer.add(row, example.label)
                if progress:
                    progress(seen, count, bad.count)
            counts[part] = writer.counts
    return counts


def _classes(found: Sequence[Example]) -> dict[str, int]:
    """Return class -> label, in the order of names; numbers in the order of numbers."""
    names = {example.label for example in found}
    numeric = all(name.lstrip("-").isdigit() for name in names)
    if len(names) == 1:
        raise SpecError(
            f"all pictures are of one class, {names.pop()!r}; a folder per class is needed, with two classes or more"
        )
    return {name: number for number, name in enumerate(sorted(names, key=int if numeric else None))}


def _parts(found: list[Example], spec: DatasetSpec) -> dict[str, list[Example]]:
    """Return the examples to train with and those held out, each by class and name."""
    told = {example.part for example in found}
    if "" in told and len(told) > 1:
        outside = next(example for example in found if not example.part)
        raise SpecError(
            f"{outside.source.where}: {outside.name} lies neither in train nor in test, though others do; let folders split "
            "all or none"
        )
    if len(told) > 1:
        if spec.split is not None:
            raise SpecError("the sources have their own train and test parts; leave --split away, or name one part alone")
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
    threads = spec.threads or min(8, len(os.sched_getaffinity(0)))
    at_once = _at_once(spec.size)
    waiting: deque[tuple[Sequence[Example], Future[list[_Row]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for at in range(0, len(examples), at_once):
                batch = examples[at : at + at_once]
                waiting.append((batch, pool.submit(_decode_batch, batch, spec.size)))
                if len(waiting) > 2 * threads:
                    batch, rows = waiting.popleft()
                    yield from zip(batch, rows.result(), strict=True)
            for batch, rows in waiting:
                yield from zip(batch, rows.result(), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _at_once(size: Size) -> int:
    """Return how many pictures a thread decodes before they are written."""
    return max(1, min(BATCH, BATCH_BYTES // (3 * size[0] * size[1])))


def _decode_batch(batch: Sequence[Example], size: Size) -> list[_Row]:
    rows: list[_Row] = []
    for example in batch:
        try:
            rows.append(example.source.load(example.key, size))
        except BadImage as error:
            rows.append(str(error))
    return rows


def _check_left(counts: dict[str, list[int]], classes: dict[str, int], bad: Skipped) -> None:
    """Raise SpecError when there is a class without a picture to train with, or nothing to hold out."""
    empty = [name for name, number in classes.items() if not counts["train"][number]]
    if empty:
        raise SpecError(f"no picture of {', '.join(empty[:5])} is left to train with; each class needs two{bad.examples()}")
    if not any(counts["test"]):
        raise SpecError(f"no picture is left to hold out{bad.examples()}")


def _names(sources: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in sources[:5]) + (f" and {len(sources) - 5} more" if len(sources) > 5 else "")
