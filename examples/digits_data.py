"""Writes scikit-learn's handwriting images as arrays: ``digits/{x,y}_{train,test}.npy`` in the worker folder.

1,797 images of 8 x 8 pixels, scaled to 0..1; a quarter of each class is held out, drawn with a fixed seed.
"""

import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def main() -> None:
    """Write the four arrays below TENURE_WORKER_DIR (or here)."""
    folder = Path(os.environ.get("TENURE_WORKER_DIR", ".")) / "digits"
    folder.mkdir(parents=True, exist_ok=True)
    x, y = load_digits(return_X_y=True)
    split = train_test_split((x / 16).astype(np.float32), y.astype(np.int64), test_size=0.25, random_state=7, stratify=y)
    for name, values in zip(("x_train", "x_test", "y_train", "y_test"), split, strict=True):
        np.save(folder / f"{name}.npy", values)
    print(f"digits: {len(split[0])} images to train, {len(split[1])} held out, in {folder}")


if __name__ == "__main__":
    main()
