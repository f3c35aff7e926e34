"""Image files -> patches: the same pixels that transformers' image processor makes.

Files come from strangers: few formats are opened, none of which runs anything, the size is read
from the header before a pixel is decoded, and whatever the decoder raises is one error.

Shapes: S patches, C values of a patch.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import row_error
from ..model.processor import ImageSettings
from .file import MediaFile, name_of, told

MOST_PIXELS = 64_000_000
"""Decoded, an image of so many pixels takes 0.2 GB; one with transparency a few times that."""

_SMALL = 192  # pixels, the longer side of a thumbnail
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION, _ON_THEIR_SIDE = 0x0112, (5, 6, 7, 8)  # of EXIF
WANTED = "a JPEG, PNG, WebP, GIF, BMP or TIFF image that is whole"
_LEVELS = (np.arange(256) * (1 / 255)).astype(np.float32)


def seen_size(source: str | bytes) -> tuple[int, int]:
    """(width, height) of an image as it is seen: turned as its EXIF data say.

    All of it is decoded once.

    Raises:
        DataError: what is no image, not whole, or too large.
    """
    with _opened(source) as image:
        width, height = image.size
        image.draft(None, (width // 8, height // 8))  # a JPEG is decoded in small, and faster
        image.load()
        turned = image.getexif().get(_ORIENTATION) in _ON_THEIR_SIDE
    return (height, width) if turned else (width, height)


def grid(source: str | bytes, settings: ImageSettings) -> tuple[int, int]:
    """(columns, rows) of soft tokens of an image; errors as of `seen_size`."""
    return settings.grid(*seen_size(source))


def patches(file: MediaFile, settings: ImageSettings) -> tuple[np.ndarray, np.ndarray]:
    """Patches (S, C), float32 from 0 to 1, and the (x, y) of each (S, 2), in reading order.

    Transparent parts are white. An animation gives its first frame.
    """
    with _opened(file.path) as image:
        seen = upright_rgb(image)
        size = file.columns * settings.side, file.rows * settings.side
        if seen.size != size:
            seen = seen.resize(size, _PIL().Image.Resampling.BICUBIC)
        pixels = np.asarray(seen)
    p, columns, rows = settings.patch, size[0] // settings.patch, size[1] // settings.patch
    squares = pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4)
    y, x = np.divmod(np.arange(columns * rows), columns)
    return _LEVELS[squares.reshape(columns * rows, -1)], np.stack([x, y], axis=-1)


def upright_rgb(image: Any) -> Any:
    """A PIL image in RGB, turned as its EXIF data say, on white where it is transparent."""
    PIL = _PIL()
    image = PIL.ImageOps.exif_transpose(image)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("RGB")


def as_file(value: Any) -> bytes | None:
    """A PIL image as the content of a file that has the same pixels; None for anything else."""
    library = sys.modules.get("PIL.Image")  # whoever has such an image has imported it
    if library is None or not isinstance(value, library.Image):
        return None
    with told("image in the row", WANTED):
        file = io.BytesIO()
        upright_rgb(value).save(file, "PNG", compress_level=1)
        return file.getvalue()


def thumbnail(path: str) -> bytes:
    """A small JPEG of an image file, as it is seen.

    Raises:
        DataError: it cannot be read.
    """
    with _opened(path) as image, told(f"image {path}", WANTED):
        image.draft(None, (_SMALL, _SMALL))
        small, file = upright_rgb(image), io.BytesIO()
        small.thumbnail((_SMALL, _SMALL))
        small.save(file, "JPEG", quality=80)
        return file.getvalue()


@contextmanager
def _opened(source: str | bytes) -> Iterator[Any]:
    """A PIL image of which only the header was read."""
    what = f"image {name_of(source)}"
    with told(what, WANTED), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
        with _PIL().Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise row_error(
                    f"the {what} has {width:,} x {height:,} pixels",
                    f"at most {MOST_PIXELS:,} pixels",
                    "make it smaller, or remove the line",
                )
            yield image


def _PIL() -> Any:
    """Pillow, imported where the first image is met."""
    import PIL.Image
    import PIL.ImageOps

    return PIL
