"""One picture's file as the array a model takes: decoded, cut, made smaller, converted. No threads, no models here.

JPEG is decoded by simplejpeg (libjpeg-turbo; extra `images`), everything else, and JPEG without it, by Pillow: the same
pixels but for rounding, measured at 1.6 times the time. Both give up Python's lock while they work, so threads decode in
parallel. The middle of the picture is cut out and resized in one step, bilinear, as Pillow does it.
Pictures come from strangers: every limit here is an error of that one picture, never of the process.
"""

from __future__ import annotations

import io
import logging
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tenure.errors import NotFound, SpecError
from tenure.serve.tensors import DTYPES, Array, ModelMetadata

MAX_FILE_BYTES = 64 << 20
MAX_PIXELS = 48_000_000
"""Of a picture as it is stored."""
LARGE_PIXELS = 4_000_000
"""Pictures above are decoded one at a time, so that memory does not grow with the number of threads."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What is decoded. Not everything that Pillow can: PostScript, for one, would start another program."""
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that a folder of pictures means."""
_EXIF_WITHIN = 4096
"""Bytes from a file's start within which cameras write their EXIF part."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's orientation to what sets the picture upright."""
_one_large = threading.Lock()

Normalisation = Literal["none", "unit", "signed", "imagenet"]
NORMALISATIONS: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "none": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    "unit": ((1 / 255, 1 / 255, 1 / 255), (0.0, 0.0, 0.0)),
    "signed": ((1 / 127.5, 1 / 127.5, 1 / 127.5), (-1.0, -1.0, -1.0)),
    "imagenet": (
        (1 / 255 / 0.229, 1 / 255 / 0.224, 1 / 255 / 0.225),
        (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
    ),
}
"""What a model that takes floats was trained on: value = pixel * factor + offset, per channel, pixel in 0..255.

