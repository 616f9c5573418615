from __future__ import annotations

import pytest
import torch
from torchvision.ops import batched_nms

from focal_d2.ops.detect import best_boxes, indices_above


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000, 64 * 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_are_those_of_nonzero(length, dtype):
    values = torch.randn(length).to(dtype)
    for cut in (-100.0, 0.0, 2.5, 100.0):
        found = indices_above(values, cut)
        assert torch.equal(found.sort().values, (values > cut).nonzero().squeeze(1))


def test_neither_nan_nor_infinity_hides_a_value():
    values = torch.zeros(64 * 4)
    values[0::4] = float("nan")  # in every group that has one of these
    values[1::4] = float("inf")
    values[4], values[8] = 3.0, 2.0
    assert indices_above(values, 1.0).sort().values.tolist() == sorted([4, 8, *range(1, 256, 4)])


def scene(boxes, classes, seed):
    torch.manual_seed(seed)
    low = torch.rand(boxes, 2) * 300
    return (
        torch.cat([low, low + 5 + torch.rand(boxes, 2) * 80], 1),
        torch.rand(boxes),
        torch.randint(0, classes, (boxes,)),
    )


@pytest.mark.parametrize("classes", [1, 80])
@pytest.mark.parametrize("count", [0, 1, 700, 1001, 5000])
@pytest.mark.parametrize("most", [0, 1, 100, 10_000])
def test_best_boxes_are_the_first_of_detectron2s(count, classes, most):
    for seed in range(5):
        boxes, scores, labels = scene(count, classes, seed)
        expected = batched_nms(boxes, scores, labels, 0.5)[:most]
        assert torch.equal(best_boxes(boxes, scores, labels, 0.5, most), expected)


def test_more_are_looked_at_if_too_few_are_left():
    # 5,000 copies of one box, then boxes apart from each other with lower scores.
    one = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    apart = one + torch.arange(1, 51).unsqueeze(1) * 100
    boxes = torch.cat([one.expand(5000, 4), apart])
    scores = torch.linspace(1, 0, len(boxes))
    found = best_boxes(boxes, scores, torch.zeros(len(boxes), dtype=torch.int64), 0.5, 20)
    assert found.tolist() == [0, *range(5000, 5019)]


def test_a_box_of_no_number_changes_nothing_for_the_others():
    boxes, scores, labels = scene(2000, 3, 0)
    expected = best_boxes(boxes[1:], scores[1:], labels[1:], 0.5, 100) + 1
    boxes[0], scores[0] = float("nan"), 0.0
    assert torch.equal(best_boxes(boxes, scores, labels, 0.5, 100), expected)
