"""Matching anchors to boxes without the matrix of all their IoUs.

detectron2's `Matcher` computes the IoU of every pair of M boxes and R anchors. But anchors are on regular
grids. A box reaches a given IoU only with the anchors of a few shapes in a small window around it, and its
best anchors are next to its centre. Here only those pairs are listed. Their IoUs are computed with the same
operations in the same order as in detectron2, so that labels are the same to the bit, ties included.

Windows are computed in float64 and made slightly larger than necessary. Anchors outside a window have too low
an IoU, however float32 rounds. Where this cannot be guaranteed (a box that hardly overlaps any anchor, or
positives below the first threshold), all pairs are computed, for a slice of anchors at a time.

On a GPU, a list whose length depends on the boxes makes the host wait. There, the Triton kernels of
`match_triton` do not.

Shapes: M boxes, R anchors, S anchor shapes (levels × anchors a cell), T listed pairs. Boxes are XYXY.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Coordinates in float32 are off by at most 2^-11 pixels below 8192 pixels; windows are larger by this much.
_SLACK = 0.02
# A box that overlaps its best anchor by less than this, in pixels, is compared with all anchors.
_LEAST_OVERLAP = 0.1
# Boxes with a coordinate beyond this are compared with all anchors.
_FARTHEST = 2.0**20
# Pairs computed at once where all pairs are computed: 16 MiB in float32.
_MOST_PAIRS = 1 << 22
# Boxes whose windows are listed at once: a table of their overlaps with 45 shapes takes 6 MB in float64.
_MOST_BOXES = 1 << 14


class AnchorGrid(NamedTuple):
    """The grid of each anchor shape. Anchors are in the order of detectron2's generator."""

    corners: Tensor  # (S, 4) float64: the anchor of the cell (0, 0)
    stride: Tensor  # (S,) float64: pixels between cells
    width: Tensor  # (S,) int64: cells in a row
    height: Tensor  # (S,) int64: rows
    first: Tensor  # (S,) int64: index of the anchor of the cell (0, 0)
    step: Tensor  # (S,) int64: anchors a cell, from a cell to the next
    level: Tensor  # (S,) int64: index of the level
    lead: Tensor  # (L,) int64: the first shape of each level


class Matches(NamedTuple):
    """The result of matching, as detectron2's `Matcher` returns it."""

    matched: Tensor  # (R,) int64: the box with the highest IoU; equal to the matcher's where outcome is 1
    outcome: Tensor  # (R,) int8: the thresholds' label


class _Pairs(NamedTuple):
    """Pairs of a box and an anchor."""

    box: Tensor  # (T,) int64
    anchor: Tensor  # (T,) int64
    iou: Tensor  # (T,) float32