none: 0 to 255. unit: 0 to 1. signed: -1 to 1 (TensorFlow's MobileNet, Inception). imagenet: unit, minus the mean, by the
standard deviation of ImageNet (torchvision's models).
"""


class BadImage(Exception):
    """A picture that is skipped. `str(error)` is the reason, one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How a picture becomes one row of a model's input."""

    height: int
    width: int
    channels_first: bool
    dtype: np.dtype[Any]
    normalise: Normalisation = "none"
    """Integers take none: UINT8 the pixels, INT8 the pixels less 128."""
    crop: float = 0.875
    """Part of the shorter side that is kept, in the middle: 224 of 256, as ImageNet's models are tested."""

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise SpecError(f"crop is the part of the shorter side to keep, above 0 and at most 1; found {self.crop!r}")
        if self.normalise not in NORMALISATIONS:
            raise SpecError(f"normalise is one of {', '.join(NORMALISATIONS)}; found {self.normalise!r}")
        if not (0 < self.height <= 8192 and 0 < self.width <= 8192):
            raise SpecError(f"height and width lie between 1 and 8192 pixels; found {self.height} x {self.width}")
        if self.dtype.kind != "f" and (self.normalise != "none" or self.dtype not in (np.uint8, np.int8)):
            raise SpecError(f"pixels become UINT8, INT8 or floats, integers without normalising; found {self.dtype}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one row."""
        return (3, self.height, self.width) if self.channels_first else (self.height, self.width, 3)


def preparation_for(
    metadata: ModelMetadata, *, normalise: Normalisation | None = None, crop: float = 0.875, size: int = 0
) -> Preparation:
    """Return how pictures become a model's input, found out from its metadata.

    normalise: must be said for a model that takes floats, as nothing in a model tells it. size: height and width, for a
    model that takes any. Raises SpecError when the model takes no pictures, or something has to be said.
    """
    if len(metadata.inputs) != 1 or len(metadata.inputs[0].shape) != 4:
        found = ", ".join(f"{each.name} {list(each.shape)}" for each in metadata.inputs)
        raise SpecError(f'model "{metadata.name}" takes no pictures: one input of rank 4 is needed; it takes {found}')
    meta = metadata.inputs[0]
    first, last = meta.shape[1] == 3, meta.shape[3] == 3
    if first == last:
        raise SpecError(f'input "{meta.name}" has no axis of 3 colours in second or last place; found {list(meta.shape)}')
    height, width = meta.shape[2:4] if first else meta.shape[1:3]
    if size and (height, width) != (size, size) and min(height, width) > 0:
        raise SpecError(f"the model takes pictures of {width} x {height} pixels; size {size} does not fit")
    height, width = (size or each if each < 0 else each for each in (height, width))
    if min(height, width) < 1:
        raise SpecError(f'input "{meta.name}" takes pictures of any size, {list(meta.shape)}: say which, size=224 say')
    dtype = DTYPES[meta.datatype]
    if dtype.kind == "f" and normalise is None:
        raise SpecError(
            f'input "{meta.name}" takes {meta.datatype}, and a model does not tell how its pixels were normalised: '
            f"say normalise={' or '.join(NORMALISATIONS)}"
        )
    return Preparation(height=height, width=width, channels_first=first, dtype=dtype, normalise=normalise or "none", crop=crop)


def pictures_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the picture files of a folder, in order of their names. Raises NotFound when there is none."""
    try:
        inside = sorted(entry.path for entry in os.scandir(folder) if os.path.splitext(entry.name)[1].lower() in ENDINGS)
    except OSError as error:
        raise NotFound(f"the folder {os.fspath(folder)} cannot be read: {error.strerror}") from error
    if not inside:
        raise NotFound(f"the folder {os.fspath(folder)} holds no picture ({', '.join(ENDINGS)})")
    return inside


def read_into(row: Array, path: str, how: Preparation) -> None:
    """Read a picture's file into one row of a model's input. Raises BadImage, with the reason."""
    fill(row, decode(read_file(path), how), how)


def read_file(path: str) -> bytes:
    """Return a picture's file as it is. Raises BadImage, with the reason."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise BadImage(f"the file has {size} bytes; at most {MAX_FILE_BYTES} are read")
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadImage(error.strerror or str(error)) from error


def decode(content: bytes, how: Preparation) -> Array:
    """Return the middle of a picture at the model's size: uint8 [height, width, 3], red first.

    Turned as its EXIF says; what is transparent becomes white; gray and CMYK become colours. Raises BadImage.
    """
    try:
        if content.startswith(b"\xff\xd8") and (jpeg := _decoded_jpeg(content, how)) is not None:
            return _cut(jpeg, how)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(*image.size)
            if image.width * image.height > LARGE_PIXELS:
                with _one_large:
                    return _cut(_colours(image), how)
            return _cut(_colours(image), how)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"no picture that can be read ({', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise BadImage("not enough memory to decode it") from error
    except Exception as error:  # decoders of hostile bytes raise anything: struct.error, KeyError, SyntaxError, …
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def fill(row: Array, pixels: Array, how: Preparation) -> None:
    """Convert uint8 [height, width, 3] into one row of a model's input."""
    planes = np.moveaxis(pixels, 2, 0) if how.channels_first else pixels
    if how.dtype == np.uint8:
        row[...] = planes
    elif how.dtype == np.int8:
        np.subtract(planes, 128, out=row, casting="unsafe", dtype=np.int16)
    else:
        factors, offsets = (np.array(each, np.float32) for each in NORMALISATIONS[how.normalise])
        if how.channels_first:
            factors, offsets = factors[:, None, None], offsets[:, None, None]
        np.multiply(planes, factors, out=row, casting="unsafe", dtype=np.float32)
        row += offsets.astype(row.dtype)


def _decoded_jpeg(content: bytes, how: Preparation) -> Image.Image | None:
    """Return a JPEG decoded by simplejpeg, or None where Pillow must do it.

    A picture four times as large as needed is made smaller while it is decoded, never below twice: labels stay.
    """
    simplejpeg = _simplejpeg()
    if simplejpeg is None:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise BadImage(f"no JPEG that can be read: {error}") from error
    _check_size(width, height)
    if colours == "CMYK":
        return None
    needed = 2 * max(how.height, how.width) / how.crop / min(height, width)
    smallest: dict[str, float] = {}
    if needed <= 0.5:
        smallest = {"min_height": math.ceil(height * needed), "min_width": math.ceil(width * needed), "min_factor": 2.0}
    if height * width > LARGE_PIXELS:
        with _one_large:
            pixels = _called(simplejpeg, content, smallest)
    else:
        pixels = _called(simplejpeg, content, smallest)
    turn = _TURNS.get(_orientation(content))
    image = Image.fromarray(pixels)
    return image if turn is None else image.transpose(turn)


def _orientation(content: bytes) -> int:
    if b"Exif\x00" not in content[:_EXIF_WITHIN]:
        return 1
    with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def _called(simplejpeg: ModuleType, content: bytes, smallest: dict[str, float]) -> Array:
    try:
        pixels: Array = simplejpeg.decode_jpeg(content, "RGB", **smallest)
    except ValueError as error:
        raise BadImage(f"a broken JPEG: {error}") from error
    return pixels


def _colours(image: Image.Image) -> Image.Image:
    if image.format == "JPEG":
        image.draft("RGB", image.size)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    elif image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("RGB")


def _cut(image: Image.Image, how: Preparation) -> Array:
    """Return the middle at the model's size: cutting and resizing in one step."""
    scale = min(image.width / how.width, image.height / how.height) * how.crop
    width, height = how.width * scale, how.height * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((how.width, how.height), Image.Resampling.BILINEAR, box=box))


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")


_found: list[ModuleType | None] = []


def _simplejpeg() -> ModuleType | None:
    """Return simplejpeg, or None where it is not installed; says so once."""
    if not _found:
        try:
            import simplejpeg  # optional: the extra `images`
        except ImportError:
            logging.getLogger(__name__).warning(
                'JPEG is decoded by Pillow, at 1.6 times the time: simplejpeg is not installed (pip install "tenure[images]")'
            )
            _found.append(None)
        else:
            _found.append(simplejpeg)
    return _found[0]
