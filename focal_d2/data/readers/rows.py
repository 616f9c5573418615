"""Images and boxes that become a `Table`, for formats that name classes by text (csv, voc)."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.readers.image_folder import ImageFolder, image_size, no_folder
from focal_d2.data.readers.texts import short
from focal_d2.errors import UserError, first_few

# Larger numbers are no pixels: they overflow where sizes are multiplied.
MOST_PIXELS = 2**24


class Box(NamedTuple):
    """One object of an image, before its class has a number."""

    corners: tuple[float, float, float, float]  # left, top, width, height, pixels
    name: str  # of its class
    ignored: bool
    item: str  # where it stands, for messages


def corner_problem(corners: Sequence[float]) -> str | None:
    """Say what is wrong with a box (left, top, width, height), or None."""
    if not all(math.isfinite(x) for x in corners):
        return "a coordinate that is not a number or infinite"
    if min(corners[2:]) < 0:
        return "a negative width or height"
    if max(map(abs, corners)) > MOST_PIXELS:
        return f"a coordinate beyond {MOST_PIXELS} pixels"
    return None


class Rows:
    """Images and boxes on their way into a `Table`, for formats that name classes by text."""

    def __init__(self, images: ImageFolder, classes: Sequence[str] | None, source: str) -> None:
        """Start with nothing.

        Args:
            images: the folder of the images.
            classes: the class names, or None to take those that occur.
            source: the file or folder of the annotations, for messages.
        """
        if not os.path.isdir(images.root):
            raise UserError(f"IMAGES: {images.root}: {no_folder(images.root)}")
        self.images, self.classes, self.source = images, classes, source
        self.problems: list[str] = []
        self._known = frozenset(classes or ())
        self._images: dict[str, tuple[int, int]] = {}
        self._boxes: dict[str, list[Box]] = {}

    def problem(self, item: str, text: str) -> None:
        """Note what is wrong with an item."""
        self.problems.append(f"{item}: {text}")

    def add_image(self, name: str, item: str, size: tuple[int, int] | None = None) -> tuple[int, int] | None:
        """Add an image, or add to one.

        Args:
            name: of its file, under the root.
            item: where it is named.
            size: height and width as annotated; None to read them from the file.

        Returns:
            Its size, or None if it was set aside.
        """
        path, refused = self.images.path(name)
        if path is None:
            self.problem(item, f"the image {refused}")
            return None
        if path not in self._images:
            if size is None:
                try:
                    size = image_size(path)
                except UserError as error:
                    self.problem(item, f"{error}{self.images.hint(path)}")
                    return None
            if not all(0 < x <= MOST_PIXELS for x in size):
                self.problem(item, f"the image {path} has the height and width {size}")
                return None
            self._images[path] = size
            self._boxes[path] = []
        return self._images[path]

    def add_box(self, name: str, box: Box) -> None:
        """Add a box to an image that was added."""
        wrong = corner_problem(box.corners)
        if wrong:
            self.problem(
                box.item, f"the box {short(list(box.corners))} (left, top, width, height) has {wrong}"
            )
        elif not box.name.strip():
            self.problem(box.item, "no class name")
        elif self.classes is not None and box.name not in self._known:
            self.problem(
                box.item, f'the class "{short(box.name)[1:-1]}" is not one of {first_few(self.classes)}'
            )
        else:
            path, _ = self.images.path(name)
            assert path is not None
            self._boxes[path].append(box)

    def __contains__(self, name: str) -> bool:
        return self.images.path(name)[0] in self._images

    def names(self) -> set[str]:
        """Return the classes of the boxes so far."""
        return {box.name for boxes in self._boxes.values() for box in boxes}

    def table(self) -> Table:
        """Return what was added, images in order of name.

        Raises:
            UserError: if there is no image, or no class.
        """
        paths = sorted(self._images)
        if not paths:
            reason = f": {self.problems[0]}" if self.problems else ""
            raise UserError(f"{self.source}: no images in it{reason}")
        rows = [(i, box) for i, path in enumerate(paths) for box in self._boxes[path]]
        classes = self.classes
        if classes is None:
            classes = sorted(self.names(), key=_number_first)
        if not classes:
            reason = f": {self.problems[0]}" if self.problems else ": name them with CLASSES"
            raise UserError(f"{self.source}: no boxes, so no class names{reason}")
        label_of = {name: k for k, name in enumerate(classes)}
        boxes = np.array([box.corners for _, box in rows], dtype=np.float64).reshape(-1, 4)
        return Table(
            classes=tuple(classes),
            category_ids=tuple(range(1, len(classes) + 1)),
            file_names=paths,
            image_ids=np.arange(1, len(paths) + 1),
            sizes=np.array([self._images[path] for path in paths], dtype=np.int64).reshape(-1, 2),
            image=np.array([i for i, _ in rows], dtype=np.int64),
            boxes=boxes,
            labels=np.array([label_of[box.name] for _, box in rows], dtype=np.int64),
            ignored=np.array([box.ignored for _, box in rows], dtype=bool),
            areas=boxes[:, 2] * boxes[:, 3],
            problems=self.problems,
        )


def _number_first(name: str) -> tuple[bool, int, str]:
    """Sort numbers by value, before names."""
    # Nobody counts classes with more digits, and Python refuses to read thousands of them.
    return (False, int(name), name) if name.isdecimal() and len(name) < 20 else (True, 0, name)
