"""IoU losses of pairs of boxes, as fvcore and detectron2 compute them, to the bit.

Theirs check that no box has a negative side and select the pairs that overlap, for which the host must wait
for a GPU. Here nothing is checked: a NaN in a box makes the loss NaN.

Shapes: E pairs; boxes (E, 4) XYXY.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_EPSILON = 1e-7  # keeps divisors above 0


class _Pairs(NamedTuple):
    """What the boxes of E pairs share: areas (E,), sides (E, 2)."""

    intersection: Tensor
    union: Tensor
    hull: Tensor  # sides of the smallest box around both
    shift: Tensor  # from the target's centre to the box's


def giou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - GIoU of each pair, (E,) (Rezatofighi et al., arXiv 1902.09630).

    Args:
        boxes: (E, 4).
        targets: (E, 4).
    """
    pairs = _compare(_corners(boxes), _corners(targets))
    hull = pairs.hull[:, 0] * pairs.hull[:, 1]
    return 1 - (_iou(pairs) - (hull - pairs.union) / (hull + _EPSILON))


def diou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - DIoU of each pair, (E,) (Zheng et al., arXiv 1911.08287, eq. 7); see `giou_loss`."""
    pairs = _compare(_corners(boxes), _corners(targets))
    return 1 - _iou(pairs) + _distance(pairs)


def ciou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - CIoU of each pair, (E,) (Zheng et al., arXiv 1911.08287, eq. 10); see `giou_loss`."""
    corners, target_corners = _corners(boxes), _corners(targets)
    pairs = _compare(corners, target_corners)
    iou = _iou(pairs)
    loss = 1 - iou + _distance(pairs)
    v = (4 / math.pi**2) * torch.pow(_angle(target_corners) - _angle(corners), 2)
    with torch.no_grad():
        alpha = v / (1 - iou + v + _EPSILON)
    return loss + alpha * v


# Autograd adds up a corner's gradients in the reverse order of its uses. To be the same to the bit, the
# functions below read the same two tensors in the order in which fvcore's read them.
_Corners = tuple[Tensor, Tensor]  # (E, 2) left and top, (E, 2) right and bottom


def _corners(boxes: Tensor) -> _Corners:
    return boxes[:, :2], boxes[:, 2:]


def _compare(corners: _Corners, target_corners: _Corners) -> _Pairs:
    (low, high), (target_low, target_high) = corners, target_corners
    sides = torch.minimum(high, target_high) - torch.maximum(low, target_low)
    intersection = torch.where((sides > 0).all(1), sides[:, 0] * sides[:, 1], 0.0)
    size, target_size = high - low, target_high - target_low
    area, target_area = size[:, 0] * size[:, 1], target_size[:, 0] * target_size[:, 1]
    return _Pairs(
        intersection,
        union=area + target_area - intersection,
        hull=torch.maximum(high, target_high) - torch.minimum(low, target_low),
        shift=(high + low) / 2 - (target_high + target_low) / 2,
    )


def _iou(pairs: _Pairs) -> Tensor:
    return pairs.intersection / (pairs.union + _EPSILON)


def _distance(pairs: _Pairs) -> Tensor:
    """Return the distance (E,) between the centres over the hull's diagonal, both squared."""
    diagonal = pairs.hull[:, 0] ** 2 + pairs.hull[:, 1] ** 2
    return (pairs.shift[:, 0] ** 2 + pairs.shift[:, 1] ** 2) / (diagonal + _EPSILON)


def _angle(corners: _Corners) -> Tensor:
    """Return the angle (E,) whose tangent is width over height."""
    size = corners[1] - corners[0]
    return torch.atan(size[:, 0] / size[:, 1])
