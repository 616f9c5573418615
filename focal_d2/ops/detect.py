"""From scores and boxes to detections."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

# Values of a group, of which only the maximum is computed first. The groups of a block are next to each
# other, so that the maxima are computed in memory that stays in the cache.
_GROUP = 64
_BLOCK = 64 * _GROUP
# Up to here torchvision's batched NMS takes all classes at once on a CPU, beyond it goes class by class.
_MOST_AT_ONCE = 1000


def indices_of_best(values: Tensor, cut: float, most: int) -> Tensor:
    """Return the indices of the `most` largest values above `cut` of each row; of equal values the first.

    Args:
        values: (N, n) float; NaN is never returned.
        cut: a number.
        most: k, at least 0.

    Returns:
        (E,) int64, into the flattened values, row by row; within a row equal values are in order.
    """
    flat = values.flatten()
    if values.device.type == "cpu" and 0 < most < values.shape[1] // _GROUP:
        places = _likely(values, cut, most)
        places = places[flat[places] > cut]
    else:
        places = (flat > cut).nonzero().squeeze(1)
    if len(places) <= most:
        return places
    best = []
    row_lengths = (places // values.shape[1]).bincount().tolist()
    for row in places.split(row_lengths):
        if len(row) > most:
            row = row[_largest(flat[row], most)]
        best.append(row)
    return torch.cat(best)


def _likely(values: Tensor, cut: float, most: int) -> Tensor:
    """Return rising indices (E,) into the flattened values (N, n), which include all that are wanted.

    Finding the maximum of a group of values is far faster than finding indices. The k-th largest maximum of
    a row is at most the row's k-th largest value, so groups whose maximum is lower are left out.
    """
    length = values.shape[1]
    whole = length // _BLOCK * _BLOCK
    blocks = values[:, :whole].unflatten(1, (-1, _GROUP, _BLOCK // _GROUP))  # (N, blocks, _GROUP, groups)
    maxima = blocks.amax(dim=2)
    least = values.new_full((len(values), 1), cut)
    # The maximum of a group that contains NaN is NaN: the condition keeps such groups.
    row, block, group = (~(maxima <= cut)).nonzero(as_tuple=True)
    known = maxima.flatten(1)
    if len(row) > most <= known.shape[1]:
        known = known.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        least = least.maximum(known.topk(most, sorted=False).values.amin(dim=1, keepdim=True))
        row, block, group = (~(maxima < least.unsqueeze(2))).nonzero(as_tuple=True)
    if len(row) > maxima.numel() // 2:  # many values are equal
        return (values >= least).flatten().nonzero().squeeze(1)
    chosen, place = (blocks[row, block, :, group] >= least[row]).nonzero(as_tuple=True)
    first = row * length + block * _BLOCK + group
    places = first[chosen] + place * (_BLOCK // _GROUP)
    if whole < length:
        row, rest = (values[:, whole:] >= least).nonzero(as_tuple=True)
        places = torch.cat([places, row * length + whole + rest])
    return places.sort().values


def _largest(values: Tensor, most: int) -> Tensor:
    """Return the indices of the `most` largest of the values (n,), n > `most`; of equal values the first."""
    if most == 0:
        return values.new_zeros(0, dtype=torch.int64)
    least = values.topk(most, sorted=False).values.amin()
    above = (values > least).nonzero().squeeze(1)
    equal = (values == least).nonzero().squeeze(1)
    return torch.cat([above, equal[: most - len(above)]])


def best_boxes(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, most: int) -> Tensor:
    """Suppress boxes that overlap a better box of their class; return at most `most` indices, best first.

    These are the first `most` indices of detectron2's `batched_nms`, except for the order of equal scores.
    Which of the best boxes are kept does not depend on the others. So the best boxes are suppressed first,
    and more only if too few remain.

    Args:
        boxes: (n, 4) XYXY.
        scores: (n,).
        labels: (n,) int64, at least 0.
        threshold: IoU above which the box of the lower score is suppressed.
        most: at least 0.
    """
    if len(boxes) <= _MOST_AT_ONCE or boxes.device.type != "cpu":
        return batched_nms(boxes.float(), scores, labels, threshold)[:most]
    order = scores.argsort(descending=True, stable=True)
    count = min(len(order), 4 * most)
    while True:
        first = order[:count]
        # float64 has room to move the classes apart without rounding.
        apart = boxes[first].double()
        reach = torch.where(apart.isfinite(), apart, 0.0).abs().max() * 2 + 1 if count else 1.0
        apart = apart + (labels[first] * reach).unsqueeze(1)
        kept = first[nms(apart, scores[first].double(), threshold)]
        if len(kept) >= most or count == len(order):
            return kept[:most]
        count = min(len(order), 4 * count)
