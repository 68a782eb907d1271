"""Where the pictures of a data set are: folders, zip files, arrays; each example with its class and its part.

    flowers/rose/1.jpg                 class "rose"
    flowers/train/rose/1.jpg           … of the part "train" (also: test, val, validation, training)
    train-rose.zip: train/rose/1.jpg   the same inside a zip; one folder around everything is left out
    x_train.npy with y_train.npy beside it, or both in one .npz (also x and y; x_test and y_test): uint8 pixels, labels

Nothing is unpacked to a name that an archive chooses. The names of all examples are held (0.5 to 0.8 KB each), no picture.
Not here: what a picture is (`images`), what is written (`dataset`).
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tenure.errors import SpecError
from tenure.train.images import MAX_FILE_BYTES, BadImage, Size, decode, from_array

MAX_EXAMPLES = 10_000_000
SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"))
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "test", "validation": "test"}
"""Folder name -> part."""
_PAIRS = (("x_train", "y_train", "train"), ("x_test", "y_test", "test"), ("x", "y", ""))


@dataclass(frozen=True, slots=True)
class Example:
    """One picture that is there, so far as its name tells."""

    source: Source
    key: Any
    """How its source finds it again."""
    name: str
    """For people, and for the order."""
    label: str
    """Its class."""
    part: str
    """`train`, `test`, or empty when its place does not say."""


Report = Callable[[str, str, str], None]
"""Told of what is left out: source, name, reason."""


class Source(Protocol):
    """Something that pictures come from. `load` may be called by several threads."""

    where: str
    """Its path, for people."""

    def examples(self, report: Report) -> Iterator[Example]:
        """Yield what is there; tell what is left out."""
        ...

    def load(self, key: Any, size: Size) -> NDArray[np.uint8]:
        """Return one picture, as `images.decode`. Raises BadImage."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


def open_sources(paths: Sequence[Path], scratch: Path) -> Iterator[Source]:
    """Yield the sources at some paths; zips that lie in a folder itself are sources beside it.

    scratch: a folder for what must be unpacked. Raises SpecError for a path that is none.
    """
    for path in paths:
        if path.is_dir():
            yield FolderSource(path)
            yield from (ZipSource(found) for found in sorted(path.glob("*.zip")) if found.is_file())
        elif not path.is_file():
            raise SpecError(f"there is no {path}; a source is a folder of pictures, a zip of such, or arrays (.npy, .npz)")
        elif path.suffix in (".npy", ".npz"):
            yield ArraySource(path, scratch)
        elif zipfile.is_zipfile(path):
            yield ZipSource(path)
        else:
            raise SpecError(
                f"{path} is neither a folder nor a whole zip file nor arrays (.npy, .npz); unpack other archives first"
            )


class FolderSource:
    """A folder with a folder per class. Links to folders are followed, once each."""

    def __init__(self, path: Path) -> None:
        self._path, self.where = path, str(path)

    def examples(self, report: Report) -> Iterator[Example]:
        """See Source."""
        names: list[str] = []
        for name in self._walk(self._path, set()):
            names.append(name)
            _bound(len(names), self._path)
        yield from _placed(self, [(name, name) for name in names], report)

    def load(self, key: Any, size: Size) -> NDArray[np.uint8]:
        """See Source."""
        try:
            with (self._path / key).open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        return decode(_bounded(content), size)

    def close(self) -> None:
        """See Source."""

    def _walk(self, folder: Path, seen: set[tuple[int, int]]) -> Iterator[str]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                yield from self._walk(Path(entry.path), seen)
            elif entry.is_file():
                yield str(Path(entry.path).relative_to(self._path))


class ZipSource:
    """A zip file with a folder per class."""

    def __init__(self, path: Path) -> None:
        self._path, self.where = path, str(path)
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise SpecError(f"{path} is no whole zip file: {error}") from error

    def examples(self, report: Report) -> Iterator[Example]:
        """See Source."""
        members = self._zip.infolist()
        _bound(len(members), self._path)
        kept: list[tuple[str, Any]] = []
        for info in members:
            if info.is_dir():
                continue
            if reason := _refused(info):
                report(self.where, info.filename, reason)
            else:
                kept.append((info.filename, info))
        yield from _placed(self, kept, report)

    def load(self, key: Any, size: Size) -> NDArray[np.uint8]:
        """See Source."""
        try:
            with self._zip.open(key) as member:
                content = member.read(MAX_FILE_BYTES + 1)
        except Exception as error:  # a torn archive: BadZipFile, zlib.error, EOFError, NotImplementedError, …
            raise BadImage(f"cannot be unpacked: {type(error).__name__}: {error}") from error
        return decode(_bounded(content), size)

    def close(self) -> None:
        """See Source."""
        self._zip.close()


