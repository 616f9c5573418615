"""Image files in, pictures with boxes out."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from focal_d2.data.image_files import IMAGE_SUFFIXES, UNREADABLE, why_unreadable
from focal_d2.data.pixels import ImageReader, write_image
from focal_d2.errors import UserError, reason

GREEN, YELLOW = (80, 255, 80), (0, 220, 255)  # BGR


def list_images(source: Path) -> list[Path]:
    """List the image files of a folder in order of name; a file stands for itself.

    Raises:
        UserError: if there is nothing there.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    if not source.is_dir():
        return [source]
    paths = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{source}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def picture_files(paths: list[Path], folder: Path) -> list[Path]:
    """Return the path of a PNG file in a folder for each image, and make the folder.

    Raises:
        UserError: if the folder cannot be made, or a picture would replace its image.
    """
    stems = Counter(p.stem for p in paths)
    # Images that differ only in their ending get it as part of the name. Images that differ only in their
    # folder are numbered.
    names = [p.stem if stems[p.stem] == 1 else p.name.replace(".", "_") for p in paths]
    times = Counter(names)
    nth: Counter[str] = Counter()
    for i, name in enumerate(names):
        if times[name] > 1:
            nth[name] += 1
            names[i] = f"{name}_{nth[name]}"
    targets = [folder / f"{name}.png" for name in names]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {folder}: {error}") from error
    images = {os.path.realpath(p) for p in paths}  # of a link to itself pathlib makes an error
    for target in targets:
        if os.path.realpath(target) in images:
            raise UserError(f"{target} would be overwritten: choose another output folder")
    return targets


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


def draw_boxes(image: np.ndarray, boxes: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Return a copy of a BGR image with boxes (M, 4) XYXY drawn in a BGR color."""
    canvas = np.ascontiguousarray(image).copy()
    thickness = max(1, round(min(image.shape[:2]) / 400))
    for x0, y0, x1, y1 in np.rint(boxes).astype(int).tolist():
        cv2.rectangle(canvas, (x0, y0), (x1, y1), color, thickness, cv2.LINE_AA)
    return canvas


def draw_detections(image: np.ndarray, boxes: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    """Draw detections in yellow, beside the ground truth in green if there is any.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (D, 4) XYXY.
        truth: (M, 4) XYXY, or None.
    """
    picture = draw_boxes(image, boxes, YELLOW)
    if truth is None:
        return picture
    gap = np.full((image.shape[0], 8, 3), 255, np.uint8)
    return np.hstack([draw_boxes(image, truth, GREEN), gap, picture])
