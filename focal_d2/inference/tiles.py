"""Detect objects in pictures of any size: in overlapping tiles, whose detections are joined.

Along each side of the picture the tiles start at multiples of `window` - `overlap`. Where two tiles meet,
each owns half of the overlap. A detection is kept if its tile owns its centre:

- An object that is no larger than the overlap is whole in the tile that owns its centre.
- A larger one may be cut off in both tiles. Each of them then owns the centre of its part, and the two parts
  are joined.

Boxes are float32 XYXY in pixels, of the picture or, where it is said, of the tile. D: detections.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from focal_d2.annotations import box_areas
from focal_d2.errors import UserError

# A box that ends so near to the edge of its tile, in pixels, is cut off there: boxes are not exact.
_EDGE = 4.0
# Two tiles see the centre of an object a little apart. Detections so far outside the owned part, in pixels,
# are kept too; if both tiles keep one, the pair is found by its IoU.
_MARGIN = 8.0
# Two parts of an object that was cut off reach so far along the cut in common: the IoU of their intervals.
_SAME_EXTENT = 0.5
# A box that was cut off and has this share of its area in another tile's box is a part of that one's object.
_CONTAINED = 0.8


class TileDetections(NamedTuple):
    """Detections of a tile or a picture."""

    boxes: np.ndarray  # (D, 4) float32
    scores: np.ndarray  # (D,) float32
    classes: np.ndarray  # (D,) int64


class Tile(NamedTuple):
    """A window of the picture: columns x0 to x1 and rows y0 to y1, ends not included."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class Tiling:
    """The tiles of a picture, row by row."""

    height: int
    width: int
    window: int  # side of a tile; those at the right and lower edge may be smaller
    overlap: int  # of neighbours

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return _count(self.width, self.window, self.overlap)

    @property
    def rows(self) -> int:
        """Tiles in a column."""
        return _count(self.height, self.window, self.overlap)

    def tile(self, row: int, column: int) -> Tile:
        """Return one of the tiles."""
        x, y = (i * (self.window - self.overlap) for i in (column, row))
        return Tile(x, y, min(x + self.window, self.width), min(y + self.window, self.height))

    def __iter__(self) -> Iterator[Tile]:
        """Return all tiles, row by row."""
        for row, column in itertools.product(range(self.rows), range(self.columns)):
            yield self.tile(row, column)


def _count(length: int, window: int, overlap: int) -> int:
    return max(1, math.ceil((length - overlap) / (window - overlap)))


def check_tiling(window: int, overlap: int, stride: int, *, keys: str) -> None:
    """Check the size of tiles.

    Args:
        window: side of a tile, in pixels.
        overlap: of neighbours, in pixels.
        stride: of the coarsest level of the pyramid. With tiles that start at its multiples, an object is at
            the same position of the anchor grid in every tile.
        keys: where WINDOW and OVERLAP are, for the message.

    Raises:
        UserError: naming the wrong number.
    """
    if window < 1 or window % stride:
        raise UserError(f"{keys}.WINDOW is {window}; it must be a multiple of the coarsest stride, {stride}")
    if overlap < 0 or overlap % stride or 2 * overlap > window:
        raise UserError(
            f"{keys}.OVERLAP is {overlap}; it must be a multiple of the coarsest stride, {stride}, and at "
            f"most half of WINDOW, {window}"
        )


