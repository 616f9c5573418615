"""Frames of videos, and videos of pictures. OpenCV's FFmpeg decodes and encodes them in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from focal_d2.errors import UserError, reason
from focal_d2.storage.files import check_regular, open_file

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
LARGEST_VIDEO = 2**40  # bytes; it is not read into memory

# How such files begin, from a byte on. FFmpeg looks at the content, not at the name, and a playlist would let
# it open other files and addresses.
_BEGINNINGS = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (4, b"wide"), (4, b"free"), (0, b"\x1a\x45\xdf\xa3"))
_LONGEST_BEGINNING = 12
# Of the frames that a file announces, the share that is missing where they were only counted wrongly.
_MAY_BE_MISSING = 0.02
_USUAL_RATE = 25.0  # frames a second, of a file that does not say


class Frame(NamedTuple):
    """A picture of a video."""

    number: int  # from 0
    seconds: float  # since the beginning
    pixels: np.ndarray  # (H, W, 3) uint8 BGR, upright


def is_video(path: str) -> bool:
    """Return whether the name of a file is that of a video."""
    return path.lower().endswith(VIDEO_SUFFIXES)


class Video:
    """A video file, open for reading."""

    def __init__(self, path: str, *, max_pixels: int) -> None:
        """Open a file.

        Args:
            path: of an AVI, Matroska, MP4, QuickTime or WebM file.
            max_pixels: most pixels that its frames may have.

        Raises:
            UserError: if it can't be opened, is no such file, or its frames are larger.
        """
        try:
            with open_file(path, limit=LARGEST_VIDEO) as file:
                start = file.read(_LONGEST_BEGINNING)
        except OSError as error:
            raise UserError(f"cannot read video {path}: {reason(error)}") from error
        known = any(start[place:].startswith(text) for place, text in _BEGINNINGS)
        if not known and not (start.startswith(b"RIFF") and start.endswith(b"AVI ")):
            raise UserError(
                f"cannot read video {path}: its content is not of a format that is read (AVI, Matroska, MP4, "
                "QuickTime, WebM)"
            )
        self.path = path
        self._capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)
        width, height = (
            int(self._capture.get(x)) for x in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if not self._capture.isOpened() or width < 1 or height < 1:
            raise UserError(f"cannot read video {path}: damaged, or coded in a way that OpenCV does not know")
        if width * height > max_pixels:
            raise UserError(
                f"cannot read video {path}: its frames have {width} × {height} pixels, more than "
                f"INPUT.FOCAL.MAX_PIXELS {max_pixels}"
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate < 1000 else _USUAL_RATE
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(announced) if 0 < announced < 2**31 else 0  # 0: the file does not say

    def frames(self) -> Iterator[Frame]:
        """Yield the frames in order.

        Raises:
            UserError: at the end, if the file is cut short.
        """
        number = 0
        while True:
            good, pixels = self._capture.read()
            if not good:
                break
            yield Frame(number, number / self.rate, pixels)
            number += 1
        self._capture.release()
        if number < (1 - _MAY_BE_MISSING) * self.announced - 1 or not number:
            raise UserError(
                f"cannot read video {self.path} to its end: {number} of {self.announced} frames are readable"
            )


class VideoWriter:
    """An MP4 file of pictures, which is opened with the first."""

    def __init__(self, path: Path, rate: float) -> None:
        """Say where, and how many frames a second."""
        self._path, self._rate = path, rate
        self._writer: cv2.VideoWriter | None = None

    def write(self, picture: np.ndarray) -> None:
        """Add a picture (H, W, 3) uint8 BGR; all have one size.

        Raises:
            UserError: if the file can't be written.
        """
        if self._writer is None:
            height, width = picture.shape[:2]
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                check_regular(self._path)
            except OSError as error:
                raise UserError(f"cannot write {self._path}: {reason(error)}") from error
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(
                os.path.abspath(self._path), cv2.CAP_FFMPEG, code, self._rate, (width, height)
            )
            if not self._writer.isOpened():
                raise UserError(f"cannot write {self._path}: OpenCV can't encode {width} × {height} pixels")
        self._writer.write(picture)

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            self._writer.release()
