"""Runs a model before it is said to be ready: so that the first request finds it warm, and to see what stacking does to it.

Stacking copies every input once more and makes all calls of a batch wait for the slowest part of it. Where a run of many rows
takes as long as as many runs of one (a large model on a CPU), that buys nothing, and such calls are better run one by one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from tenure.serve.engines import Engine
from tenure.serve.signature import chosen_rows
from tenure.serve.tensors import DTYPES, Array, TensorMetadata

_TRIES = 3
_LONG_S = 0.3
"""After this long and two tries there is no third: the quickest counts, and the first one is seldom it."""
_GAIN = 0.95
"""Stacking pays when a row takes less than this part of its time alone."""


class Warmth(NamedTuple):
    """What was seen."""

    stackable: bool
    """Calls may be stacked: every input and output has an open first dimension, and the runs gave a row for each row."""
    pays: bool
    """It takes less time; also where nothing could be measured."""


def warm_up(engine: Engine, rows: int) -> Warmth:
    """Run zeros as one row and as `rows`, where shapes are known.

    rows: -1 is as many as a batch has where nobody chose, 0 runs nothing. A model that dislikes zeros still serves.
    """
    stackable = bool(engine.inputs) and all(meta.shape[:1] == (-1,) for meta in (*engine.inputs, *engine.outputs))
    if not rows or any(-1 in meta.shape[1:] for meta in engine.inputs):
        return Warmth(stackable, True)
    rows = chosen_rows(engine.inputs) if rows < 0 else rows
    feed = {meta.name: _zeros(meta) for meta in engine.inputs}
    try:
        one_s = _quickest_s(engine, feed, 1, stackable)
        if not stackable or rows < 2:
            return Warmth(stackable, True)
        return Warmth(True, _quickest_s(engine, feed, rows, stackable) < _GAIN * rows * one_s)
    except _NotRowForRow:
        return Warmth(False, True)
    except Exception:  # zeros need not be input that the model knows what to do with
        return Warmth(stackable, True)


class _NotRowForRow(Exception):
    """An output has not one row for each row."""


def _quickest_s(engine: Engine, feed: Mapping[str, Array], rows: int, stackable: bool) -> float:
    times: list[float] = []
    while len(times) < 2 or (len(times) < _TRIES and sum(times) < _LONG_S):
        began_s = time.perf_counter()
        found = engine.infer({name: np.concatenate([array] * rows) for name, array in feed.items()} if rows > 1 else feed)
        times.append(time.perf_counter() - began_s)
        if stackable and any(not array.ndim or array.shape[0] != rows for array in found.values()):
            raise _NotRowForRow
    return min(times)


def _zeros(meta: TensorMetadata) -> Array:
    shape = tuple(1 if length < 0 else length for length in meta.shape)
    if meta.datatype != "BYTES":
        return np.zeros(shape, DTYPES[meta.datatype])
    text = np.empty(math.prod(shape), dtype=object)
    text[:] = b""
    return text.reshape(shape)
