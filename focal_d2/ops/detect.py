"""From scores and boxes to detections."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

# Values looked at together when large ones are searched.
_GROUP = 64
# Up to here torchvision's batched NMS takes all classes at once on a CPU, beyond it goes class by class.
_MOST_AT_ONCE = 1000


def indices_above(values: Tensor, cut: float) -> Tensor:
    """Return the indices (E,) int64, rising, of the values (n,) above `cut`, which are to be few.

    On a CPU groups that have none are passed over: their maxima are found far faster than indices.
    """
    groups = len(values) // _GROUP
    if values.device.type != "cpu" or groups == 0:
        return (values > cut).nonzero().squeeze(1)
    # Group g has the elements g, g + groups, …: a maximum over rows runs through memory in order.
    rows = values[: groups * _GROUP].view(_GROUP, groups)
    hit = (~(rows.amax(dim=0) <= cut)).nonzero().squeeze(1)  # a NaN hides what stands beside it
    row, column = (rows[:, hit] > cut).nonzero(as_tuple=True)
    rest = (values[groups * _GROUP :] > cut).nonzero().squeeze(1) + groups * _GROUP
    return torch.cat([row * groups + hit[column], rest])


def best_boxes(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, most: int) -> Tensor:
    """Suppress, class by class, what overlaps a better box; return the indices of at most `most`, best first.

    The first `most` of detectron2's `batched_nms`, ties aside. What it keeps among the best boxes does not
    depend on the others: so these are looked at first, and more only if too few are left.

    Args:
        boxes: (n, 4) XYXY.
        scores: (n,).
        labels: (n,) int64, at least 0.
        threshold: IoU above which the lower score goes.
        most: at least 0.
    """
    if len(boxes) <= _MOST_AT_ONCE or boxes.device.type != "cpu":
        return batched_nms(boxes.float(), scores, labels, threshold)[:most]
    order = scores.argsort(descending=True, stable=True)
    # In float64 classes can stand apart without rounding.
    apart = boxes.double()
    finite = apart[apart.isfinite()]
    reach = finite.abs().max() * 2 + 1 if len(finite) else 1.0
    apart = apart + (labels * reach).unsqueeze(1)
    count = min(len(order), 4 * most)
    while True:
        first = order[:count]
        kept = first[nms(apart[first], scores[first].double(), threshold)]
        if len(kept) >= most or count == len(order):
            return kept[:most]
        count = min(len(order), 4 * count)
