"""Pictures of detections: a box of its class's colour, and class and score where there is room for them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from focal_d2.errors import escaped

# RGB. The colours of Okabe and Ito, which people with every kind of colour blindness can tell apart, in an
# order that begins with those that differ most from vegetation, soil and water. Classes beyond repeat them.
COLOURS = (
    (230, 159, 0),  # orange
    (86, 180, 233),  # sky blue
    (240, 228, 66),  # yellow
    (204, 121, 167),  # reddish purple
    (213, 94, 0),  # vermilion
    (0, 158, 115),  # bluish green
    (0, 114, 178),  # blue
)
TRUTH = COLOURS[1]  # of boxes that annotations have
_GAP = 8  # pixels between annotations and detections

# Sides of an image, in pixels, that a pixel of line width and of the letters' height stand for.
_SIDE_OF_LINE, _SIDE_OF_LETTERS = 600, 45
_SMALLEST_LETTERS, _LARGEST_LETTERS = 10, 48
# The most width of a label, as a multiple of the width of its box.
_WIDEST = 1.15
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


class _Label(NamedTuple):
    """A text and its rectangle in pixels; the right and lower edges are not in it."""

    text: str
    left: int
    top: int
    right: int
    bottom: int

    def covers(self, other: _Label) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def colour_of(label: int) -> tuple[int, int, int]:
    """Return the colour of a class in RGB."""
    return COLOURS[label % len(COLOURS)]


def line_width(height: int, width: int) -> int:
    """Return the width of lines, in pixels, in an image of a size."""
    return 1 + round(min(height, width) / _SIDE_OF_LINE)


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray | None,
    classes: np.ndarray,
    class_names: Sequence[str],
    *,
    colour: tuple[int, int, int] | None = None,
) -> np.ndarray:
    """Draw boxes on a copy of an image.

    A label has the class and the score, or the score alone if there is one class or no room for both. It is
    drawn above its box, or inside at the top, where it is not much wider than the box and covers no other
    label; labels of the best detections come first.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (D, 4) XYXY, best first.
        scores: (D,); None: no label has one.
        classes: (D,) whole numbers in [0, K).
        class_names: K names.
        colour: of all boxes, in RGB; None: of their classes.

    Returns:
        (H, W, 3) uint8 BGR.
    """
    height, width = image.shape[:2]
    canvas = np.ascontiguousarray(image).copy()
    corners = np.rint(boxes).astype(np.int64).clip(-(2**20), 2**20).tolist()
    colours = [colour or colour_of(k) for k in np.asarray(classes).tolist()]
    line = line_width(height, width)
    # The worst first: the better ones are drawn over them.
    for (x0, y0, x1, y1), rgb in zip(reversed(corners), reversed(colours), strict=True):
        cv2.rectangle(canvas, (x0, y0), (x1, y1), rgb[::-1], line, cv2.LINE_AA)
    texts = _texts(scores, np.asarray(classes).tolist(), class_names)
    if not any(texts):
        return canvas
    size = round(min(height, width) / _SIDE_OF_LETTERS)
    font = _font(max(_SMALLEST_LETTERS, min(_LARGEST_LETTERS, size)))
    labels = _place(texts, corners, font, line, height, width)
    picture = Image.fromarray(canvas[:, :, ::-1])
    pen = ImageDraw.Draw(picture)
    for label, rgb in zip(labels, colours, strict=True):
        if label is not None:
            pen.rectangle((label.left, label.top, label.right - 1, label.bottom - 1), fill=rgb)
            ink = _BLACK if np.dot(rgb, (0.299, 0.587, 0.114)) > 115 else _WHITE
            middle = (label.left + label.right) / 2, (label.top + label.bottom) / 2
            pen.text(middle, label.text, fill=ink, font=font, anchor="mm")
    return np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])


def _texts(
    scores: np.ndarray | None, classes: Sequence[int], class_names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return for each detection the texts that a label may have, the best one first."""
    names = [escaped(class_names[k]) if len(class_names) > 1 else "" for k in classes]
    numbers = [""] * len(names) if scores is None else [f"{score:.2f}" for score in scores]
    texts = zip(names, numbers, strict=True)
    return [tuple(dict.fromkeys(x for x in (f"{n} {number}".strip(), number) if x)) for n, number in texts]


def _place(
    texts: Sequence[Sequence[str]],
    corners: Sequence[Sequence[int]],
    font: ImageFont.FreeTypeFont,
    line: int,
    height: int,
    width: int,
) -> list[_Label | None]:
    """Choose the place of each label; None where there is none."""
    letters = sum(font.getmetrics())
    cells: dict[tuple[int, int], list[_Label]] = {}  # the labels that touch a cell of the image
    side = 4 * letters
    labels: list[_Label | None] = []
    for choices, (x0, y0, x1, y1) in zip(texts, corners, strict=True):
        labels.append(None)
        for text, top in itertools.product(choices, (y0 - line // 2 - letters, y0 + line)):
            long = int(font.getlength(text)) + letters // 2
            left = max(0, min(x0 - line // 2, width - long))
            label = _Label(text, left, top, left + long, top + letters)
            if long > _WIDEST * (x1 - x0 + line) or top < 0 or label.bottom > min(height, y1):
                continue
            near = [
                (column, row)
                for column in range(label.left // side, label.right // side + 1)
                for row in range(label.top // side, label.bottom // side + 1)
            ]
            if not any(label.covers(other) for cell in near for other in cells.get(cell, ())):
                for cell in near:
                    cells.setdefault(cell, []).append(label)
                labels[-1] = label
                break
    return labels


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def draw_truth(image: np.ndarray, boxes: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Draw the boxes of annotations on a copy of an image, and put it to the left of a picture.

    Args:
        image: (H, W, 3) uint8 BGR.
        boxes: (M, 4) XYXY.
        picture: (H, W, 3) uint8 BGR.
    """
    classes = np.zeros(len(boxes), np.int64)
    truth = draw_detections(image, boxes, None, classes, [""], colour=TRUTH)
    gap = np.full((image.shape[0], _GAP, 3), 255, np.uint8)
    return np.hstack([truth, gap, picture])
