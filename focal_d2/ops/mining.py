"""Choosing the examples that a loss is summed over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def top_negatives(score: Tensor, negative: Tensor, *, negatives: int, count: int) -> Tensor:
    """Mark the `count` negatives of the highest score.

    Args:
        score: (R,) of each example: its loss, or a random number.
        negative: (R,) bool.
        negatives: how many of `negative` are True. The caller knows it, so that the host waits for no GPU.
        count: how many to mark; all, if there are fewer.

    Returns:
        (R,) bool.
    """
    indices = torch.nonzero_static(negative, size=negatives).squeeze(1)
    top = score[indices].topk(min(count, negatives)).indices
    keep = torch.zeros_like(negative)
    keep[indices[top]] = True
    return keep


def random_numbers(seed: int, positions: Tensor) -> Tensor:
    """Return a random number for each position, the same on any device and for any other positions.

    The numbers are those of SplitMix64's mixing function (Steele, Lea, Flood, "Fast Splittable Pseudorandom
    Number Generators", OOPSLA 2014), which maps different positions to different numbers.

    Args:
        seed: in [0, 2^63).
        positions: (R,) int64.

    Returns:
        (R,) int64, over the whole range of int64.
    """
    mixed_seed = int(_mix(torch.tensor(seed)))  # on the CPU: a copy to a GPU would make the host wait
    return _mix(_mix(positions) ^ mixed_seed)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of int64; products and sums wrap around."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift in zeros, where `>>` repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def suppress(
    loss: Tensor,
    boxes_of: Callable[[Tensor], Tensor],
    nms: Callable[[Tensor, Tensor], Tensor],
    *,
    examples: int,
    count: int,
) -> Tensor:
    """Keep the `count` examples of the highest loss that survive non-maximum suppression by loss.

    Greedy suppression goes through the examples in falling order, so which of the first n it keeps does not
    depend on the rest. n is doubled until enough are kept; most boxes are never decoded.

    Args:
        loss: (R,) of each example; -inf for examples that must not be chosen. NaN is kept first.
        boxes_of: indices (E,) -> boxes (E, 4).
        nms: boxes (E, 4), scores (E,) -> kept indices in falling order of score.
        examples: how many losses are above -inf. The caller knows it, so that the host waits for no GPU.
        count: how many to keep.

    Returns:
        Indices (at most `count`,) in falling order of loss.
    """
    loss = loss.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    order = loss.argsort(descending=True, stable=True)[:examples]
    seen = 4 * count
    while True:
        head = order[:seen]
        kept = head[nms(boxes_of(head), loss[head])]
        if len(kept) >= count or seen >= len(order):
            return kept[:count]
        seen *= 2
