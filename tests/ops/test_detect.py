from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import batched_nms

from focal_d2.ops import detect
from focal_d2.ops.detect import best_boxes, indices_of_best


def check_best(values, cut, most):
    """The same as sorting each row."""
    places = indices_of_best(values, cut, most)
    expected = []
    for row, flat in enumerate(values):
        above = (flat > cut).nonzero().squeeze(1)
        best = above[flat[above].sort(descending=True, stable=True).indices[:most]]
        expected.append(best.sort().values + row * len(flat))
    assert torch.equal(places.sort().values, torch.cat([places[:0], *expected]))
    row = places // max(1, values.shape[1])
    assert torch.equal(row, row.sort().values)
    return places


@pytest.mark.parametrize("length", [0, 1, 63, 1000, 4096, 8192, 5 * 4096 + 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_above_a_cut_are_found(length, dtype):
    for rows, step in ((0, 0), (1, 0), (3, 0), (2, 0.25)):
        values = torch.randn(rows, length)
        if step:  # many ties
            values = (values / step).round() * step
        for cut in (-100.0, 0.0, 2.5, 100.0):
            for most in (0, 1, 20, 1000):
                check_best(values.to(dtype), cut, most)


def test_of_equal_values_the_first_are_taken_in_order():
    values = torch.full((2, 3 * 4096), -4.6)
    assert check_best(values, -5.0, 10).tolist() == [*range(10), *range(3 * 4096, 3 * 4096 + 10)]
    assert len(check_best(values, -4.0, 10)) == 0
    values[0, 5000] = values[0, 7] = -4.5
    assert check_best(values, -5.0, 4)[:4].tolist() == [7, 5000, 0, 1]


def test_neither_nan_nor_infinity_hides_a_value():
    values = torch.zeros(2, 3 * 4096)
    values[0, 0::4] = float("nan")  # in every group that has one of these
    values[0, 1::4] = float("inf")
    values[0, 4], values[0, 8], values[1, 6] = 3.0, 2.0, 5.0
    for most in (1, 10, 10_000):
        check_best(values, 1.0, most)
    values[0, 1::4] = -float("inf")
    assert check_best(values, 1.0, 10).tolist() == [4, 8, 3 * 4096 + 6]
    values[0, 0::4] = float("nan")
    assert check_best(values, 1.0, 10).tolist() == [3 * 4096 + 6]


def test_of_many_values_above_a_cut_few_are_looked_at(monkeypatch):
    """One in eight logits passes a score of 0.02, as in a model's first evaluations."""
    values = torch.randn(2, 9 * 80 * 32 * 32) * 0.6 - 4.6
    cut = math.log(0.02 / 0.98)
    assert (values > cut).sum() > 150_000
    sizes = []
    largest = detect._largest
    monkeypatch.setattr(detect, "_largest", lambda x, most: sizes.append(len(x)) or largest(x, most))
    assert len(check_best(values, cut, 1000)) == 2000
    assert len(sizes) == 2
    assert max(sizes) < 1200


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


@pytest.mark.parametrize("count", [900, 1500])
def test_of_boxes_with_equal_scores_the_first_come_first(count):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]) + torch.arange(count).unsqueeze(1) * 20
    scores = torch.full((count,), 0.5)
    labels = torch.zeros(count, dtype=torch.int64)
    assert best_boxes(boxes, scores, labels, 0.5, 50).tolist() == list(range(50))
