from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou, nms

from focal_d2.ops.mining import random_numbers, suppress, top_negatives


@pytest.mark.parametrize("count", [0, 3, 10, 1000])
def test_top_negatives_are_the_top_of_a_sorted_list(count):
    loss, negative = torch.rand(60), torch.rand(60) < 0.5
    ranked = sorted(negative.nonzero().flatten().tolist(), key=lambda i: -loss[i].item())
    kept = (
        top_negatives(loss, negative, negatives=int(negative.sum()), count=count).nonzero().flatten().tolist()
    )
    assert sorted(kept) == sorted(ranked[:count])


def test_random_numbers_are_those_of_splitmix64():
    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    assert mix(0) == 0xE220A8397B1DCDAF  # the published generator's first number of seed 0
    positions = torch.tensor([0, 1, 7, 3 << 56, 2**63 - 1])
    for seed in (0, 5, 2**63 - 1):
        expected = [mix(mix(x) ^ mix(seed)) for x in positions.tolist()]
        assert [x % 2**64 for x in random_numbers(seed, positions).tolist()] == expected
    assert len(random_numbers(3, torch.arange(10_000)).unique()) == 10_000


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
    examples = int((loss > float("-inf")).sum())
    decoded: list[int] = []

    def boxes_of(indices):
        decoded.append(len(indices))
        return boxes[indices]

    kept = suppress(loss, boxes_of, lambda b, s: nms(b, s, threshold), examples=examples, count=count)
    assert kept.tolist() == brute_force(loss, boxes, threshold, count)
    if count == 1:
        assert sum(decoded) < 10  # most boxes are never decoded


def test_suppress_of_nothing_is_nothing():
    loss = torch.full((5,), float("-inf"))
    kept = suppress(loss, lambda i: torch.zeros(len(i), 4), lambda b, s: nms(b, s, 0.5), examples=0, count=3)
    assert kept.tolist() == []