def match_anchors(
    boxes: Tensor,
    anchors: Tensor,
    grid: AnchorGrid | None,
    *,
    thresholds: Sequence[float],
    labels: Sequence[int],
    low_quality_matches: bool,
) -> Matches:
    """Match every anchor to at most one box, as detectron2's `Matcher` does with the IoU matrix.

    Args:
        boxes: (M, 4), M ≥ 1.
        anchors: (R, 4), the grid's.
        grid: of the anchors; None if they are on no grid: then all pairs are computed.
        thresholds: T' rising IoUs, above 0.
        labels: T' + 1 of -1, 0 and 1: for IoUs below the first threshold, from it to the second, and so on.
        low_quality_matches: an anchor that is a box's best gets label 1, however low their IoU.
    """
    arguments = (list(thresholds), list(labels), low_quality_matches)
    # Boxes that are NaN or far outside take the exhaustive path.
    if grid is None or labels[0] == 1 or not bool((boxes.abs() < _FARTHEST).all()):
        return _match_all(boxes, anchors, *arguments)
    matched, highest, chosen = anchors.new_zeros(0), anchors.new_zeros(0), []
    for first in range(0, len(boxes), _MOST_BOXES):
        part = boxes[first : first + _MOST_BOXES]
        near = _near_pairs(part, anchors, grid, thresholds[0], low_quality_matches)
        if near is None:
            return _match_all(boxes, anchors, *arguments)
        box, iou = _best_box(near, len(part), len(anchors))
        if first == 0:
            matched, highest = box, iou
        else:
            matched = torch.where(iou > highest, box + first, matched)  # of equal IoUs, the first box
            highest = torch.maximum(iou, highest)
        if low_quality_matches:
            chosen.append(near.anchor[near.iou == _best_of(near, len(part))[near.box]])
    outcome = _label(highest, *arguments[:2])
    if low_quality_matches:
        best_anchors = torch.cat(chosen)
        outcome[best_anchors] = 1
        # Below the first threshold, the list of pairs may lack the best box of an anchor.
        unsure = best_anchors[highest[best_anchors] < thresholds[0]].unique()
        for part in unsure.split(max(1, _MOST_PAIRS // len(boxes))):
            matched[part] = iou_of(boxes[:, None], anchors[part]).max(dim=0).indices
    return Matches(matched, outcome)


def _near_pairs(
    boxes: Tensor, anchors: Tensor, grid: AnchorGrid, threshold: float, low_quality_matches: bool
) -> _Pairs | None:
    """List all pairs of at least this IoU, and, for low-quality matches, the best pairs of each box.

    None if a box needs all pairs to be computed.
    """
    windows = _overlaps(boxes.double(), grid)
    near = _compare(boxes, anchors, *_pairs_above(windows, grid, threshold))
    if low_quality_matches:
        # If a box has a pair above the threshold, its best pair is in the list already.
        rest = (_best_of(near, len(boxes)) < threshold).nonzero().squeeze(1)
        if len(rest):
            if (windows.least[rest] < _LEAST_OVERLAP).any():
                return None
            near = _join(near, _compare(boxes, anchors, *_best_pairs(windows, grid, rest)))
    return near


class _Overlaps(NamedTuple):
    """The overlap of each box with the nearest anchor of each shape; (M, S) float64 unless stated."""

    boxes: Tensor  # (M, 4)
    width: Tensor
    height: Tensor
    areas: Tensor  # the sum of both areas
    least: Tensor  # (M,) the smaller side of the overlap with the best shape


def _overlaps(boxes: Tensor, grid: AnchorGrid) -> _Overlaps:
    x0, y0, x1, y1 = (side.unsqueeze(1) for side in boxes.unbind(1))
    a0, b0, a1, b1 = grid.corners.unbind(1)
    width = _longest(x0, x1, a0, a1, grid.stride, grid.width)
    height = _longest(y0, y1, b0, b1, grid.stride, grid.height)
    areas = (x1 - x0) * (y1 - y0) + (a1 - a0) * (b1 - b0)
    overlaps = _Overlaps(boxes, width, height, areas, boxes.new_zeros(0))
    shape = _real_iou(overlaps, 0.0).argmax(dim=1, keepdim=True)
    least = torch.minimum(width, height).gather(1, shape).squeeze(1)
    return overlaps._replace(least=least)


def _longest(low: Tensor, high: Tensor, first: Tensor, last: Tensor, stride: Tensor, cells: Tensor) -> Tensor:
    """Return the longest overlap (M, S) along an axis of a box and a shape, which is at the nearest cell."""
    nearest = ((low + high - first - last) / (2 * stride)).round().clamp(min=0)
    shift = torch.minimum(nearest, cells - 1.0) * stride
    return torch.minimum(high, last + shift) - torch.maximum(low, first + shift)


def _real_iou(overlaps: _Overlaps, slack: float) -> Tensor:
    """Return the IoU (M, S) of the nearest anchors, with the overlap longer by `slack` on each axis."""
    intersection = (overlaps.width + slack).clamp(min=0) * (overlaps.height + slack).clamp(min=0)
    return intersection / (overlaps.areas - intersection)


def _pairs_above(overlaps: _Overlaps, grid: AnchorGrid, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the boxes and anchors, both (T,), of a list that contains all pairs of at least this IoU."""
    # IoU ≥ t is the same as intersection ≥ t / (1 + t) · (sum of the areas).
    needed = threshold / (1 + threshold) * overlaps.areas * (1 - 1e-4)
    width, height = overlaps.width + _SLACK, overlaps.height + _SLACK
    box, shape = ((width > 0) & (height > 0) & (width * height >= needed)).nonzero(as_tuple=True)
    needed, width, height = needed[box, shape], width[box, shape], height[box, shape]
    return _window(overlaps.boxes, grid, box, shape, needed / height - _SLACK, needed / width - _SLACK)


def _best_pairs(overlaps: _Overlaps, grid: AnchorGrid, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return the boxes and anchors, both (T,), of a list that contains all best pairs of the boxes `rest`."""
    part = _Overlaps(*(x[rest] for x in overlaps))
    lowest = _real_iou(part, -_SLACK).amax(dim=1, keepdim=True) * (1 - 1e-4)
    row, shape = (_real_iou(part, _SLACK) >= lowest).nonzero(as_tuple=True)
    # Apart from rounding, a best anchor has the longest possible overlap along each axis.
    width, height = part.width[row, shape], part.height[row, shape]
    return _window(
        overlaps.boxes, grid, rest[row], shape, width * (1 - 1e-4) - _SLACK, height * (1 - 1e-4) - _SLACK
    )


def _window(
    boxes: Tensor, grid: AnchorGrid, box: Tensor, shape: Tensor, width: Tensor, height: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the boxes and anchors, both (T,), of all pairs with at least this overlap.

    Args:
        boxes: (M, 4) float64.
        grid: of the anchors.
        box: (W,) index of the box of each window.
        shape: (W,) index of its anchor shape.
        width: (W,) least width of the overlap, pixels.
        height: (W,) least height of the overlap, pixels.
    """
    x0, y0, x1, y1 = boxes[box].unbind(1)
    a0, b0, a1, b1 = grid.corners[shape].unbind(1)
    stride, columns, rows = grid.stride[shape], grid.width[shape], grid.height[shape]
    left, wide = _cells(x0, x1, a0, a1, stride, columns, width)
    top, high = _cells(y0, y1, b0, b1, stride, rows, height)
    cells = wide * high
    window = torch.repeat_interleave(cells)  # (T,)
    inside = torch.arange(len(window), device=window.device) - (cells.cumsum(0) - cells)[window]
    row = top[window] + inside // wide[window]
    column = left[window] + inside % wide[window]
    anchor = grid.first[shape][window] + (row * columns[window] + column) * grid.step[shape][window]
    return box[window], anchor


def _cells(
    low: Tensor, high: Tensor, first: Tensor, last: Tensor, stride: Tensor, cells: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the first cell and the number of cells, along an axis, that overlap an interval by `length`."""
    start = ((length + low - last) / stride).ceil().clamp(min=0).long()
    stop = torch.minimum(((high - length - first) / stride).floor().long(), cells - 1)
    return start, (stop - start + 1).clamp(min=0)


def _compare(boxes: Tensor, anchors: Tensor, box: Tensor, anchor: Tensor) -> _Pairs:
    return _Pairs(box, anchor, iou_of(boxes[box], anchors[anchor]))


def iou_of(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the IoU of boxes (..., 4) and anchors (..., 4), to the bit as detectron2's `pairwise_iou`."""
    sides = torch.minimum(boxes[..., 2:], anchors[..., 2:]) - torch.maximum(boxes[..., :2], anchors[..., :2])
    width, height = sides.clamp_(min=0).unbind(-1)
    intersection = width * height
    union = _area(boxes) + _area(anchors) - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _join(a: _Pairs, b: _Pairs) -> _Pairs:
    return _Pairs(*(torch.cat(pair) for pair in zip(a, b, strict=True)))


def _best_of(pairs: _Pairs, boxes: int) -> Tensor:
    """Return the highest IoU (M,) among each box's pairs; 0 if it has none."""
    return pairs.iou.new_zeros(boxes).scatter_reduce_(0, pairs.box, pairs.iou, "amax")


def _best_box(pairs: _Pairs, boxes: int, anchors: int) -> tuple[Tensor, Tensor]:
    """Return the first box of the highest IoU, and that IoU, both (R,); 0 and 0 without a pair."""
    highest = pairs.iou.new_zeros(anchors).scatter_reduce_(0, pairs.anchor, pairs.iou, "amax")
    tied = pairs.iou == highest[pairs.anchor]
    first = torch.full((anchors,), boxes, device=pairs.box.device)
    first.scatter_reduce_(0, pairs.anchor[tied], pairs.box[tied], "amin")
    return first.remainder_(boxes), highest


def _label(highest: Tensor, thresholds: list[float], labels: list[int]) -> Tensor:
    outcome = torch.full(highest.shape, labels[0], dtype=torch.int8, device=highest.device)
    for threshold, label in zip(thresholds, labels[1:], strict=True):
        outcome.masked_fill_(highest >= threshold, label)
    return outcome


def _match_all(
    boxes: Tensor, anchors: Tensor, thresholds: list[float], labels: list[int], low_quality_matches: bool
) -> Matches:
    """Compute all pairs, for a slice of anchors at a time."""
    slices = anchors.split(max(1, _MOST_PAIRS // len(boxes)))
    highest, matched = (
        torch.cat(part) for part in zip(*(iou_of(boxes[:, None], s).max(dim=0) for s in slices), strict=True)
    )
    outcome = _label(highest, thresholds, labels)
    if low_quality_matches:
        best = torch.stack([iou_of(boxes[:, None], s).amax(dim=1) for s in slices]).amax(dim=0)
        tied = [(iou_of(boxes[:, None], s) == best[:, None]).any(dim=0) for s in slices]
        outcome[torch.cat(tied)] = 1
    return Matches(matched, outcome)


def inside_regions(anchors: Tensor, regions: Tensor, *, share: float) -> Tensor:
    """Find the anchors that are covered by a single region to at least this share.

    Args:
        anchors: (R, 4) XYXY absolute pixels.
        regions: (G, 4), likewise.
        share: of the anchor's area.

    Returns:
        (R,) bool.
    """
    low, high = anchors[:, :2], anchors[:, 2:]
    needed = share * (high - low).prod(1)
    inside = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    # One region at a time: images have few, and all at once would take G times the memory.
    for region in regions.to(anchors.dtype):
        covered = (torch.minimum(high, region[2:]) - torch.maximum(low, region[:2])).clamp_(min=0).prod(1)
        inside |= (covered >= needed) & (covered > 0)
    return inside
