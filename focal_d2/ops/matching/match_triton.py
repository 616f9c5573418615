"""Triton kernels for GPUs: the labels of all anchors of a batch, by matching anchors to boxes.

Nothing here waits for the GPU: no number is read back, and no shape depends on values. Results do not depend
on the order in which programs run: a maximum is the same in any order. They are equal to the bit to those of
`match.match_anchors` and `match.inside_regions`, image by image.

Only `common.find_kernels` imports this module, where Triton is installed. If TRITON_INTERPRET=1 is set,
Triton's interpreter runs the kernels on CPU tensors; the tests do that.

Shapes: see `match`; N images, B boxes of all images, G regions of an image. A program is one block of
threads, a tile the anchors that it works on, all of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# To be tuned on a GPU: anchors of a program, and its warps.
_MATCH_TILE = 512
_MATCH_WARPS = 4


class BatchLabels(NamedTuple):
    """What matching says of each anchor."""

    labels: Tensor  # (N, R) int64: [0, K) a class, K background, -1 ignored
    positive: Tensor  # (N, R) bool
    matched: Tensor  # (N, R) int64: the box of the highest IoU, an index into all boxes; 0 without a box


def label_batch(
    boxes: Tensor,
    classes: Tensor,
    counts: Sequence[int],
    regions: Sequence[Tensor | None],
    anchors: Tensor,
    *,
    num_classes: int,
    thresholds: Sequence[float],
    labels: Sequence[int],
    low_quality_matches: bool,
    region_share: float,
) -> BatchLabels:
    """Label the anchors of all images in two launches, without the matrix of all IoUs.

    Args:
        boxes: (B, 4) float32, one image after another.
        classes: (B,) int64.
        counts: of the boxes of each image.
        regions: N × (G, 4) float, the ignored regions of each image, on any device, or None.
        anchors: (R, 4) float32.
        num_classes: K.
        thresholds: see `match.match_anchors`.
        labels: likewise.
        low_quality_matches: likewise.
        region_share: an anchor is in a region that covers at least this share of its area.
    """
    images, total, device = len(counts), len(anchors), anchors.device
    areas = [x.to(device, torch.float32, non_blocking=True) for x in regions if x is not None]
    # Where each image's boxes and regions begin.
    numbers = (counts, [0 if x is None else len(x) for x in regions])
    first = torch.tensor([[0, *accumulate(x)] for x in numbers], dtype=torch.int32)
    first_box, first_region = first.to(device, non_blocking=True)
    matched = anchors.new_empty((images, total), dtype=torch.int64)
    highest = anchors.new_empty((images, total))
    label = torch.empty_like(matched)
    positive = torch.empty_like(matched, dtype=torch.bool)
    best = anchors.new_zeros(len(boxes))
    if label.numel():
        boxes, anchors = boxes.contiguous(), anchors.contiguous()
        grid = (triton.cdiv(total, _MATCH_TILE), images)
        # The compiler may not contract a product and a sum: every operation is to round as PyTorch's does.
        options = {"TILE": _MATCH_TILE, "num_warps": _MATCH_WARPS, "enable_fp_fusion": False}
        with torch.cuda.device_of(anchors):
            _match_kernel[grid](
                boxes,
                first_box,
                anchors,
                matched,
                highest,
                best.view(torch.int32),
                total,
                BEST=low_quality_matches,
                **options,
            )
            _label_kernel[grid](
                boxes,
                first_box,
                classes,
                torch.cat([boxes[:0], *areas]),
                first_region,
                anchors,
                matched,
                highest,
                best,
                label,
                positive,
                total,
                num_classes,
                float(region_share),
                THRESHOLDS=tuple(thresholds),
                LABELS=tuple(labels),
                BEST=low_quality_matches,
                **options,
            )
    return BatchLabels(label, positive, matched)


@triton.jit(do_not_specialize=["total"])
def _match_kernel(
    boxes, first, anchors, matched, highest, best, total, BEST: tl.constexpr, TILE: tl.constexpr
):
    """Store the best box of each anchor and, if BEST, the best IoU of each box as the bits of a float32 ≥ 0.

    As integers, such bits have the order of the numbers, so the largest integer is the largest number.
    """
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x0, y0, x1, y1 = _corners(anchors, index, total)
    left, top, right, bottom = _extent(x0, y0, x1, y1)
    begin, end = _range(first)
    of_highest = tl.zeros([TILE], tl.int32) + tl.where(begin < end, begin, 0)
    iou_of_it = tl.zeros([TILE], tl.float32)
    for m in range(begin, end):
        a0, b0, a1, b1 = _corner(boxes, m)
        if _overlaps(a0, b0, a1, b1, left, top, right, bottom):
            iou = _iou(a0, b0, a1, b1, x0, y0, x1, y1)
            of_highest = tl.where(iou > iou_of_it, m, of_highest)
            iou_of_it = tl.maximum(iou, iou_of_it)
            if BEST:
                bits = tl.max(iou.to(tl.int32, bitcast=True))
                tl.atomic_max(best + m, bits, mask=bits > 0, sem="relaxed")
    at = _at(index, total)
    tl.store(matched + at, of_highest.to(tl.int64), mask=index < total)
    tl.store(highest + at, iou_of_it, mask=index < total)


@triton.jit(do_not_specialize=["total", "num_classes"])
def _label_kernel(
    boxes,
    first_box,
    classes,
    regions,
    first_region,
    anchors,
    matched,
    highest,
    best,
    labels,
    positive,
    total,
    num_classes,
    share,
    THRESHOLDS: tl.constexpr,
    LABELS: tl.constexpr,
    BEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store each anchor's label, and whether it is positive."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    at = _at(index, total)
    inside = index < total
    x0, y0, x1, y1 = _corners(anchors, index, total)
    begin, end = _range(first_box)
    # 1 for a positive, 0 for a negative, -1 for an ignored anchor, as in `match.Matches`.
    outcome = tl.zeros([TILE], tl.int32)
    if begin < end:
        iou = tl.load(highest + at, mask=inside, other=0.0)
        outcome += LABELS[0]
        for i in tl.static_range(len(THRESHOLDS)):
            outcome = tl.where(iou >= THRESHOLDS[i], LABELS[i + 1], outcome)
        if BEST:
            left, top, right, bottom = _extent(x0, y0, x1, y1)
            for m in range(begin, end):
                a0, b0, a1, b1 = _corner(boxes, m)
                highest_of_box = tl.load(best + m)
                if highest_of_box == 0:  # every anchor is the best of a box that overlaps none
                    outcome = tl.full([TILE], 1, tl.int32)
                elif _overlaps(a0, b0, a1, b1, left, top, right, bottom):
                    iou = _iou(a0, b0, a1, b1, x0, y0, x1, y1)
                    outcome = tl.where(iou == highest_of_box, 1, outcome)
    begin, end = _range(first_region)
    ignored = outcome == -1
    for g in range(begin, end):
        a0, b0, a1, b1 = _corner(regions, g)
        covered = _intersection(a0, b0, a1, b1, x0, y0, x1, y1)
        ignored = ignored | ((covered >= share * ((x1 - x0) * (y1 - y0))) & (covered > 0))
    is_positive = outcome == 1
    box = tl.load(matched + at, mask=inside & is_positive, other=0)
    label = tl.load(classes + box, mask=inside & is_positive, other=-1)
    tl.store(labels + at, tl.where(is_positive, label, tl.where(ignored, -1, num_classes)), mask=inside)
    tl.store(positive + at, is_positive, mask=inside)


@triton.jit
def _range(first):
    """The first box (or region) of the program's image, and the first one of the next image."""
    return tl.load(first + tl.program_id(1)), tl.load(first + tl.program_id(1) + 1)


