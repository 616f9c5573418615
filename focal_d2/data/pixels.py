"""Pixels of image files for a network, read by Pillow or, faster, by OpenCV.

Images are (H, W, C) uint8 (of YUV-BT.601 float32), C-contiguous unless said otherwise. C is 3 where OpenCV is
used, else `FORMATS` has it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_image_to_rgb, convert_PIL_to_numpy
from PIL import Image

from focal_d2.data.image_files import UNREADABLE, open_image, open_image_file, pillow_errors
from focal_d2.data.opencv import OpenCVInput, decode, to_planes
from focal_d2.detectron2_compat import apply_exif_orientation
from focal_d2.errors import UserError, reason
from focal_d2.storage.files import create_file

# The values of INPUT.FORMAT and their numbers of channels. Of Pillow's other modes, detectron2 trains with
# those that have a fourth or an alpha channel (LA, RGBA, CMYK); resizing weighs the other channels by it.
FORMATS = {"BGR": 3, "RGB": 3, "L": 1, "HSV": 3, "YCbCr": 3, "YUV-BT.601": 3}


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
    with open_image_file(file_name, max_pixels) as file, pillow_errors():
        image = open_image(file, max_pixels=max_pixels)
        image.load()
        image = _to_8_bits(apply_exif_orientation(image))
    return _convert(image, image_format)


def from_pillow(image: Image.Image, image_format: str) -> np.ndarray:
    """Convert a Pillow image as a file with its pixels is read.

    Args:
        image: of any mode; it is turned as its EXIF data say.
        image_format: of `FORMATS`.

    Raises:
        UserError: if its pixels can't be decoded, or are not of 8 or 16 bits.
    """
    try:
        with pillow_errors():
            image.load()
            image = _to_8_bits(apply_exif_orientation(image))
    except UNREADABLE as error:
        raise UserError(f"cannot read the Pillow image: {reason(error)}") from error
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
    with create_file(path) as file:
        file.write(data.tobytes())


def to_rgb(image: np.ndarray, image_format: str) -> np.ndarray:
    """Convert an image (H, W, C) of a format to (H, W, 3) uint8 RGB, for drawing."""
    return np.rint(convert_image_to_rgb(image, image_format)).clip(0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ImageReader:
    """Decodes image files into network input, in the same way for training, evaluation and prediction."""

    image_format: str  # of `FORMATS`
    backend: str  # "pil" or "opencv"
    max_pixels: int | None  # of an image; larger ones are refused. None: as many as the process allows

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
    with open_image_file(file_name, max_pixels) as file:
        data = file.read()
    image = decode(data, max_pixels)
    if image is None:
        return read_with_pillow(file_name, image_format, max_pixels=max_pixels)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image) if image_format == "RGB" else image
