"""Image files to pixels; with `INPUT.FOCAL.BACKEND: opencv` also to other sizes and to tensors.

Images are (H, W, C) uint8 (of YUV-BT.601 float32), C-contiguous unless said otherwise. C is 3 where OpenCV is
used, else `FORMATS` has it.

How far OpenCV is from Pillow, in grey levels, on two photographs and 8 aerial tiles, at 11 scales from
0.25 to 2.5: decoding 0; enlarging at most 1, on average 0.17 to 0.31; shrinking at most 2, on average below
0.08.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import (
    _apply_exif_orientation,
    convert_image_to_rgb,
    convert_PIL_to_numpy,
)
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from focal_d2.errors import UserError

# The values of INPUT.FORMAT and their numbers of channels. Of Pillow's other modes, detectron2 trains with
# those that have a fourth or an alpha channel (LA, RGBA, CMYK); resizing weighs the other channels by it.
FORMATS = {"BGR": 3, "RGB": 3, "L": 1, "HSV": 3, "YCbCr": 3, "YUV-BT.601": 3}

# The formats of files that are read, by Pillow's names. Pillow goes by a file's content, not by its name, and
# knows some 40 more formats: for one of them (EPS) it starts a program. "JPEG" includes MPO, "PNG" APNG. The
# last two make Pillow import all of its plugins.
FILE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

# Endings of the files that folders of images are searched for.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_TILE_SIDES = 322, 323  # tags of TIFF: width and height

# What reading raises for files that are not such an image, or too large or damaged.
UNREADABLE = (OSError, SyntaxError, struct.error, Image.DecompressionBombError)

# How a file starts that Git LFS put in the place of a large one.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# EXIF orientation: what brings the picture upright.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}

_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
# Any marker but those that may stand in a scan: FF00 is a byte of data, FFD0 to FFD7 restart the decoder.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

# Chunks of PNG files that change no pixel in either library.
_PNG_CHUNKS = frozenset(b"IHDR IDAT IEND bKGD cHRM gAMA iCCP pHYs sBIT sRGB tEXt tIME".split())
# Texts in which Pillow looks for an orientation.
_PNG_ORIENTATION_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")


def why_unreadable(file_name: str, error: Exception) -> str:
    """Say in a few words why an image can't be read.

    Args:
        file_name: of the image.
        error: one of `UNREADABLE`.
    """
    try:
        if os.path.isfile(file_name):
            with open(file_name, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return "it is a Git LFS pointer, not the image itself: run `git lfs pull`"
    except OSError:
        pass  # the error says so
    return getattr(error, "strerror", None) or str(error)


def open_image(file: str | IO[bytes], *, max_pixels: int | None) -> Image.Image:
    """Open an image of one of `FILE_FORMATS`: its header is read, and nothing is decoded.

    No other code opens images: so nothing but these formats' decoders ever sees a file.

    Args:
        file: its name, or what it holds.
        max_pixels: most pixels that it may have; None: any, for a file of our own or one that is not decoded.

    Raises:
        OSError: and the others of `UNREADABLE`, if it is no such image, or a larger one.
    """
    if max_pixels is not None:
        allow_pixels(max_pixels)
    with _pillow_errors():
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
    return image


def _too_large(what: str, limit: str = "") -> str:
    return (
        f"{what} more than INPUT.FOCAL.MAX_PIXELS{limit}: raise the key if the image is meant to be so large"
    )


def allow_pixels(most: int) -> None:
    """Let Pillow open images of so many pixels: it has a limit of its own, for the whole process."""
    if Image.MAX_IMAGE_PIXELS is not None and most > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = most


def check_for_detectron2(file_name: str, *, max_pixels: int) -> None:
    """Check a file that detectron2's own `read_image` will open, which takes any format of Pillow's.

    Raises:
        OSError: and the others of `UNREADABLE`, if `open_image` refuses it, or Pillow takes it for something
            else when it may choose.
    """
    with PathManager.open(file_name, "rb") as file:
        kind = open_image(file, max_pixels=max_pixels).format
        file.seek(0)
        with _pillow_errors():
            other = Image.open(file).format
    if other != kind:
        raise OSError(f"it is both {kind} and {other}")


def read_with_pillow(file_name: str, image_format: str, *, max_pixels: int | None) -> np.ndarray:
    """Read an image as detectron2's `read_image` does, but for three kinds of file that it reads wrong.

    Grey pictures of 16 bits are v >> 8, as OpenCV's 8 bits are (detectron2: all above 255 is white). TIFF
    files are turned once as EXIF says (detectron2 turns them again after Pillow has). PNG files with broken
    data are refused (detectron2 takes what could be decoded).

    Args:
        file_name: of the image.
        image_format: of `FORMATS`.
        max_pixels: see `open_image`.

    Raises:
        OSError: and the others of `UNREADABLE`, if it cannot be read or its values are not of 8 or 16 bits.
    """
    with PathManager.open(file_name, "rb") as file, _pillow_errors():
        image = open_image(file, max_pixels=max_pixels)
        image.load()
        image = _to_8_bits(_apply_exif_orientation(image))
    return _convert(image, image_format)


def _convert(image: Image.Image, image_format: str) -> np.ndarray:
    if image_format == "HSV":
        image = image.convert("RGB")  # Pillow cannot convert all modes to HSV
    pixels = convert_PIL_to_numpy(image, image_format)
    # detectron2's is float64, which no network with weights in float32 takes.
    return pixels.astype(np.float32) if image_format == "YUV-BT.601" else pixels


def from_array(image: np.ndarray, image_format: str) -> np.ndarray:
    """Convert an array as OpenCV reads images; a file with the same pixels gives the same.

    Args:
        image: (H, W, 3) uint8 in BGR order, or (H, W) or (H, W, 1) uint8 grey.
        image_format: of `FORMATS`.

    Returns:
        (H, W, C), which may share memory with `image` and need not be contiguous.

    Raises:
        UserError: for another shape or type.
    """
    shape = image.shape if image.ndim == 3 else (*image.shape, 1)
    if image.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3) or not image.size:
        raise UserError(
            "an image must be (H, W, 3) uint8 in BGR order or (H, W) uint8 grey, not "
            f"{image.shape} {image.dtype}"
        )
    image = image.reshape(shape)
    if (shape[2], image_format) in ((3, "BGR"), (1, "L")):
        return image
    return _convert(Image.fromarray(image[:, :, 0] if shape[2] == 1 else image[:, :, ::-1]), image_format)


def write_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write an image (H, W, 3) uint8 BGR, or (H, W) grey, in the format that the file's ending names.

    OpenCV encodes only: its `imwrite` crashes the process for a name that is not UTF-8.

    Raises:
        OSError: if the file cannot be written.
    """
    _, data = cv2.imencode(os.path.splitext(path)[1], image)
    with open(path, "wb") as file:
        file.write(data.tobytes())


