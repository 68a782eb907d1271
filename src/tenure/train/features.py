"""The frozen part of a model runs once per image: what it gives is kept (`feature_cache`) and trained on in its place.

    images ──► frozen part, batch by batch ──► features, mapped ──► head: build, gradient, update, evaluate
               by all workers together,         by every round,
               once, over as many slots          run and probe with the
               as it takes                       same weights and images

The key is a hash of the frozen part's identity (its weights and transforms), of the images, the size of a batch, and the
machine (another CPU rounds differently). So other weights, transforms or images are another key, never a stale answer.
Random augmentation would be the same in each round: it is refused, or made a fixed number of times and kept per pass over the
data (`augment = "per-pass"`), by choice. Not here: how a model is cut (`torch_cut`, `keras_model`, `onnx_features`).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tenure.errors import CorruptData, SpecError, Unsupported
from tenure.train.circumstances import machine
from tenure.train.feature_cache import LIMIT_BYTES, Entry, cache_folder, content_hash
from tenure.train.partial_fit import PartialFit
from tenure.train.preparing import POLL_S, Step
from tenure.train.programs import Arrays, Program, load_arrays

AUGMENTS = ("refuse", "per-pass")
_FORMAT = 1
"""Part of each key; grows when the same key would mean other bytes."""
_SPREAD = 0.6180339887
"""Each worker begins at another place, by the golden ratio: how many there are is not known, and they seldom meet."""


class Frozen:
    """A program that trains `head` on what `features` gives for each image. See docs/training.md, "Frozen parts".

    features: (images) -> array with a row per image; the same for the same images. With a second parameter, (images, rng), it
    augments: `rng` is a NumPy generator in training, None for held-out images.
    identity: bytes or text that changes with the weights and transforms of `features`, or a function that gives it.
    head: a program, or an estimator with `partial_fit`. Its `data` finds features as ``x_train.npy`` and ``x_test.npy`` in the
    first of its inputs, where `load_arrays` looks.
    images: (inputs) -> training and held-out arrays; "x" goes through `features`.
    batch: images that are handed over at once.
    batches_per_piece: what is kept as one file; a worker that is killed, or whose slot ends, loses so many.
    augment: `refuse`, or `per-pass`: `passes` differently augmented copies of the training features are kept, and pass p over
    the data uses copy p modulo `passes`. seed: for them.
    folder: where features are kept; below TENURE_HOME unless given. limit_bytes: of all that is kept there.
    """

    def __init__(
        self,
        features: Callable[..., NDArray[Any]],
        identity: bytes | str | Callable[[], bytes | str],
        head: Any,
        *,
        images: Callable[[Mapping[str, str]], tuple[Arrays, Arrays]] = load_arrays,
        batch: int = 64,
        batches_per_piece: int = 4,
        augment: str = "refuse",
        passes: int = 1,
        seed: int = 0,
        folder: Path | None = None,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        if augment not in AUGMENTS:
            raise SpecError(f"augment must be one of {', '.join(AUGMENTS)}; found {augment!r}")
        if min(batch, batches_per_piece) < 1 or passes < 1 or (passes > 1 and augment == "refuse"):
            raise SpecError(
                'batch, batches_per_piece and passes must be >= 1, and passes 1 unless augment = "per-pass"; '
                f"found {batch}, {batches_per_piece}, {passes}"
            )
        self.passes = passes
        """Copies of the training set that the features hold (see `rounds`)."""
        self.head: Any = head if isinstance(head, Program) else PartialFit(head)
        self._features, self._identity, self._load = features, identity, images
        self._batch, self._piece, self._augment, self._seed = batch, batch * batches_per_piece, augment, seed
        self._folder, self._limit_bytes = folder, limit_bytes
        self._images: tuple[Arrays, Arrays] = ({}, {})
        self._entry: Entry | None = None
        self._made: Arrays = {}

    @classmethod
    def of(cls, model: Any, **options: Any) -> Frozen:
        """Return a program over the cached features of a torch or Keras model that was cut (`features`, `identity`)."""
        return cls(model.features, model.identity, model, images=model.data, **options)

    # --- features -----------------------------------------------------------------------------------------------------

    def prepare(self, inputs: Mapping[str, str]) -> Iterator[Step]:
        """Have all features computed, shared with whoever else does so. Before each step one may leave (see `preparing`)."""
        train, held_out = self._images = self._load(inputs)
        self._refuse_random(train["x"])
        root = self._folder or cache_folder(os.environ)
        self._entry = Entry(root, self._key(root), limit_bytes=self._limit_bytes)
        plans = {"x_test": self._edges(len(held_out["x"]), 1), "x_train": self._edges(len(train["x"]), self.passes)}
        total = sum(len(edges) - 1 for edges in plans.values())
        done = 0
        for name, edges in plans.items():
            while (array := self._entry.open(name, edges)) is None:
                for step in self._share(self._entry, name, edges):
                    yield Step(done + step.done, total, step.next_s, wait=step.wait)
            self._entry.tidy(name)
            self._made[name] = array
            done += len(edges) - 1

    def _share(self, entry: Entry, name: str, edges: list[int]) -> Iterator[Step]:
        """Compute what is missing of an array, piece by piece, until it may be there."""
        count = len(edges) - 1
        first = int(count * (int(os.environ.get("TENURE_WORKER", "0")) * _SPREAD % 1))
        order = [*range(first, count), *range(first)]
        entry.enter()
        while not entry.files.exists(entry.folder / f"{name}.npy"):
            there = entry.pieces(name)
            missing = [number for number in order if number not in there]
            number = next((n for n in missing or [-1] if entry.claim(name, n, time.monotonic())), None)
            yield Step(len(there), count, entry.longest_s, wait=number is None)
            if entry.files.exists(entry.folder / f"{name}.npy"):
                break  # another assembled it since we looked, and took the claims away
            if number == -1:
                try:
                    entry.assemble(name, edges)
                except CorruptData:
                    continue  # set aside: it is missing now
            elif number is not None:
                self._compute(entry, name, number, edges)

    def _compute(self, entry: Entry, name: str, number: int, edges: list[int]) -> None:
        began = time.perf_counter()
        part, n = self._images[name == "x_test"]["x"], edges[number + 1] - edges[number]
        pass_, first = divmod(edges[number], len(part))
        found = np.concatenate([self._batch_of(part, pass_, at, name) for at in range(first, first + n, self._batch)])
        if not np.all(np.isfinite(found)):
            raise SpecError(f"the frozen part gave NaN or infinity for images {first} to {first + n - 1} of {name}")
        if not entry.longest_s:
            entry.make_room(2 * sum(found[:1].nbytes * len(images["x"]) for images in self._images) * self.passes)
        entry.publish(name, number, found)
        entry.longest_s = max(entry.longest_s, time.perf_counter() - began)

    def _batch_of(self, part: NDArray[Any], pass_: int, first: int, name: str) -> NDArray[Any]:
        """Return the features of the batch that begins at image `first`, a multiple of the batch."""
        images = np.array(part[first : first + self._batch])
        drawn = () if name == "x_test" else (self._seed, pass_, first)
        more = (np.random.default_rng(drawn) if drawn else None,) if self._takes_rng else ()
        found, n = np.asarray(self._features(images, *more)), len(images)
        if found.shape[:1] != (n,) or found.dtype.hasobject:
            raise SpecError(f"the frozen part gave an array of shape {found.shape} for {n} images; it must give a row for each")
        return found

    def _edges(self, examples: int, passes: int) -> list[int]:
        """Return where pieces begin, and the number of rows. A piece lies within one pass."""
        starts = [p * examples + at for p in range(passes) for at in range(0, examples, self._piece)]
        return [*starts, passes * examples]

    def _key(self, root: Path) -> str:
        identity = self._identity() if callable(self._identity) else self._identity
        found = machine()
        parts = {
            "format": _FORMAT,
            "identity": identity if isinstance(identity, str) else hashlib.sha256(identity).hexdigest(),
            "images": [content_hash(part["x"], root) for part in self._images],
            "batch": [self._batch, self._piece],
            "augment": [self.passes, self._seed] if self._takes_rng and self._augment != "refuse" else [],
            "machine": [found["cpu_model"], found["cpu_features"], found["choices"], np.__version__],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:40]

    @property
    def _takes_rng(self) -> bool:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = [p for p in inspect.signature(self._features).parameters.values() if p.kind in kinds]
        return len(given) > 1 and (self._augment != "refuse" or given[1].default is inspect.Parameter.empty)

    def _refuse_random(self, x: NDArray[Any]) -> None:
        model_does = getattr(self.head, "augments", None)
        random = self._takes_rng or bool(model_does and model_does(x[:1]))
        if random and self._augment == "refuse":
            raise SpecError(
                "the frozen part augments its images at random, and its features are computed once: each round would see the "
                'same ones. Choose: no augmentation; augment = "per-pass" with passes = K, which keeps K augmented copies of '
                "the features; or no cache."
            )
        if not random and self._augment == "per-pass":
            raise SpecError('augment = "per-pass", but nothing draws random numbers: features needs a second parameter, rng')

    # --- the program --------------------------------------------------------------------------------------------------

    def data(self, inputs: Mapping[str, str]) -> tuple[Arrays, Arrays]:
        """See Program. Features in place of images; computed first, without a chance to leave, where `prepare` did not."""
        if not self._made:
            for step in self.prepare(inputs):
                if step.wait:
                    time.sleep(POLL_S)
        assert self._entry is not None
        train, held_out = self._images
        labels = {name: np.concatenate([values] * self.passes) for name, values in train.items() if name != "x"}
        if hasattr(self.head, "on_features"):
            self.head.on_features = True
            return {**labels, "x": self._made["x_train"]}, {**held_out, "x": self._made["x_test"]}
        first = {"features": str(self._entry.folder)}
        if self.passes > 1:
            first["labels"] = str(self._tiled(labels["y"]))
        found: tuple[Arrays, Arrays] = self.head.data({**first, **inputs})
        return found

    def held_out_images(self) -> NDArray[Any]:
        """Return the held-out images that the features were made of."""
        images: NDArray[Any] = self._images[1]["x"]
        return images

    def build(self, seed: int) -> Arrays:
        """See Program."""
        built: Arrays = self.head.build(seed)
        return built

    def gradient(self, weights: Arrays, batch: Arrays, rng: np.random.Generator) -> tuple[Arrays, float, int]:
        """See Program."""
        found: tuple[Arrays, float, int] = self.head.gradient(weights, batch, rng)
        return found

    def update(self, weights: Arrays, summed: Arrays, n: int, round_: int) -> Arrays:
        """See Program."""
        updated: Arrays = self.head.update(weights, summed, n, round_)
        return updated

    def evaluate(self, weights: Arrays, held_out: Arrays) -> float:
        """See Program."""
        return float(self.head.evaluate(weights, held_out))

    def predict(self, weights: Arrays, x: Any) -> NDArray[Any]:
        """Return the label of each row of x: images, or features."""
        x, made = np.asarray(x), self._made["x_test"]
        on_features = x.shape[1:] == made.shape[1:] and x.dtype == made.dtype
        if hasattr(self.head, "on_features"):
            return np.asarray(self.head.predict(weights, x, on_features=on_features))
        if not on_features:
            more = (None,) if self._takes_rng else ()
            parts = range(0, len(x), self._batch)
            x = np.concatenate([np.asarray(self._features(x[at : at + self._batch], *more)) for at in parts])
        return np.asarray(self.head.predict(weights, x))

    def export(self, weights: Arrays, path: Path) -> None:
        """Write ONNX of the whole, input ``x`` images. Raises Unsupported where frozen part or head can't be written."""
        if hasattr(self.head, "on_features"):
            self.head.export(weights, path)
            return
        join, export = getattr(self._features, "join", None), getattr(self.head, "export", None)
        if join is None or export is None:
            which = "frozen part" if join is None else "head"
            raise Unsupported("ONNX export", f"the {which} is Python code that gives no ONNX model")
        export(weights, path)
        join(path)

    def _tiled(self, labels: NDArray[Any]) -> Path:
        """Return a folder with the labels of all passes, for a head that reads its arrays from files."""
        assert self._entry is not None
        digest = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
        folder = self._entry.folder / f"labels-{digest}"
        if not self._entry.files.exists(folder / "y_train.npy"):
            self._entry.files.make_folder(folder)
            temp = folder / f".y_train.{os.getpid()}.npy"
            np.save(temp, labels)
            self._entry.files.link(temp, folder / "y_train.npy")
            self._entry.files.remove(temp)
        return folder