class ArraySource:
    """Arrays of pixels with their labels. Those of an .npz are unpacked to the scratch folder first, then mapped."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path, self.where = path, str(path)
        self._arrays = self._of_npz(path, scratch) if path.suffix == ".npz" else self._of_npy(path)
        for name, pixels, labels in self._arrays:
            _check_pixels(f"{path}: {name}", pixels, labels)

    def examples(self, report: Report) -> Iterator[Example]:
        """See Source."""
        _bound(sum(len(pixels) for _, pixels, _ in self._arrays), self._path)
        for number, (name, _, labels) in enumerate(self._arrays):
            part = next((part for x, _, part in _PAIRS if x == name), "")
            for row, value in enumerate(_names_of(f"{self._path}: {name}", labels)):
                yield Example(self, (number, row), f"{name}[{row:09d}]", sys.intern(value), part)

    def load(self, key: Any, size: Size) -> NDArray[np.uint8]:
        """See Source."""
        number, row = key
        return from_array(self._arrays[number][1][row], size)

    def close(self) -> None:
        """See Source."""
        self._arrays = []

    def _of_npy(self, path: Path) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
        labels = {x: y for x, y, _ in _PAIRS}.get(path.stem)
        if labels is None or not (beside := path.with_name(f"{labels}.npy")).is_file():
            raise SpecError(
                f"{path}: an array of pixels is named x.npy, x_train.npy or x_test.npy, and its labels y….npy lie beside it"
            )
        return [(path.stem, _map(path), _map(beside))]

    def _of_npz(self, path: Path, scratch: Path) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
        found = []
        try:
            with zipfile.ZipFile(path) as file:
                sizes = {info.filename: info.file_size for info in file.infolist()}
                for x, y, _ in _PAIRS:
                    if {f"{x}.npy", f"{y}.npy"} <= sizes.keys():
                        pixels, labels = (self._unpack(file, f"{name}.npy", sizes, scratch) for name in (x, y))
                        found.append((x, pixels, labels))
        except (zipfile.BadZipFile, EOFError) as error:
            raise SpecError(f"{path} is no whole .npz file: {error}") from error
        if not found:
            raise SpecError(
                f"{path} has none of the pairs {', '.join(f'{x} and {y}' for x, y, _ in _PAIRS)}; found {list(sizes)}"
            )
        return found

    def _unpack(self, file: zipfile.ZipFile, name: str, sizes: dict[str, int], scratch: Path) -> NDArray[Any]:
        free = shutil.disk_usage(scratch).free
        if sizes[name] > free:
            raise SpecError(f"{self._path}: {name} has {sizes[name]:,} bytes unpacked; {scratch} has {free:,} free")
        target = scratch / f"{len(os.listdir(scratch)):04d}-{name}"
        with file.open(name) as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
        return _map(target)


def _map(path: Path) -> NDArray[Any]:
    try:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise SpecError(f"{path} is not an array file that can be mapped: {error}") from error
    return mapped


def _check_pixels(what: str, pixels: NDArray[Any], labels: NDArray[Any]) -> None:
    shaped = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] in (1, 3, 4))
    if pixels.dtype != np.uint8 or not shaped or 0 in pixels.shape[1:]:
        raise SpecError(
            f"{what} must be uint8 [images, height, width] or [images, height, width, 1, 3 or 4]; found {pixels.dtype} "
            f"{list(pixels.shape)}. Scale floats by 255; move channels to the end with x.transpose(0, 2, 3, 1)."
        )
    if labels.ndim not in (1, 2) or len(labels) != len(pixels) or labels.dtype.kind not in "iufUb":
        raise SpecError(
            f"{what} has {len(pixels)} images and labels {labels.dtype} {list(labels.shape)}; one for each is needed"
        )


def _names_of(what: str, labels: NDArray[Any]) -> list[str]:
    """Return the class of each row: its number, its text, or the place of the largest where there are several columns."""
    if labels.ndim == 2 and labels.shape[1] > 1:
        labels = labels.argmax(axis=1)
    if labels.dtype.kind == "f":
        if not np.array_equal(labels, np.rint(labels)):
            raise SpecError(f"{what}: labels are classes, as whole numbers, texts or one-hot rows; found {labels.flat[0]:g}, …")
        labels = labels.astype(np.int64)
    return [str(value) for value in labels.reshape(-1).tolist()]


def _placed(source: Source, found: list[tuple[str, Any]], report: Report) -> Iterator[Example]:
    """Yield the pictures among names and keys, in the order of names, with class and part as their folders say."""
    folders: dict[str, tuple[str, ...]] = {}
    pictures = []
    for name, key in sorted(found, key=itemgetter(0)):
        folder, _, file = name.replace("\\", "/").rpartition("/")
        if folder not in folders:
            folders[folder] = PurePosixPath(folder).parts
        hidden = any(part.startswith((".", "__MACOSX")) for part in (*folders[folder], file))
        if not hidden and PurePosixPath(file).suffix.lower() in SUFFIXES:
            pictures.append((folder, name, key))
    around = _around([folders[folder] for folder in {folder for folder, _, _ in pictures}])
    for folder, name, key in pictures:
        inner = folders[folder][around:]
        part = PARTS.get(inner[0].lower(), "") if len(inner) > 1 else ""
        label = inner[1 if part else 0] if inner else ""
        if label:
            yield Example(source, key, name, label, part)
        else:
            report(source.where, name, "lies in no folder that names its class")


def _around(folders: list[tuple[str, ...]]) -> int:
    """Return how many folders around everything say nothing: shared by all, with several folders inside."""
    depth = 0
    while folders and all(len(folder) > depth + 1 for folder in folders):
        outer, inner = ({folder[at] for folder in folders} for at in (depth, depth + 1))
        if len(outer) > 1 or outer.pop().lower() in PARTS or (len(inner) == 1 and inner.pop().lower() not in PARTS):
            break
        depth += 1
    return depth


def _refused(info: zipfile.ZipInfo) -> str:
    """Return why a member of a zip is not even looked at."""
    name = info.filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]:
        return "its name leads out of the archive"
    if info.flag_bits & 1:
        return "encrypted"
    if info.file_size > MAX_FILE_BYTES:
        return f"{info.file_size:,} bytes unpacked; at most {MAX_FILE_BYTES:,} are read"
    return ""


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_FILE_BYTES:
        raise BadImage(f"more than {MAX_FILE_BYTES:,} bytes")
    return content


def _bound(count: int, path: Path) -> None:
    if count > MAX_EXAMPLES:
        raise SpecError(f"{path} has more than {MAX_EXAMPLES:,} files; make several data sets of it")
