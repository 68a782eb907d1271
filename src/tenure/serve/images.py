"""From image files to labels: reading, decoding and inference overlapped, in order, in bounded memory.

    files ──► worker threads, each: read some files, decode them, ask the model ──► results in the order of the files

Each worker takes its files through all steps, so while some wait for the model the others decode, and nothing piles up:
pixels exist of at most `workers` times 8 files (or one batch), whoever is slow. A few more files are under way than
results were taken; when nobody takes results, nothing is read. Files that can't be read or decoded come back with why.
`python -m tenure.serve.images --help` is the same from a command line. Not here: how one picture is decoded (`pixels`).
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tenure.errors import SpecError
from tenure.serve.faults import InputRefused, ModelFailed
from tenure.serve.pixels import BadImage, Preparation, preparation_for, read_into
from tenure.serve.processes import leased_threads
from tenure.serve.tensors import Array, ModelMetadata

if TYPE_CHECKING:
    from tenure.serve.client import Model

DEFAULT_BATCH = 8
"""Files per request where the model takes any number."""
_UNDER_WAY = 3
"""Turns per worker that may be under way or wait to be taken."""
_AT_A_TIME = 8
"""Files that a worker decodes before it asks, also where the model takes one at a time: going to and fro between decoder
and model for each picture empties the processor's caches, 6 % of the time of a MobileNet."""
_SMALLEST_RANK = 2
"""Of scores: rows and classes."""


@dataclass(frozen=True, slots=True)
class Classified:
    """What a model says of one file."""

    path: str
    classes: tuple[int, ...] = ()
    """Places in the model's output, best first; of equal scores the lower place first."""
    scores: tuple[float, ...] = ()
    """As the model gives them: a quantised model's are 0 to 255."""
    error: str = ""
    """Why the file was skipped; empty: it was not."""


def classify(
    model: Model,
    files: Iterable[str | os.PathLike[str]],
    *,
    top: int = 5,
    preparation: Preparation | None = None,
    output: str = "",
    batch: int = 0,
    workers: int = 0,
) -> Iterator[Classified]:
    """Yield one result per file, in order. See Model.classify.

    output: which output holds the scores, [rows, classes]; empty: the only one that fits. batch: files per request, 0: 8
    where the model takes any number. An overloaded server is asked again until the model's timeout has passed.
    Raises SpecError, and what Model.predict raises.
    """
    if top < 1 or batch < 0 or workers < 0:
        raise SpecError(f"top must be at least 1, batch and workers at least 0; found {top}, {batch} and {workers}")
    metadata = model.metadata()
    how = preparation or preparation_for(metadata)
    taken = metadata.inputs[0]
    task = _Task(
        model=model,
        input=taken.name,
        how=how,
        output=_scores(metadata, output),
        top=top,
        rows=_rows(metadata, batch),
        fixed=taken.shape[0] > 0,
    )
    cores = leased_threads(os.environ)
    return _ordered(task, (os.fspath(file) for file in files), workers or cores + max(2, cores // 2))


@dataclass(frozen=True, slots=True)
class _Task:
    """All a worker needs to know."""

    model: Model
    input: str
    how: Preparation
    output: str
    top: int
    rows: int
    """Files of one request."""
    fixed: bool
    """Whether the model takes no other number."""

    def run(self, paths: Sequence[str]) -> list[Classified]:
        """Take some files through all steps."""
        requests = -(-len(paths) // self.rows)
        x = np.zeros((requests * self.rows, *self.how.shape), self.how.dtype)
        found: list[Classified | None] = [None] * len(paths)
        good: list[int] = []
        for place, path in enumerate(paths):
            try:
                read_into(x[len(good)], path, self.how)
            except BadImage as error:
                found[place] = Classified(path, error=str(error))
            else:
                good.append(place)
        asked = []
        for start in range(0, len(good), self.rows):
            count = self.rows if self.fixed else min(self.rows, len(good) - start)  # what a fixed number lacks is sent as zeros
            asked.append({self.input: x[start : start + count]})
        answers = self.model.predict_many(asked, outputs=[self.output])
        scores = [self._checked(answer, len(each[self.input])) for answer, each in zip(answers, asked, strict=True)]
        for place, row in zip(good, itertools.chain.from_iterable(scores), strict=False):
            found[place] = self._best(paths[place], row)
        return [each for each in found if each is not None]

    def _checked(self, scores: Array, rows: int) -> Array:
        if scores.ndim < _SMALLEST_RANK or scores.shape[0] != rows:
            raise ModelFailed(f'output "{self.output}" has shape {list(scores.shape)}; {rows} rows of scores were expected')
        return scores.reshape(rows, -1)

    def _best(self, path: str, row: Array) -> Classified:
        best = np.argsort(-row.astype(np.float64), kind="stable")[: self.top]
        return Classified(path, tuple(best.tolist()), tuple(row[best].astype(float).tolist()))


def _ordered(task: _Task, paths: Iterator[str], workers: int) -> Iterator[Classified]:
    under_way: deque[Future[list[Classified]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        while True:
            while len(under_way) < workers * _UNDER_WAY:
                part = list(itertools.islice(paths, max(task.rows, _AT_A_TIME // task.rows * task.rows)))
                if not part:
                    break
                under_way.append(pool.submit(task.run, part))
            if not under_way:
                return
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _rows(metadata: ModelMetadata, batch: int) -> int:
    fixed = metadata.inputs[0].shape[0]
    if fixed > 0 and batch not in (0, fixed):
        raise InputRefused(f'model "{metadata.name}" takes {fixed} pictures per request; batch = {batch} does not fit')
    return fixed if fixed > 0 else batch or DEFAULT_BATCH


def _scores(metadata: ModelMetadata, output: str) -> str:
    """Return the output that holds scores. Raises SpecError."""
    offered = [meta.name for meta in metadata.outputs if meta.datatype not in ("BYTES", "BOOL")]
    if output:
        if output not in offered:
            raise SpecError(f'the model has no output of numbers "{output}"; it gives {", ".join(offered)}')
        return output
    fitting = [
        meta.name
        for meta in metadata.outputs
        if meta.name in offered and len(meta.shape) >= _SMALLEST_RANK and meta.shape[-1] != 1
    ]
    if len(fitting) != 1:
        raise SpecError(f"which output holds the scores? output=NAME, one of {', '.join(offered)}")
    return fitting[0]


if __name__ == "__main__":
    import sys

    from tenure.serve.images_command import main

    sys.exit(main(sys.argv[1:]))
