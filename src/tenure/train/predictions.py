"""What a trained program says of its held-out examples, small enough to keep and to look at: ``predictions.npz``.

    expected, predicted    int64 [shown], of SHOWN examples at most, evenly spread over the held-out set
    index                  int64 [shown], their places in it
    pictures               uint8 [shown, height, width, 3]; missing when the examples are no pictures
    confusion              int64 [classes, classes]: expected by predicted, of all held-out examples
    classes                names, at the place that is their label

Examples are pictures when they are uint8 [n, height, width(, 1, 3 or 4)], or when the program's attribute `picture` says
(height, width) of its rows of gray values. Not here: how they are shown (`experiments.report_predictions`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.train.records import Arrays

SHOWN = 60
MAX_CLASSES = 1000


def predictions(program: Any, weights: Arrays, held_out: Arrays, inputs: Mapping[str, str]) -> Arrays | None:
    """Return what the module's docstring lists; None where labels are not classes 0, 1, 2, …

    held_out: as the program's `data` gave it. Where that is not what people look at (features of a frozen part), the program's
    `held_out_images()` gives the pictures.
    """
    predicted = _classes(program.predict(weights, held_out["x"]))
    expected = _classes(held_out["y"]) if "y" in held_out else None
    if predicted is None or expected is None or len(predicted) != len(expected) or not len(expected):
        return None
    count = int(max(predicted.max(), expected.max())) + 1
    names = class_names(inputs, count)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (expected, predicted), 1)
    index = np.unique(np.linspace(0, len(expected) - 1, num=min(SHOWN, len(expected)), dtype=np.int64))
    found: Arrays = {
        "index": index,
        "expected": expected[index],
        "predicted": predicted[index],
        "confusion": confusion,
        "classes": np.array(names),
    }
    pictures = as_pictures(held_out_examples(program, held_out), index, getattr(program, "picture", None))
    return found if pictures is None else {**found, "pictures": pictures}


def held_out_examples(program: Any, held_out: Arrays) -> NDArray[Any]:
    """Return the held-out examples as they are: pictures, where `data` gave features of them."""
    own = getattr(program, "held_out_images", None)
    examples: NDArray[Any] = own() if callable(own) else held_out["x"]
    return examples


def class_names(inputs: Mapping[str, str], count: int) -> list[str]:
    """Return the names in ``classes.json`` of an input folder when it has enough of them, else the labels as they are."""
    for place in inputs.values():
        try:
            names = json.loads((Path(place) / "classes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(names, list) and len(names) >= count:
            return [str(name)[:40] for name in names[:count]]
    return [str(number) for number in range(count)]


def as_pictures(x: NDArray[Any], index: NDArray[Any], picture: tuple[int, int] | None = None) -> NDArray[np.uint8] | None:
    """Return examples as pictures, uint8 [shown, height, width, 3]; None when they are none."""
    rows = np.asarray(x[index])
    if picture is not None:
        rows = rows.reshape(len(rows), *picture)
        if rows.dtype != np.uint8:
            rows = (np.clip(rows, 0, 1) * 255).astype(np.uint8)
    if rows.dtype != np.uint8 or rows.ndim not in (3, 4):
        return None
    if rows.ndim == 3:
        rows = rows[..., None]
    if rows.shape[3] not in (1, 3, 4) or max(rows.shape[1:3]) > 512:
        return None
    return np.repeat(rows, 3, axis=3) if rows.shape[3] == 1 else rows[..., :3]


def _classes(labels: Any) -> NDArray[np.int64] | None:
    values = np.asarray(labels)
    if values.ndim == 2 and values.shape[1] > 1:
        values = values.argmax(axis=1)
    values = values.reshape(-1)
    if values.dtype.kind not in "iub" or (len(values) and not 0 <= int(values.min()) <= int(values.max()) < MAX_CLASSES):
        return None
    return values.astype(np.int64)
