from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou, nms

from focal_d2.ops.mining import suppress, top_negatives


@pytest.mark.parametrize("count", [0, 3, 10, 1000])
def test_top_negatives_are_the_top_of_a_sorted_list(count):
    loss, negative = torch.rand(60), torch.rand(60) < 0.5
    ranked = sorted(negative.nonzero().flatten().tolist(), key=lambda i: -loss[i].item())
    kept = top_negatives(loss, negative, count=count).nonzero().flatten().tolist()
    assert sorted(kept) == sorted(ranked[:count])


def brute_force(loss, boxes, threshold, count):
    kept: list[int] = []
    for i in loss.argsort(descending=True).tolist():
        if loss[i] == float("-inf") or len(kept) == count:
            break
        overlaps = box_iou(boxes[i : i + 1], boxes[kept]) if kept else torch.zeros(1, 1)
        if overlaps.max() <= threshold:
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.5, 0.7])
@pytest.mark.parametrize("count", [1, 8, 64, 500])
def test_suppress_keeps_what_brute_force_keeps(count, threshold):
    low = torch.rand(300, 2) * 40
    boxes = torch.cat([low, low + 5 + torch.rand(300, 2) * 20], 1)
    loss = torch.rand(300)
    loss[torch.rand(300) < 0.1] = float("-inf")
    decoded: list[int] = []

    def boxes_of(indices):
        decoded.append(len(indices))
        return boxes[indices]

    kept = suppress(loss, boxes_of, lambda b, s: nms(b, s, threshold), count=count)
    assert kept.tolist() == brute_force(loss, boxes, threshold, count)
    if count == 1:
        assert sum(decoded) < 10  # most boxes are never decoded


def test_suppress_of_nothing_is_nothing():
    loss = torch.full((5,), float("-inf"))
    kept = suppress(loss, lambda i: torch.zeros(len(i), 4), lambda b, s: nms(b, s, 0.5), count=3)
    assert kept.tolist() == []
