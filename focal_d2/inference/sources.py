"""Images as a predictor takes them: paths, arrays and Pillow images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from focal_d2.data.pictures import read_image
from focal_d2.data.pixels import ImageReader, from_array, from_pillow
from focal_d2.errors import UserError

# What a predictor takes as an image; an array as OpenCV reads it.
Source = str | Path | np.ndarray | Image.Image


def read_source(source: Source, reader: ImageReader) -> np.ndarray:
    """Return the pixels of an image (H, W, C) in the reader's format, as a file with them is read.

    Raises:
        UserError: if the file can't be read, or it is no image.
    """
    if isinstance(source, np.ndarray):
        return from_array(source, reader.image_format)
    if isinstance(source, Image.Image):
        return from_pillow(source, reader.image_format)
    if isinstance(source, (str, Path)):
        return read_image(source, reader)
    raise UserError(
        "an image must be the name of a file, an array of pixels or a Pillow image, not "
        f"{type(source).__name__}"
    )


def in_colours(source: Source, max_pixels: int | None = None) -> np.ndarray:
    """Return the pixels of an image (H, W, 3) uint8 in BGR order, for drawing.

    Args:
        source: the image.
        max_pixels: of a file; None: as many as the process allows.

    Raises:
        UserError: as `read_source`.
    """
    return read_source(source, ImageReader("BGR", "pil", max_pixels))
