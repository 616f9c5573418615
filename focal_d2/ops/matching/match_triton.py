"""Triton kernels for GPUs: anchor matching.

Nothing here waits for the GPU: no number is read back, and no shape depends on values. Results do not depend
on the order in which programs run: a maximum is the same in any order.

Only `common.find_kernels` imports this module, where Triton is installed. If TRITON_INTERPRET=1 is set,
Triton's interpreter runs the kernels on CPU tensors; the tests do that.

Shapes: see `match`. A program is one block of threads, a tile the elements it works on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# To be tuned on a GPU: anchors of a program, and its warps.
_MATCH_TILE = 512
_MATCH_WARPS = 4


class BestBoxes(NamedTuple):
    """What the IoUs of all pairs say of each anchor."""

    matched: Tensor  # (R,) int64: the first box of the highest IoU
    highest: Tensor  # (R,) float32: that IoU
    is_best: Tensor | None  # (R,) bool: no anchor has a higher IoU with some box; None if not asked for


def find_best_boxes(boxes: Tensor, anchors: Tensor, *, with_is_best: bool) -> BestBoxes:
    """Compare all boxes with all anchors, without the matrix of their IoUs.

    Args:
        boxes: (M, 4) float32, M ≥ 1.
        anchors: (R, 4) float32.
        with_is_best: also say which anchors are a box's best, ties included.
    """
    boxes, anchors = boxes.contiguous(), anchors.contiguous()
    count, total = len(boxes), len(anchors)
    matched = anchors.new_empty(total, dtype=torch.int64)
    highest = anchors.new_empty(total)
    best = anchors.new_zeros(count)
    is_best = anchors.new_empty(total, dtype=torch.bool) if with_is_best else None
    grid = (triton.cdiv(total, _MATCH_TILE),)
    if total:
        # The compiler may not contract a product and a sum: every operation is to round as PyTorch's does.
        options = {"TILE": _MATCH_TILE, "num_warps": _MATCH_WARPS, "enable_fp_fusion": False}
        with torch.cuda.device_of(boxes):
            _match_kernel[grid](
                boxes,
                anchors,
                matched,
                highest,
                best.view(torch.int32),
                count,
                total,
                BEST=with_is_best,
                **options,
            )
            if with_is_best:
                _best_kernel[grid](boxes, anchors, best, is_best, count, total, **options)
    return BestBoxes(matched, highest, is_best)


@triton.jit(do_not_specialize=["count", "total"])
def _match_kernel(
    boxes,
    anchors,
    matched,
    highest,
    best,
    count,
    total,
    BEST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the best box of each anchor and, if BEST, the best IoU of each box as the bits of a float32 ≥ 0.

    As integers, such bits have the order of the numbers, so the largest integer is the largest number.
    """
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < total
    x0, y0, x1, y1 = _corners(anchors, index, inside)
    top = tl.full([TILE], -1.0, tl.float32)
    first = tl.zeros([TILE], tl.int32)
    for m in range(count):
        iou = _iou(boxes, m, x0, y0, x1, y1)
        first = tl.where(iou > top, m, first)
        top = tl.maximum(iou, top)
        if BEST:
            bits = tl.max(iou.to(tl.int32, bitcast=True))
            tl.atomic_max(best + m, bits, mask=bits > 0, sem="relaxed")
    tl.store(matched + index, first.to(tl.int64), mask=inside)
    tl.store(highest + index, top, mask=inside)


@triton.jit(do_not_specialize=["count", "total"])
def _best_kernel(boxes, anchors, best, is_best, count, total, TILE: tl.constexpr):
    """Store for each anchor whether it has the best IoU of a box, to the bit."""
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = index < total
    x0, y0, x1, y1 = _corners(anchors, index, inside)
    is_best_of_any = tl.zeros([TILE], tl.int1)
    for m in range(count):
        is_best_of_any = is_best_of_any | (_iou(boxes, m, x0, y0, x1, y1) == tl.load(best + m))
    tl.store(is_best + index, is_best_of_any, mask=inside)


@triton.jit
def _corners(anchors, index, inside):
    """The anchors' four coordinates; where there is none, an empty anchor, whose IoUs are 0."""
    at = anchors + index.to(tl.int64) * 4
    x0 = tl.load(at, mask=inside, other=0.0)
    y0 = tl.load(at + 1, mask=inside, other=0.0)
    x1 = tl.load(at + 2, mask=inside, other=0.0)
    y1 = tl.load(at + 3, mask=inside, other=0.0)
    return x0, y0, x1, y1


@triton.jit
def _iou(boxes, m, x0, y0, x1, y1):
    """IoU of box m with anchors, operation by operation as `match._iou`, the division rounded as there."""
    a0 = tl.load(boxes + m * 4)
    b0 = tl.load(boxes + m * 4 + 1)
    a1 = tl.load(boxes + m * 4 + 2)
    b1 = tl.load(boxes + m * 4 + 3)
    width = tl.maximum(tl.minimum(a1, x1) - tl.maximum(a0, x0), 0.0)
    height = tl.maximum(tl.minimum(b1, y1) - tl.maximum(b0, y0), 0.0)
    intersection = width * height
    union = (a1 - a0) * (b1 - b0) + (x1 - x0) * (y1 - y0) - intersection
    return tl.where(intersection > 0, tl.div_rn(intersection, union), 0.0)
