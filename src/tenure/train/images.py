"""One picture of whatever kind, as pixels of one size: uint8 [height, width, 3]; or the reason why it cannot be used.

Pictures come from strangers: every limit here is an error of that one picture, never of the process. Large ones are decoded
one at a time, so that memory does not grow with the number of threads. Not here: where pictures come from (`sources`), what is
made of them (`dataset`).
"""

from __future__ import annotations

import contextlib
import io
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 32_000_000
"""Of a picture before it is made smaller: up to 13 bytes for each while it is decoded, 416 MB."""
MAX_JPEG_PIXELS = 48_000_000
"""Of a JPEG, which is made smaller while it is decoded: up to 10 bytes for each, where it is progressive."""
MAX_FILE_BYTES = 64 << 20
"""Of one picture's file."""
LARGE_PIXELS = 4_000_000
"""Pictures above are decoded one at a time."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What is decoded. Not everything that Pillow can: PostScript, for one, would start another program."""
_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")
"""Modes of 16 bits a pixel."""
_one_large = threading.Lock()

Size = tuple[int, int]
"""Width and height in pixels."""


class BadImage(Exception):
    """A picture that is skipped. `str(error)` is the reason, one line."""


def decode(content: bytes, size: Size) -> NDArray[np.uint8]:
    """Return the middle of a picture, shrunk or grown to `size` (bilinear): uint8 [height, width, 3], red first.

    Turned as its EXIF says; what is transparent becomes white; 16 bits become 8; gray and CMYK become colours.
    Raises BadImage: not a picture, torn, animated, or too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _pixels(image, size)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"no picture that can be read ({', '.join(FORMATS)})") from error
    except MemoryError as error:
        raise BadImage("not enough memory to decode it") from error
    except Exception as error:  # decoders of hostile bytes raise anything: struct.error, KeyError, SyntaxError, …
        raise BadImage(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def from_array(pixels: NDArray[Any], size: Size) -> NDArray[np.uint8]:
    """Return an array's row as `decode` returns a file. pixels: uint8 [height, width], or with 1, 3 or 4 channels last."""
    plain = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return _fit(_colours(Image.fromarray(np.ascontiguousarray(plain))), size)


def _pixels(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    width, height = image.size
    most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
    if width * height > most:
        raise BadImage(f"{width} x {height} pixels; at most {most:,} of {image.format} are decoded")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # cameras append a preview as a second picture
        raise BadImage(f"animated or of several pages ({getattr(image, 'n_frames', 0)})")
    image.draft("RGB", (2 * size[0], 2 * size[1]))  # JPEG alone: decodes at an eighth where that is enough
    with _one_large if width * height > LARGE_PIXELS else contextlib.nullcontext():
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _fit(_colours(image), size)


def _colours(image: Image.Image) -> Image.Image:
    if image.mode in _WIDE:
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("pixels of floating point, whose range nobody says")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        over = image if image.mode == "RGBA" else image.convert("RGBA")
        under = Image.new("RGB", over.size, (255, 255, 255))
        under.paste(over, mask=over.getchannel("A"))
        return under
    return image if image.mode == "RGB" else image.convert("RGB")


def _fit(image: Image.Image, size: Size) -> NDArray[np.uint8]:
    if image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.uint8)
