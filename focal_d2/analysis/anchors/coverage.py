"""How well anchors fit boxes, from sizes alone: no picture is read.

Shapes: N images, B boxes, L levels, A anchors a cell. Boxes are XYXY in absolute pixels, as the network sees
them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from focal_d2.errors import UserError
from focal_d2.modeling.anchors import AnchorLayout

# Boxes looked at together: a column of them takes 128 KB, and a dozen columns stay in cache.
_CHUNK = 1 << 14


class AnchorGrids(NamedTuple):
    """The grids of anchors that a model lays over an image."""

    shapes: list[np.ndarray]  # L × (A, 2) float64: width and height
    offset: float  # of the first cell's centre, in strides
    layout: AnchorLayout


class BestAnchors(NamedTuple):
    """Of each box the anchor with the highest IoU, the first of equals."""

    iou: np.ndarray  # (B,) float64; 0 for a box that no anchor touches
    level: np.ndarray  # (B,) int64; -1 for such a box
    anchor: np.ndarray  # (B,) int64, place within the level's A; -1 for such a box


def grids_of(layout: AnchorLayout) -> AnchorGrids:
    """Take the shapes of detectron2's `DefaultAnchorGenerator`.

    Raises:
        UserError: for a generator of another kind.
    """
    made: Any = layout.generator
    if type(made) is not DefaultAnchorGenerator:
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.NAME makes a {type(made).__name__}; where its anchors stand is known of "
            "DefaultAnchorGenerator only"
        )
    cells = [cell.double().numpy() for cell in made.cell_anchors]
    return AnchorGrids([cell[:, 2:] - cell[:, :2] for cell in cells], made.offset, layout)


def best_anchors(boxes: np.ndarray, image: np.ndarray, sizes: np.ndarray, grids: AnchorGrids) -> BestAnchors:
    """Find each box's best anchor among all that a model lays over its image, a batch of its own.

    Overlaps along x and y are both longest at the cell nearest to the box's centre, so of each shape only
    that cell is looked at; the result is exact. Takes some 200 MB for a million boxes.

    Args:
        boxes: (B, 4) in the pixels of `sizes`.
        image: (B,) the image of each.
        sizes: (N, 2) height and width of the images.
        grids: the model's.
    """
    best = BestAnchors(
        np.zeros(len(boxes)),
        np.full(len(boxes), -1, dtype=np.int64),
        np.full(len(boxes), -1, dtype=np.int64),
    )
    divisibility = grids.layout.divisibility
    padded = -(-sizes // divisibility) * divisibility
    for start in range(0, len(boxes), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        _find_best(boxes[chunk], padded[image[chunk]], grids, BestAnchors(*(part[chunk] for part in best)))
    return best


def _find_best(boxes: np.ndarray, padded: np.ndarray, grids: AnchorGrids, best: BestAnchors) -> None:
    """Write the best anchors of some boxes (B, 4) on images of these padded sizes (B, 2) to `best`."""
    x0, y0, x1, y1 = np.ascontiguousarray(boxes.T)
    wide, high = x1 - x0, y1 - y0
    area = wide * high
    for level, (shapes, stride) in enumerate(zip(grids.shapes, grids.layout.strides, strict=True)):
        # Half the sides less the way to the nearest anchor's centre: with half an anchor's side added, the
        # overlap of two intervals neither of which holds the other.
        reach_x = wide / 2 - _distance((x0 + x1) / 2, padded[:, 1], stride, grids.offset)
        reach_y = high / 2 - _distance((y0 + y1) / 2, padded[:, 0], stride, grids.offset)
        for anchor, (width, height) in enumerate(shapes):
            overlap = np.minimum(np.minimum(wide, width), reach_x + width / 2).clip(min=0)
            overlap *= np.minimum(np.minimum(high, height), reach_y + height / 2).clip(min=0)
            iou = overlap / (area + width * height - overlap)
            better = np.flatnonzero(iou > best.iou)
            best.iou[better] = iou[better]
            best.level[better] = level
            best.anchor[better] = anchor


def _distance(centre: np.ndarray, length: np.ndarray, stride: int, offset: float) -> np.ndarray:
    """Pixels (B,) from centres (B,) to the nearest cell's centre, on axes of `length` (B,) pixels."""
    cells = -(-length // stride)
    nearest = np.clip(np.rint(centre / stride - offset), 0, cells - 1)
    return np.abs(centre - (nearest + offset) * stride)


def recall(iou: np.ndarray, threshold: float) -> float:
    """Share of the boxes whose best anchor's IoU (B,) reaches the threshold; NaN without boxes."""
    return float((iou >= threshold).mean()) if len(iou) else float("nan")
