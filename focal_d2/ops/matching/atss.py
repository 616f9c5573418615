"""Adaptive training sample selection: a threshold for each box, from the anchors near its centre.

The rule is algorithm 1 of arXiv 1912.02424. The candidates of a box are the anchors of the `topk` cells of
each level whose centres are nearest to the box's centre. Its threshold is the mean of the candidates' IoUs
plus their standard deviation. Candidates are positive from this IoU on, if their centre is inside the box.

What the paper leaves open is decided as follows, the first three as in the authors' code:

- With A anchors a cell, `topk` counts cells, so that a level has A · topk candidates.
- The standard deviation is that of a sample (n - 1); it is 0 for a single candidate.
- A centre on the edge of a box is not inside.
- An IoU that misses the threshold by at most 10^-6 reaches it. IoUs are in float32; without this, rounding
  would decide where a candidate's IoU equals the threshold, such as where all candidates have the same.
- Of cells at equal distance, the first ones of the grid are taken, row by row.
- Of boxes with the same IoU with an anchor, it belongs to the first one.

Only the candidates' IoUs are computed, for some boxes at a time. No shape depends on values, so that the host
waits for no GPU.

Shapes: M boxes, R anchors, L levels, S anchor shapes (levels × anchors a cell), k = `topk`, C = S · k
candidates of a box. Boxes are XYXY. Distances and thresholds are in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.ops.matching.match import AnchorGrid, Matches, iou_of

# Candidates in memory at a time, of all boxes; each takes about 100 bytes.
_MOST_CANDIDATES = 1 << 17


# By so much an IoU may miss the threshold.
_TOLERANCE = 1e-6


class _Candidates(NamedTuple):
    """The candidates of each box; all (M, C)."""

    anchor: Tensor  # int64
    exists: Tensor  # bool: levels of fewer than k cells have fewer candidates
    inside: Tensor  # bool: whether the anchor's centre is inside the box


def match_anchors_atss(boxes: Tensor, anchors: Tensor, grid: AnchorGrid, *, topk: int) -> Matches:
    """Match every anchor to at most one box. A box may get no anchor.

    Args:
        boxes: (M, 4), M ≥ 1. A box that is not finite gets no anchor.
        anchors: (R, 4), the grid's, R ≥ 1.
        grid: of the anchors.
        topk: k ≥ 1, cells of a level.
    """
    total = len(anchors)
    matched = torch.zeros(total, dtype=torch.int64, device=anchors.device)
    highest = anchors.new_full((total,), -1.0)
    step = max(1, _MOST_CANDIDATES // (len(grid.step) * topk))
    for first in range(0, len(boxes), step):
        part = boxes[first : first + step]
        candidates = _find_candidates(part.double(), grid, topk)
        iou = iou_of(part[:, None], anchors[candidates.anchor])
        enough = iou >= _thresholds(iou.double(), candidates.exists) - _TOLERANCE
        positive = candidates.exists & candidates.inside & enough
        # What is not positive goes to an anchor that does not exist, the last one.
        anchor = torch.where(positive, candidates.anchor, total)
        best = iou.new_full((total + 1,), -1.0)
        best.scatter_reduce_(0, anchor.flatten(), iou.flatten(), "amax")
        anchor = torch.where(iou == best[anchor], anchor, total)
        box = torch.arange(len(part), device=boxes.device)[:, None].expand_as(anchor)
        first_box = torch.full_like(best, len(part), dtype=torch.int64)
        first_box.scatter_reduce_(0, anchor.flatten(), box.flatten(), "amin")
        better = best[:total] > highest  # of equal IoUs, the first box
        matched = torch.where(better, first_box[:total] + first, matched)
        highest = torch.where(better, best[:total], highest)
    return Matches(matched, (highest >= 0).to(torch.int8))


def _thresholds(iou: Tensor, exists: Tensor) -> Tensor:
    """Return mean + standard deviation (M, 1) of the IoUs (M, C) of the candidates that exist."""
    number = exists.sum(1, keepdim=True)
    mean = torch.where(exists, iou, 0.0).sum(1, keepdim=True) / number.clamp(min=1)
    squares = torch.where(exists, iou - mean, 0.0).square().sum(1, keepdim=True)
    return mean + (squares / (number - 1).clamp(min=1)).sqrt()


def _find_candidates(boxes: Tensor, grid: AnchorGrid, topk: int) -> _Candidates:
    """Find the candidates of boxes (M, 4) float64."""
    x0, y0, x1, y1 = (side[:, None] for side in boxes.unbind(1))
    stride, width, height = (x[grid.lead] for x in (grid.stride, grid.width, grid.height))
    corners = grid.corners[grid.lead]
    x, y = ((corners[:, :2] + corners[:, 2:]) / 2).unbind(1)  # the centre of the cell (0, 0)
    column, from_column = _nearest((x0 + x1) / 2, x, stride, width, topk)
    row, from_row = _nearest((y0 + y1) / 2, y, stride, height, topk)
    # A cell in the i-th nearest column and the j-th nearest row is at least as far as i · j - 1 other cells.
    # It is among the k nearest only if i · j ≤ k.
    distances, cells = [], []
    for j in range(topk):
        columns = topk // (j + 1)
        distances.append(from_column[..., :columns].square() + from_row[..., j : j + 1].square())
        cells.append(row[..., j : j + 1] * width[:, None] + column[..., :columns])
    distance, cell = torch.cat(distances, dim=-1), torch.cat(cells, dim=-1)
    cell, order = cell.sort(dim=-1)
    distance, order = distance.gather(-1, order).sort(dim=-1, stable=True)
    cell, exists = cell.gather(-1, order)[..., :topk], distance[..., :topk].isfinite()
    cell = torch.where(exists, cell, 0)
    x = x[:, None] + cell % width[:, None] * stride[:, None]  # (M, L, k)
    y = y[:, None] + cell // width[:, None] * stride[:, None]
    inside = (x > x0[..., None]) & (x < x1[..., None]) & (y > y0[..., None]) & (y < y1[..., None])
    # From levels to the anchors of each cell.
    anchor = grid.first[:, None] + cell[:, grid.level] * grid.step[:, None]
    return _Candidates(*(of.flatten(1) for of in (anchor, exists[:, grid.level], inside[:, grid.level])))


def _nearest(
    centre: Tensor, first: Tensor, stride: Tensor, cells: Tensor, topk: int
) -> tuple[Tensor, Tensor]:
    """Return the k nearest cells to centres along an axis, the nearest first, and how far they are.

    Args:
        centre: (M, 1) of the boxes.
        first: (L,) centre of the first cell.
        stride: (L,) pixels between cells.
        cells: (L,) int64, their number.
        topk: k.

    Returns:
        (M, L, k) int64 cells and (M, L, k) distances; infinite where there is no such cell.
    """
    nearest = torch.minimum(((centre - first) / stride).round().clamp(min=0), cells - 1.0)
    nearest = nearest.nan_to_num(0.0).long()
    cell = nearest[..., None] + torch.arange(-topk, topk + 1, device=centre.device)
    distance = (first[:, None] + cell * stride[:, None] - centre[..., None]).abs()
    exists = (cell >= 0) & (cell < cells[:, None])
    distance, order = torch.where(exists, distance, torch.inf).sort(dim=-1, stable=True)
    return cell.gather(-1, order)[..., :topk], distance[..., :topk]
