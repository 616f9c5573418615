"""How well anchors fit boxes. Only sizes are needed: no image is read.

Shapes: N images, B boxes, L levels, A anchors a cell. Boxes are XYXY in pixels of the network's input.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from focal_d2.errors import UserError
from focal_d2.modeling.anchors import AnchorLayout

# Boxes of one pass: a column of them takes 128 KB, so that a dozen columns fit into the cache.
_CHUNK = 1 << 14


class AnchorGrids(NamedTuple):
    """The grids of anchors that a model lays over an image."""

    shapes: list[np.ndarray]  # L × (A, 2) float64: width and height
    offset: float  # of the first cell's centre, in strides
    layout: AnchorLayout


class BestAnchors(NamedTuple):
    """For each box, the anchor with the highest IoU; the first one if several are equal."""

    iou: np.ndarray  # (B,) float64; 0 for a box that no anchor touches
    level: np.ndarray  # (B,) int64; -1 for such a box
    anchor: np.ndarray  # (B,) int64, index among the A anchors of a cell; -1 for such a box


def grids_of(layout: AnchorLayout) -> AnchorGrids:
    """Read the anchors' shapes from detectron2's `DefaultAnchorGenerator`.

    Raises:
        UserError: for a generator of another kind.
    """
    generator: Any = layout.generator
    if type(generator) is not DefaultAnchorGenerator:
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.NAME makes a {type(generator).__name__}; the positions of anchors are "
            "known for DefaultAnchorGenerator only"
        )
    cells = [cell.double().numpy() for cell in generator.cell_anchors]
    return AnchorGrids([cell[:, 2:] - cell[:, :2] for cell in cells], generator.offset, layout)


def best_anchors(boxes: np.ndarray, image: np.ndarray, sizes: np.ndarray, grids: AnchorGrids) -> BestAnchors:
    """Find each box's best anchor among all anchors of its image, as if the image were a batch by itself.

    For each anchor shape, overlaps along x and y are both largest at the cell nearest to the box's centre.
    So only that cell is examined, and the result is exact. A million boxes take about 200 MB.

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
    """Write to `best` the best anchors of boxes (B, 4), whose images have the padded sizes (B, 2)."""
    x0, y0, x1, y1 = np.ascontiguousarray(boxes.T)
    box_width, box_height = x1 - x0, y1 - y0
    area = box_width * box_height
    for level, (shapes, stride) in enumerate(zip(grids.shapes, grids.layout.strides, strict=True)):
        # Half the box's side minus the distance to the nearest anchor's centre. This plus half the anchor's
        # side is the overlap along an axis if neither interval contains the other.
        reach_x = box_width / 2 - _distance((x0 + x1) / 2, padded[:, 1], stride, grids.offset)
        reach_y = box_height / 2 - _distance((y0 + y1) / 2, padded[:, 0], stride, grids.offset)
        for anchor, (width, height) in enumerate(shapes):
            overlap = np.minimum(np.minimum(box_width, width), reach_x + width / 2).clip(min=0)
            overlap *= np.minimum(np.minimum(box_height, height), reach_y + height / 2).clip(min=0)
            iou = overlap / (area + width * height - overlap)
            better = np.flatnonzero(iou > best.iou)
            best.iou[better] = iou[better]
            best.level[better] = level
            best.anchor[better] = anchor


def _distance(centre: np.ndarray, length: np.ndarray, stride: int, offset: float) -> np.ndarray:
    """Return the distances (B,) from centres (B,) to the nearest cell's centre, on axes of `length` (B,)."""
    cells = -(-length // stride)
    nearest = np.clip(np.rint(centre / stride - offset), 0, cells - 1)
    return np.abs(centre - (nearest + offset) * stride)


def recall(iou: np.ndarray, threshold: float) -> float:
    """Return the share of boxes whose best anchor's IoU (B,) reaches the threshold; NaN without boxes."""
    return float((iou >= threshold).mean()) if len(iou) else float("nan")
