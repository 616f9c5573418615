"""OpenCV's part of `INPUT.FOCAL.BACKEND: opencv`: decoding plain JPEG and PNG files, resizing, flipping.

Images are (H, W, 3) uint8, C-contiguous unless said otherwise.

How far OpenCV is from Pillow, in grey levels, on two photographs and 8 aerial tiles, at 11 scales from
0.25 to 2.5: decoding 0; enlarging at most 1, on average 0.17 to 0.31; shrinking at most 2, on average below
0.08.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import ExifTags, Image

from focal_d2.data.image_files import UNREADABLE, open_image

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


def decode(data: bytes, max_pixels: int | None) -> np.ndarray | None:
    """Decode a plain JPEG or PNG file to BGR; return None for any other file."""
    try:
        header = open_image(io.BytesIO(data), max_pixels=max_pixels)
    except UNREADABLE:
        return None
    # OpenCV asks its decoder of AVIF first, which looks for letters there.
    if header.mode not in ("L", "RGB") or data[4:8].isalpha():
        return None
    orientation = None
    if header.format == "JPEG" and _is_whole_jpeg(data, progressive="progressive" in header.info):
        # Broken EXIF raises many kinds of errors. detectron2 also continues without it.
        with contextlib.suppress(Exception):
            orientation = header.getexif().get(ExifTags.Base.Orientation)
    elif not (header.format == "PNG" and _is_plain_png(data)):
        return None
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    return _UPRIGHT[orientation](image) if image is not None and orientation in _UPRIGHT else image


def _is_whole_jpeg(data: bytes, progressive: bool) -> bool:
    """Return whether a JPEG file is complete and has one undamaged scan.

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
    """Return whether a PNG file is complete, of 8 bits, without transparency, animation and orientation."""
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
