"""Choosing the examples that a loss is taken over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top_negatives(score: Tensor, negative: Tensor, *, count: int) -> Tensor:
    """Mark the `count` negatives of the highest score.

    Args:
        score: (R,) of each example: its loss, or a random number.
        negative: (R,) bool.
        count: how many; all, if there are fewer.

    Returns:
        (R,) bool.
    """
    indices = negative.nonzero().squeeze(1)
    top = score[indices].topk(min(count, len(indices))).indices
    keep = torch.zeros_like(negative)
    keep[indices[top]] = True
    return keep


def suppress(
    loss: Tensor, boxes_of: Callable[[Tensor], Tensor], nms: Callable[[Tensor, Tensor], Tensor], *, count: int
) -> Tensor:
    """Keep the `count` examples of the highest loss that survive non-maximum suppression by loss.

    Greedy suppression looks at examples in falling order, so what it keeps of the first n does not depend
    on the rest: n doubles until enough are kept, and most boxes are never decoded.

    Args:
        loss: (R,) of each example; -inf for those that take no part. NaN is kept first.
        boxes_of: indices (E,) -> boxes (E, 4).
        nms: boxes (E, 4), scores (E,) -> kept indices in falling order of score.
        count: how many to keep.

    Returns:
        Indices (at most `count`,) in falling order of loss.
    """
    loss = loss.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    order = loss.argsort(descending=True, stable=True)[: int((loss > float("-inf")).sum())]
    seen = 4 * count
    while True:
        head = order[:seen]
        kept = head[nms(boxes_of(head), loss[head])]
        if len(kept) >= count or seen >= len(order):
            return kept[:count]
        seen *= 2