def to_rgb(image: np.ndarray, image_format: str) -> np.ndarray:
    """Convert an image (H, W, C) of a format to (H, W, 3) uint8 RGB, for drawing."""
    return np.rint(convert_image_to_rgb(image, image_format)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ImageReader:
    """What makes pixels of image files for a network, in training, evaluation and prediction alike."""

    image_format: str  # of `FORMATS`
    backend: str  # "pil" or "opencv"
    max_pixels: int  # of an image; larger ones are refused

    def read(self, file_name: str) -> np.ndarray:
        """Read a file; see `read_with_pillow` and `read_pixels`."""
        read = read_pixels if self.backend == "opencv" else read_with_pillow
        return read(file_name, self.image_format, max_pixels=self.max_pixels)

    def augmentation_input(self, image: np.ndarray) -> T.AugInput:
        """Wrap an image (H, W, C) for detectron2's augmentations."""
        return OpenCVInput(image) if self.backend == "opencv" else T.AugInput(image)

    def to_tensor(self, image: np.ndarray) -> torch.Tensor:
        """Copy an image (H, W, C) to a tensor (C, H, W)."""
        if self.backend == "opencv":
            return to_planes(image)
        return torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))


@contextlib.contextmanager
def _pillow_errors() -> Iterator[None]:
    """Make `UNREADABLE` of all that Pillow raises for a file; its readers raise many kinds."""
    try:
        yield
    except (*UNREADABLE, MemoryError):
        raise
    except ValueError as error:
        raise OSError(str(error)) from error
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise OSError("its pixels are floating-point numbers (mode F); 8 or 16 bits are read")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise OSError(f"its pixels are {values.min()} to {values.max()}; 8 or 16 bits are read")
    return Image.fromarray((values >> 8).astype(np.uint8))


def read_pixels(file_name: str, image_format: str, *, max_pixels: int | None) -> np.ndarray:
    """Read an image as `read_with_pillow` does, faster.

    OpenCV decodes JPEG and PNG files that are whole, of 8 bits, grey or RGB; the others are Pillow's: other
    formats, transparency, palettes, CMYK, 16 bits, and broken files, which it refuses.

    Args:
        file_name: of the image.
        image_format: "BGR" or "RGB".
        max_pixels: see `open_image`.

    Raises:
        OSError: and the others of `UNREADABLE`, if it cannot be read.
    """
    with PathManager.open(file_name, "rb") as file:
        data = file.read()
    image = _decode(data, max_pixels)
    if image is None:
        return read_with_pillow(file_name, image_format, max_pixels=max_pixels)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if image_format == "RGB" else image


