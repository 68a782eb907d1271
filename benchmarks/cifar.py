"""CIFAR-10 as arrays: the JPEGs in ``images/cifar10`` of the data folder, decoded once per call.

Not here: resizing, splitting and bad images (`tenure.data`); this is the plain reading that benchmarks compare with.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_arrays(source: Path, folder: Path, *, train_per_class: int = 2500, test_per_class: int = 500) -> Path:
    """Write ``x_train.npy y_train.npy x_test.npy y_test.npy`` into `folder`, and return it.

    source: the folder with ``train-<class>.zip`` and ``test-<class>.zip``. Images: uint8 [N, 32, 32, 3]; labels: int64,
    classes in the order of their names. Examples are in the order of classes; a stage draws its own order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, per_class in (("train", train_per_class), ("test", test_per_class)):
        zips = sorted(source.glob(f"{part}-*.zip"))
        decoded = [_decode(path, per_class) for path in zips]
        np.save(folder / f"x_{part}.npy", np.concatenate(decoded))
        np.save(folder / f"y_{part}.npy", np.repeat(np.arange(len(zips)), [len(images) for images in decoded]))
    return folder


def _decode(path: Path, most: int) -> NDArray[np.uint8]:
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jpg"))[:most]
        return np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])
