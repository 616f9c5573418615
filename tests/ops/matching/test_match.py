"""Anchor matching against detectron2's `Matcher`, to the bit."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from focal_d2.modeling.anchors import grid_of
from focal_d2.ops.matching import match
from focal_d2.ops.matching.match import inside_regions, match_anchors

STRIDES = (8, 16, 32, 64, 128)
PAPER = [[s * 2 ** (k / 3) for k in range(3)] for s in (32, 64, 128, 256, 512)]


def make_anchors(height, width, sizes=PAPER, ratios=(0.5, 1.0, 2.0), offset=0.0):
    generator = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=[list(ratios)], strides=STRIDES, offset=offset
    )
    features = [torch.empty(1, 1, -(-height // s), -(-width // s)) for s in STRIDES]
    anchors = generator(features)
    return Boxes.cat(anchors).tensor, grid_of(generator, [f.shape[-2:] for f in features])


def assert_same(boxes, anchors, grid, *, thresholds=(0.4, 0.5), labels=(0, -1, 1), low_quality=True):
    matcher = Matcher(list(thresholds), list(labels), allow_low_quality_matches=low_quality)
    matched, outcome = matcher(pairwise_iou(Boxes(boxes), Boxes(anchors)))
    got = match_anchors(
        boxes, anchors, grid, thresholds=thresholds, labels=labels, low_quality_matches=low_quality
    )
    assert torch.equal(got.outcome, outcome)
    assert torch.equal(got.matched[outcome == 1], matched[outcome == 1])


def random_boxes(count, height, width, low, high, generator):
    """Boxes with sides from `low` to `high` pixels, evenly in the logarithm, centred in the image."""
    sides = low * (high / low) ** torch.rand(count, 2, generator=generator)
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=1)


@pytest.mark.parametrize("seed", range(60))
def test_random_scenes(seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(32, 700, (2,), generator=generator).tolist()
    anchors, grid = make_anchors(height, width, offset=0.5 * (seed % 2))
    for low, high, count in ((4, 600, 12), (1, 8, 10), (300, 3000, 5), (16, 64, 60)):
        boxes = random_boxes(count, height, width, low, high, generator)
        if seed % 3 == 0:
            boxes = boxes.round()  # ties
        if seed % 5 == 0:
            boxes = torch.cat([boxes, boxes[:3]])  # identical boxes
        assert_same(boxes, anchors, grid, low_quality=seed % 4 > 0)


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 32, 32]],
        [[-16, -16, 16, 16], [-16, -16, 16, 16]],  # an anchor, twice
        [[100, 100, 101, 101]],
        [[100.5, 100.5, 100.51, 100.52]],
        [[0, 0, 500, 2]],
        [[250, 0, 252, 400]],
        [[-5000, -5000, -4000, -4000]],  # overlaps nothing: every anchor is its best
        [[10, 10, 60, 60], [9000, 10, 9100, 60]],
        [[50, 50, 50, 80]],  # no area
        [[0, 0, 512, 400]],
        [[-1000, -1000, 3000, 3000]],
        [[5, 5, 37, 37], [5, 5, 37, 37], [4, 4, 36, 36]],
    ],
)
@pytest.mark.parametrize("low_quality", [True, False])
def test_odd_boxes(boxes, low_quality):
    anchors, grid = make_anchors(400, 512)
    assert_same(torch.tensor(boxes, dtype=torch.float32), anchors, grid, low_quality=low_quality)


@pytest.mark.parametrize(
    "thresholds, labels",
    [((0.3, 0.7), (0, -1, 1)), ((0.5,), (0, 1)), ((0.2, 0.5), (1, -1, 0)), ((0.1, 0.2, 0.6), (-1, 0, -1, 1))],
)
def test_other_thresholds(thresholds, labels):
    generator = torch.Generator().manual_seed(0)
    anchors, grid = make_anchors(300, 400)
    boxes = random_boxes(30, 300, 400, 8, 400, generator)
    assert_same(boxes, anchors, grid, thresholds=thresholds, labels=labels)


@pytest.mark.parametrize("low_quality", [True, False])
def test_boxes_in_parts_are_matched_as_all_at_once(monkeypatch, low_quality):
    generator = torch.Generator().manual_seed(0)
    anchors, grid = make_anchors(200, 300)
    boxes = random_boxes(50, 200, 300, 4, 300, generator).round()
    boxes = torch.cat([boxes, boxes[:9]])  # ties between parts
    parts = []
    listed = match._overlaps
    monkeypatch.setattr(match, "_overlaps", lambda part, grid: parts.append(len(part)) or listed(part, grid))
    monkeypatch.setattr(match, "_MOST_BOXES", 7)
    assert_same(boxes, anchors, grid, low_quality=low_quality)
    assert parts == [7] * 8 + [3]


def test_without_a_grid_all_pairs_are_looked_at():
    generator = torch.Generator().manual_seed(0)
    anchors = random_boxes(500, 300, 400, 8, 400, generator)
    assert_same(random_boxes(20, 300, 400, 8, 400, generator), anchors, None)


def test_one_anchor_a_cell_and_images_smaller_than_a_stride():
    anchors, grid = make_anchors(20, 30, sizes=[[16.0], [32.0], [64.0], [128.0], [256.0]], ratios=(1.0,))
    assert_same(torch.tensor([[2.0, 3, 18, 20], [1, 1, 3, 3]]), anchors, grid)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_boxes_of_no_size_to_speak_of(value):
    anchors, grid = make_anchors(64, 64)
    boxes = torch.tensor([[0.0, 0.0, value, 10.0], [10.0, 10.0, 40.0, 40.0], [value] * 4])
    for chosen in ([0, 1], [1, 2], [2]):
        matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
        _, outcome = matcher(pairwise_iou(Boxes(boxes[chosen]), Boxes(anchors)))
        got = match_anchors(
            boxes[chosen], anchors, grid, thresholds=(0.4, 0.5), labels=(0, -1, 1), low_quality_matches=True
        )
        assert torch.equal(got.outcome, outcome)


def test_inside_regions_takes_the_share_of_the_anchor():
    # The region covers all of the first, half of the second (5 of 10 columns), a quarter of the third.
    anchors = torch.tensor([[2.0, 2, 4, 4], [5, 0, 15, 10], [5, 5, 15, 15], [20, 0, 30, 10]])
    region = torch.tensor([[0.0, 0, 10, 10]])
    assert inside_regions(anchors, region, share=0.5).tolist() == [True, True, False, False]
    assert inside_regions(anchors, region, share=0.25).tolist() == [True, True, True, False]
    assert inside_regions(anchors, region, share=1.01).tolist() == [False] * 4


def test_inside_regions_does_not_add_regions_up():
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    halves = torch.tensor([[0.0, 0, 4, 10], [6.0, 0, 10, 10]])
    assert inside_regions(anchors, halves, share=0.5).tolist() == [False]
    assert inside_regions(anchors, halves[:0], share=0.5).tolist() == [False]


def test_inside_regions_needs_an_overlap():
    """Anchors or regions without an area cover nothing, whatever the share."""
    anchors = torch.tensor([[5.0, 5, 5, 9], [0.0, 0, 10, 10]])
    assert inside_regions(anchors, torch.tensor([[0.0, 0, 10, 10]]), share=0.5).tolist() == [False, True]
    assert inside_regions(anchors, torch.tensor([[3.0, 3, 3, 8]]), share=1e-9).tolist() == [False, False]