def detect_in_tiles(
    tiling: Tiling,
    read: Callable[[Tile], np.ndarray],
    detect: Callable[[list[np.ndarray]], Sequence[TileDetections]],
    *,
    batch: int = 1,
    iou: float = 0.5,
    fuse: bool = False,
    progress: Callable[[int], None] = lambda tiles: None,
) -> TileDetections:
    """Detect objects in a picture, of which a batch of tiles is in memory at a time.

    Args:
        tiling: the tiles.
        read: returns the pixels of a tile, (h, w, C).
        detect: returns the detections of each image of a list, in its pixels.
        batch: tiles that `detect` gets at once.
        iou: boxes of a class from two tiles are the same object above this IoU.
        fuse: the box of an object that two tiles detected is the mean of both, weighted by their scores
            (weighted box fusion, arXiv 1910.13302); else that of the higher score.
        progress: called with the number of tiles that are done.

    Returns:
        Best first.
    """
    parts: list[TileDetections] = []
    tiles = iter(tiling)
    while group := list(itertools.islice(tiles, batch)):
        parts += detect([read(tile) for tile in group])
        progress(len(parts))
    return join_tiles(tiling, parts, iou=iou, fuse=fuse)


def join_tiles(
    tiling: Tiling, parts: Iterable[TileDetections], *, iou: float = 0.5, fuse: bool = False
) -> TileDetections:
    """Join the detections of tiles; the time is linear in their number.

    Args:
        tiling: the tiles.
        parts: detections of each tile, in its pixels, in the order of `tiling`.
        iou: see `detect_in_tiles`.
        fuse: see `detect_in_tiles`.

    Returns:
        Detections in the picture's pixels, best first.
    """
    owned = _owned(tiling, parts)
    joined = _join_cut(tiling, owned)
    boxes, left = _suppress(tiling, joined, iou=iou, fuse=fuse)
    left = left[np.argsort(-joined.scores[left], kind="stable")]
    return TileDetections(boxes[left], joined.scores[left], joined.classes[left])


class _Owned(NamedTuple):
    """Detections of all tiles, in the picture's pixels."""

    boxes: np.ndarray  # (D, 4) float32
    scores: np.ndarray  # (D,) float32
    classes: np.ndarray  # (D,) int64
    # (D, 4): whether the box ends where the tile does, but not the picture, by sides as in XYXY
    cut: np.ndarray
    members: list[np.ndarray]  # of each tile: indices of its detections


def _owned(tiling: Tiling, parts: Iterable[TileDetections]) -> _Owned:
    """Return the detections whose centre their tile owns."""
    fields: tuple[list[np.ndarray], ...] = ([], [], [], [])
    members: list[np.ndarray] = []
    start = 0
    for tile, part in zip(tiling, parts, strict=True):
        boxes = part.boxes.astype(np.float32) + np.array([tile.x0, tile.y0, tile.x0, tile.y0], np.float32)
        edges = np.array(tile, np.float32)
        # Where the picture ends, nothing is cut off, and the tile owns all that is there.
        inner = np.array([tile.x0 > 0, tile.y0 > 0, tile.x1 < tiling.width, tile.y1 < tiling.height])
        cut = inner & (np.abs(boxes - edges) <= _EDGE)
        inward = np.array([1, 1, -1, -1]) * (tiling.overlap / 2 - _MARGIN)
        low_x, low_y, high_x, high_y = np.where(inner, edges + inward, [-np.inf, -np.inf, np.inf, np.inf])
        x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        owned = (low_x <= x) & (x < high_x) & (low_y <= y) & (y < high_y)
        for field, values in zip(fields, (boxes, part.scores, part.classes, cut), strict=True):
            field.append(values[owned])
        members.append(np.arange(start, start + int(owned.sum())))
        start += len(members[-1])
    boxes, scores, classes, cut = (np.concatenate(field) for field in fields)
    return _Owned(boxes, scores, classes, cut, members)