def upright_size(file_name: str) -> tuple[int, int]:
    """Return an image's height and width as `read_pixels` gives them, from its header.

    Raises:
        OSError: and the others of `UNREADABLE`, if it cannot be read.
    """
    with open_image(file_name, max_pixels=None) as image:
        width, height = image.size
        orientation = None
        with contextlib.suppress(Exception):  # as in _decode
            if isinstance(image, PngImagePlugin.PngImageFile):
                # Its `getexif` would decode all pixels to get to what follows them.
                image.load_prepare()
                image.load_end()
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


def _decode(data: bytes, max_pixels: int | None) -> np.ndarray | None:
    """Decode a plain JPEG or PNG file to BGR; None if it is none."""
    try:
        header = open_image(io.BytesIO(data), max_pixels=max_pixels)
    except UNREADABLE:
        return None
    # OpenCV asks its decoder of AVIF first, which looks for letters there.
    if header.mode not in ("L", "RGB") or data[4:8].isalpha():
        return None
    orientation = None
    if header.format == "JPEG" and _is_whole_jpeg(data, progressive="progressive" in header.info):
        # Broken EXIF raises many kinds; detectron2, too, goes on without.
        with contextlib.suppress(Exception):
            orientation = header.getexif().get(ExifTags.Base.Orientation)
    elif not (header.format == "PNG" and _is_plain_png(data)):
        return None
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return _UPRIGHT[orientation](image) if image is not None and orientation in _UPRIGHT else image


def _is_whole_jpeg(data: bytes, progressive: bool) -> bool:
    """Whether the data end where they should.

    A scan with another marker inside is broken: Pillow refuses it, OpenCV makes the rest grey. In progressive
    files, which have many scans, OpenCV finds that itself.
    """
    if progressive or not data.endswith(_JPEG_END):
        return data.endswith(_JPEG_END)
    position = 2
    while data[position : position + 2] not in (_JPEG_SCAN, b""):
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    end = _JPEG_MARKER.search(data, position + 2)
    return end is not None and end.start() == len(data) - 2


def _is_plain_png(data: bytes) -> bool:
    """Whether the file has 8 bits a channel, no transparency, animation or orientation, and an end."""
    if data[24] != 8:
        return False
    position = 8
    while (name := data[position + 4 : position + 8]) in _PNG_CHUNKS:
        if name == b"IEND":
            return True
        if name == b"tEXt" and data.startswith(_PNG_ORIENTATION_TEXTS, position + 8):
            return False
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize bilinearly as Pillow does: smoothed where it shrinks.

    OpenCV has no such filter (at two thirds of a photograph's size INTER_LINEAR is up to 43 grey levels off,
    INTER_AREA 20 and slower); PyTorch has.
    """
    if (height, width) == image.shape[:2]:
        return image
    if height >= image.shape[0] and width >= image.shape[1]:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    # The batch of one comes before the turn: so PyTorch takes the memory for NHWC and returns NHWC.
    images = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    images = torch.nn.functional.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(images[0].permute(1, 2, 0).numpy())


def to_planes(image: np.ndarray) -> torch.Tensor:
    """Copy an image to a tensor (3, H, W)."""
    planes = np.empty((3, *image.shape[:2]), image.dtype)
    cv2.split(image, [*planes])
    return torch.from_numpy(planes)


class OpenCVInput(T.AugInput):
    """detectron2's `AugInput`, with its own ways to resize and flip.

    detectron2's augmentations draw, and its transforms move the boxes, as ever.
    """

    def __init__(self, image: np.ndarray, *, boxes: np.ndarray | None = None) -> None:
        """Take an image (H, W, 3) uint8 of any memory layout, and boxes (M, 4) XYXY for those that ask."""
        self.image: np.ndarray
        self.boxes: np.ndarray | None
        super().__init__(np.require(image, requirements=["C_CONTIGUOUS", "WRITEABLE"]), boxes=boxes)

    def transform(self, tfm: T.Transform) -> None:
        """Apply a transform to image and boxes, in place."""
        if isinstance(tfm, T.ResizeTransform) and tfm.interp == Image.Resampling.BILINEAR:
            self.image = resize(self.image, tfm.new_h, tfm.new_w)
        elif isinstance(tfm, T.HFlipTransform):
            # NumPy's flip is a view, on which all that follows is slow.
            self.image = cv2.flip(self.image, 1)
        elif isinstance(tfm, T.VFlipTransform):
            self.image = cv2.flip(self.image, 0)
        else:
            self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