@triton.jit
def _at(index, total):
    """Where the anchors of the program's image are in a tensor (N, R)."""
    return tl.program_id(1).to(tl.int64) * total + index


@triton.jit
def _corners(anchors, index, total):
    """The anchors' four coordinates; where there is no anchor, one that overlaps nothing."""
    at = anchors + index.to(tl.int64) * 4
    inside = index < total
    x0 = tl.load(at, mask=inside, other=float("inf"))
    y0 = tl.load(at + 1, mask=inside, other=float("inf"))
    x1 = tl.load(at + 2, mask=inside, other=float("-inf"))
    y1 = tl.load(at + 3, mask=inside, other=float("-inf"))
    return x0, y0, x1, y1


@triton.jit
def _extent(x0, y0, x1, y1):
    """The box around the anchors of a tile."""
    return tl.min(x0), tl.min(y0), tl.max(x1), tl.max(y1)


@triton.jit
def _corner(boxes, m):
    """The four coordinates of box m."""
    at = boxes + m * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _overlaps(a0, b0, a1, b1, left, top, right, bottom):
    """Whether a box may overlap an anchor of the tile. If not, all IoUs are 0; a box with a NaN has no other.

    Anchors next to each other in memory are next to each other in the image. So most boxes overlap no anchor
    of a tile, and need no division.
    """
    return (a0 < right) & (a1 > left) & (b0 < bottom) & (b1 > top)


@triton.jit
def _intersection(a0, b0, a1, b1, x0, y0, x1, y1):
    """The area that a box and anchors share."""
    width = tl.maximum(tl.minimum(a1, x1) - tl.maximum(a0, x0), 0.0)
    return width * tl.maximum(tl.minimum(b1, y1) - tl.maximum(b0, y0), 0.0)


@triton.jit
def _iou(a0, b0, a1, b1, x0, y0, x1, y1):
    """IoU of a box with anchors, operation by operation as `match.iou_of`, the division rounded as there."""
    intersection = _intersection(a0, b0, a1, b1, x0, y0, x1, y1)
    union = (a1 - a0) * (b1 - b0) + (x1 - x0) * (y1 - y0) - intersection
    return tl.where(intersection > 0, tl.div_rn(intersection, union), 0.0)
