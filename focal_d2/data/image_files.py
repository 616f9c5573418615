"""Image files: which formats are opened, how large an image may be, and what a header says."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import IO

from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from focal_d2.errors import describe_error, reason
from focal_d2.storage.files import open_data, read_file

# The formats of files that are read, by Pillow's names. Pillow goes by a file's content, not by its name, and
# knows some 40 more formats: for one of them (EPS) it starts a program. "JPEG" includes MPO, "PNG" APNG. The
# last two make Pillow import all of its plugins.
FILE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

# Endings of the files that folders of images are searched for.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_TILE_SIDES = 322, 323  # tags of TIFF: width and height

# Encoders write about 10 in a progressive JPEG. A scan of 120 bytes takes 6 ms in a picture of 9,000 × 9,000.
MOST_SCANS = 200
_SCAN = b"\xff\xda"  # starts one, and stands nowhere in its data

# What reading raises for files that are not such an image, or too large or damaged.
UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)

# How a file starts that Git LFS put in the place of a large one.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024  # bytes, as Git LFS has it

# Most bytes of an image's file: of each pixel, for four channels of 16 bits, and of all that is not pixels.
_BYTES_A_PIXEL, _BYTES_BESIDE = 8, 2**26


def why_unreadable(file_name: str, error: Exception) -> str:
    """Say in a few words why an image can't be read.

    Args:
        file_name: of the image.
        error: one of `UNREADABLE`.
    """
    with contextlib.suppress(OSError):  # a longer file, or what the error says
        if read_file(file_name, limit=_LONGEST_POINTER).startswith(LFS_POINTER):
            return "it is a Git LFS pointer, not the image itself: run `git lfs pull`"
    return reason(error)


def open_image_file(file_name: str, max_pixels: int | None) -> IO[bytes]:
    """Open the file of an image of at most so many pixels; None: as many as the process allows.

    Raises:
        OSError: if it can't be opened, is no regular file, or is longer than such an image can be.
    """
    most = max_pixels or Image.MAX_IMAGE_PIXELS or 0
    return open_data(file_name, limit=_BYTES_A_PIXEL * most + _BYTES_BESIDE)


def open_image(file: IO[bytes], *, max_pixels: int | None) -> Image.Image:
    """Open an image of one of `FILE_FORMATS`: its header is read, and nothing is decoded.

    No other code opens images: so nothing but these formats' decoders ever sees a file.

    Args:
        file: what it holds.
        max_pixels: most pixels that it may have; None: any, for a file of our own or one that is not decoded.

    Raises:
        OSError: and the others of `UNREADABLE`, if it is no such image, or a larger one.
    """
    if max_pixels is not None:
        allow_pixels(max_pixels)
    with pillow_errors():
        try:
            image = Image.open(file, formats=FILE_FORMATS)
        except UnidentifiedImageError as error:
            kinds = ", ".join(sorted(FILE_FORMATS))
            raise UnidentifiedImageError(f"not an image of a format that is read ({kinds})") from error
        except Image.DecompressionBombError as error:
            raise OSError(_too_large("its pixels are")) from error
        if max_pixels is not None:
            # Of a TIFF file, a tile is decoded whole, however little of it is in the image.
            tile = [getattr(image, "tag_v2", {}).get(tag, 0) for tag in _TILE_SIDES]
            for what, (width, height) in (("it has", image.size), ("its tiles have", tile)):
                if width * height > max_pixels:
                    raise OSError(_too_large(f"{what} {width} × {height} pixels,", f" {max_pixels}"))
            if image.info.get("progressive") and image.fp and _has_many_scans(image.fp):
                raise OSError(f"a JPEG of more than {MOST_SCANS} scans: save it again")
    return image


def _has_many_scans(file: IO[bytes]) -> bool:
    """Say whether a JPEG has more scans than any encoder writes: each decodes the whole picture."""
    place = file.tell()
    file.seek(0)
    number, before = 0, b""
    while number <= MOST_SCANS and (block := file.read(2**20)):
        number += (before + block).count(_SCAN)
        before = block[-1:]
    file.seek(place)
    return number > MOST_SCANS


def _too_large(what: str, limit: str = "") -> str:
    return (
        f"{what} more than INPUT.FOCAL.MAX_PIXELS{limit}: raise the key if the image is meant to be so large"
    )


def allow_pixels(most: int) -> None:
    """Raise Pillow's own limit, which holds for the whole process, to at least `most` pixels."""
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most


def check_for_detectron2(file_name: str, *, max_pixels: int | None) -> None:
    """Check a file that detectron2's own `read_image` will open, which takes any format of Pillow's.

    Raises:
        OSError: and the others of `UNREADABLE`, if `open_image` refuses it, or Pillow takes it for something
            else when it may choose.
    """
    with open_image_file(file_name, max_pixels) as file:
        kind = open_image(file, max_pixels=max_pixels).format
        file.seek(0)
        with pillow_errors():
            other = Image.open(file).format
    if other != kind:
        raise OSError(f"it is both {kind} and {other}")


@contextlib.contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn every error that Pillow raises for a file into one of `UNREADABLE`."""
    try:
        yield
    except (*UNREADABLE, MemoryError):
        raise
    except ValueError as error:
        raise OSError(str(error)) from error
    except Exception as error:
        raise OSError(describe_error(error)) from error


def upright_size(file_name: str) -> tuple[int, int]:
    """Return an image's height and width as `read_pixels` gives them, from its header.

    Raises:
        OSError: and the others of `UNREADABLE`, if it cannot be read.
    """
    with open_image_file(file_name, None) as file, open_image(file, max_pixels=None) as image:
        width, height = image.size
        orientation = None
        with contextlib.suppress(Exception):  # as in decode
            if isinstance(image, PngImagePlugin.PngImageFile):
                # Its `getexif` would decode all pixels to get to what follows them.
                image.load_prepare()
                image.load_end()
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)
