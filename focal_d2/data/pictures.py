"""Image files in, pictures out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from focal_d2.data.image_files import UNREADABLE, why_unreadable
from focal_d2.data.pixels import ImageReader, write_image
from focal_d2.errors import UserError, reason


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write a BGR picture.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        write_image(path, picture)
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


def read_image(path: str | Path, reader: ImageReader) -> np.ndarray:
    """Read an image as training does, EXIF orientation applied: (H, W, C) of the reader's format.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    try:
        return reader.read(os.path.expanduser(path))
    except UNREADABLE as error:
        raise UserError(f"cannot read image {path}: {why_unreadable(str(path), error)}") from error
