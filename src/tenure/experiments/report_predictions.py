"""Held-out examples as a trained program sees them: a grid of pictures, and who is taken for whom.

Taken from the stage's artefact ``predictions.npz`` (`train.predictions`); each figure cites its place there. Right and
wrong are told by a sign, a word and the frame's style, never by colour alone. The pictures are PNG files inside the page.
"""

from __future__ import annotations

import base64
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.experiments.report_cite import Cell, text_cell

ARTEFACT = "predictions.npz"
MAX_CLASSES = 20
"""Above, the table of classes is left out."""
_MAX_BYTES = 64 << 20

Arrays = dict[str, NDArray[Any]]


def read_predictions(path: Path) -> Arrays | None:
    """Return the arrays of an artefact; None where it is missing, damaged or of another make: a report does without."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        count, shown = len(found["classes"]), len(found["index"])
        fits = found["confusion"].shape == (count, count) and all(
            found[name].shape == (shown,) and found[name].min() >= 0 and found[name].max() < count
            for name in ("expected", "predicted")
        )
        pictures = found.get("pictures")
        fits = fits and (pictures is None or (pictures.shape[0] == shown and pictures.dtype == np.uint8))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return found if fits else None


def prediction_blocks(stage: str, found: Arrays) -> list[dict[str, Any]]:
    """Return the blocks of one stage: the grid, if the examples are pictures, and the table of classes."""
    confusion, names = found["confusion"], [str(name) for name in found["classes"]]
    right, total = int(np.trace(confusion)), int(confusion.sum())
    where = f"{stage}/{ARTEFACT}"
    blocks: list[dict[str, Any]] = [{"kind": "heading", "text": "What it says of held-out examples"}]
    if "pictures" in found:
        blocks.append(_grid(found, names, where, right, total))
    if len(names) <= MAX_CLASSES:
        blocks.append(_table(confusion, names, where))
    return blocks if len(blocks) > 1 else []


def _grid(found: Arrays, names: list[str], where: str, right: int, total: int) -> dict[str, Any]:
    items = []
    for place, picture in enumerate(found["pictures"]):
        predicted, expected = names[int(found["predicted"][place])], names[int(found["expected"][place])]
        items.append(
            {
                "png": base64.b64encode(_png(picture)).decode(),
                "predicted": predicted,
                "expected": expected,
                "right": predicted == expected,
                "index": int(found["index"][place]),
                "cite": {"artefact": where, "array": "predicted", "index": place},
            }
        )
    shown = sum(1 for item in items if item["right"])
    alt = (
        f"{len(items)} of {total:,} held-out pictures, evenly spread, each with the class that was predicted; under a wrong "
        f"one, in a dashed frame, the true class. {shown} of these {len(items)} are right; of all, {right:,} "
        f"({right / total:.1%})."
    )
    return {"kind": "pictures", "title": "Predicted test pictures", "alt": alt, "items": items}


def _table(confusion: NDArray[Any], names: list[str], where: str) -> dict[str, Any]:
    rows: list[list[Cell]] = []
    for true, name in enumerate(names):
        counts = [
            {
                "value": int(confusion[true, said]),
                "text": str(int(confusion[true, said])),
                "cite": {"artefact": where, "array": "confusion", "index": [true, said]},
            }
            for said in range(len(names))
        ]
        of_class = int(confusion[true].sum())
        share = f"{confusion[true, true] / of_class:.0%}" if of_class else "–"
        rows.append([text_cell(name), *counts, text_cell(share)])
    columns = ["true class", *names, "right"]
    title = "Held-out examples by true class (rows) and predicted class (columns)"
    return {
        "kind": "table",
        "title": title,
        "columns": columns,
        "rows": rows,
        "note": "",
        "folded": len(names) > MAX_CLASSES // 2,
    }


def _png(picture: NDArray[Any]) -> bytes:
    from PIL import Image  # heavy: only where a page has pictures

    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", optimize=True)
    return out.getvalue()