def _neighbours(tiling: Tiling, members: list[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return the indices of the detections of each two tiles that overlap."""
    for row, column in itertools.product(range(tiling.rows), range(tiling.columns)):
        here = members[row * tiling.columns + column]
        for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
            if row + down < tiling.rows and 0 <= column + right < tiling.columns:
                there = members[(row + down) * tiling.columns + column + right]
                if len(here) and len(there):
                    yield here, there


def _join_cut(tiling: Tiling, owned: _Owned) -> _Owned:
    """Join the parts of objects that were cut off: of each object, the best part gets the box around all."""
    boxes, scores, classes, cut, members = owned
    first = np.arange(len(boxes))  # the first part of each part's object, itself or found from part to part

    def find(i: int) -> int:
        while first[i] != i:
            i = first[i]
        return i

    for here, there in _neighbours(tiling, members):
        here, there = here[cut[here].any(1)], there[cut[there].any(1)]
        a, b = boxes[here][:, None], boxes[there][None]
        shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (n, m, 2): x, y
        together = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
        alike = shared >= _SAME_EXTENT * together
        cut_a, cut_b = cut[here][:, None], cut[there][None]
        facing = (cut_a[..., 2:] & cut_b[..., :2]) | (cut_a[..., :2] & cut_b[..., 2:])
        # Along each of x and y, the parts are cut off towards each other or have the same extent.
        same = (shared > 0).all(-1) & (facing | alike).all(-1) & facing.any(-1)
        same &= classes[here][:, None] == classes[there][None]
        for i, j in zip(*same.nonzero(), strict=True):
            low, high = sorted((find(int(here[i])), find(int(there[j]))))
            first[high] = low
    objects = defaultdict(list)
    for i in (first != np.arange(len(boxes))).nonzero()[0]:
        objects[find(int(i))].append(int(i))
    boxes, cut, left = boxes.copy(), cut.copy(), np.ones(len(boxes), bool)
    for i, others in objects.items():
        parts = [i, *others]
        best = max(parts, key=lambda part: float(scores[part]))
        around = np.concatenate([boxes[parts, :2].min(0), boxes[parts, 2:].max(0)])
        # The box may still be cut off, at sides where no part ends on its own.
        cut[best] = (cut[parts] | (np.abs(boxes[parts] - around) > _EDGE)).all(0)
        boxes[best] = around
        left[parts] = False
        left[best] = True
    return _Owned(boxes, scores, classes, cut, [indices[left[indices]] for indices in members])


def _suppress(tiling: Tiling, joined: _Owned, *, iou: float, fuse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Leave one of the detections of each object.

    A box that was cut off gives way to one that was not, whatever their scores.

    Returns:
        All boxes, which differ from those of `joined` with `fuse`, and the indices of those that are left.
    """
    boxes, scores, classes, cut, members = joined
    is_cut = np.asarray(cut.any(axis=1))
    pairs = defaultdict(set)
    for here, there in _neighbours(tiling, members):
        a, b = (is_cut[indices] for indices in (here, there))
        ious, in_a, in_b = _overlaps(boxes[here], boxes[there])
        overlaps = ious > iou
        # A part of an object lies in the box of the whole.
        overlaps |= (b[None] & ~a[:, None] & (in_b >= _CONTAINED)) | (
            a[:, None] & ~b[None] & (in_a >= _CONTAINED)
        )
        overlaps &= classes[here][:, None] == classes[there][None]
        for i, j in zip(*overlaps.nonzero(), strict=True):
            pairs[int(here[i])].add(int(there[j]))
            pairs[int(there[j])].add(int(here[i]))
    boxes, left = boxes.copy(), np.zeros(len(boxes), bool)
    left[np.concatenate([*members, np.zeros(0, np.int64)])] = True
    for i in sorted(pairs, key=lambda i: (bool(is_cut[i]), -float(scores[i]), i)):
        if not left[i]:
            continue
        others = [j for j in pairs[i] if left[j]]
        left[others] = False
        same = [i, *(j for j in others if not is_cut[j])]
        if fuse and len(same) > 1:
            boxes[i] = np.average(boxes[same], axis=0, weights=scores[same])
    return boxes, left.nonzero()[0]


def _overlaps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each two boxes, (n, m): IoU, and what they share as a share of `a` and of `b`."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clip(0).prod(-1)
    area_a, area_b = (box_areas(x).clip(1e-6) for x in (a, b))
    return shared / (area_a[:, None] + area_b[None] - shared), shared / area_a[:, None], shared / area_b[None]
