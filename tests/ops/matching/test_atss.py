"""ATSS against algorithm 1 of its paper (arXiv 1912.02424), written as plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, pairwise_iou

from focal_d2.modeling.anchors import grid_of
from focal_d2.ops.matching import atss
from focal_d2.ops.matching.atss import match_anchors_atss
from focal_d2.ops.matching.match import AnchorGrid, Matches
from tests.waits import PretendedGPU

ONE = ([[8.0 * 8], [8.0 * 16], [8.0 * 32]], [1.0])  # the paper's: one square of 8 strides a cell
NINE = ([[s * 2 ** (i / 3) for i in range(3)] for s in (32, 64, 128)], [0.5, 1.0, 2.0])  # RetinaNet's
UNEQUAL = ([[24.0], [32.0, 48.0], [64.0]], [1.0])


class Scene:
    """The anchors of an image, level by level."""

    def __init__(self, height, width, anchors=ONE, *, strides=(8, 16, 32), offset=0.5):
        sizes, ratios = anchors
        generator = DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=[ratios], strides=list(strides), offset=offset
        )
        self.strides, self.offset, self.per_cell = strides, offset, generator.num_cell_anchors
        self.cells = [(-(-height // s), -(-width // s)) for s in strides]
        features = [torch.empty(1, 1, *cells) for cells in self.cells]
        self.anchors = Boxes.cat(generator(features)).tensor
        self.grid = grid_of(generator, self.cells)

    def match(self, boxes: torch.Tensor, k: int) -> Matches:
        return match_anchors_atss(boxes, self.anchors, self.grid, topk=k)

    def positives_by_rule(self, boxes: torch.Tensor, k: int) -> dict[int, int]:
        """Return the box of each positive anchor."""
        ious = pairwise_iou(Boxes(boxes), Boxes(self.anchors)).tolist()
        box_of: dict[int, int] = {}
        for g, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
            candidates: list[tuple[int, float, float]] = []  # anchor, and its centre
            first = 0
            for stride, (height, width), per_cell in zip(
                self.strides, self.cells, self.per_cell, strict=True
            ):
                centres = [
                    ((column + self.offset) * stride, (row + self.offset) * stride)
                    for row in range(height)
                    for column in range(width)
                ]
                distances = [((x0 + x1) / 2 - x) ** 2 + ((y0 + y1) / 2 - y) ** 2 for x, y in centres]
                nearest = sorted(range(len(centres)), key=distances.__getitem__)[:k]
                for cell in nearest:
                    for a in range(per_cell):
                        candidates.append((first + cell * per_cell + a, *centres[cell]))
                first += len(centres) * per_cell
            values = [ious[g][anchor] for anchor, _, _ in candidates]
            mean = math.fsum(values) / len(values)
            variance = math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
            threshold = mean + math.sqrt(variance)
            for (anchor, x, y), iou in zip(candidates, values, strict=True):
                if iou >= threshold - 1e-6 and x0 < x < x1 and y0 < y < y1:
                    earlier = box_of.get(anchor)
                    if earlier is None or iou > ious[earlier][anchor]:
                        box_of[anchor] = g
        return box_of


def random_scene(seed: int) -> tuple[Scene, torch.Tensor, int]:
    """Draw an image, 1 to 12 boxes and k: boxes on whole pixels (ties), twice the same, and outside."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    anchors = (ONE, NINE, UNEQUAL)[whole(0, 3)]
    strides = ((8, 16, 32), (7, 14, 28))[whole(0, 4) == 0]
    height, width = whole(1, 9) * 11, whole(1, 4) * 30
    # Distances are exact with such an offset, so that equal ones are equal in any order of operations.
    scene = Scene(height, width, anchors, strides=strides, offset=(0.0, 0.5, 0.25)[whole(0, 3)])
    count = whole(1, 12)
    sides = 3 * 40 ** torch.rand(count, 2, generator=generator)
    centres = torch.rand(count, 2, generator=generator) * 160 - 30
    boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=1)
    if whole(0, 2):
        boxes = (boxes / 4).round() * 4
    if whole(0, 3) == 0:
        boxes = torch.cat([boxes, boxes[: whole(1, 3)]])
    return scene, boxes, (9, 1, 3, 15)[whole(0, 4)]


def check_scene(seed: int) -> int:
    """Compare with the rule; return the number of positive anchors."""
    scene, boxes, k = random_scene(seed)
    matched, outcome = scene.match(boxes, k)
    expected = scene.positives_by_rule(boxes, k)
    assert outcome.nonzero().flatten().tolist() == sorted(expected), seed
    assert {a: int(matched[a]) for a in expected} == expected, seed
    assert set(outcome.tolist()) <= {0, 1}
    return len(expected)


def test_random_scenes_are_as_by_the_rule():
    assert sum(map(check_scene, range(300))) > 300


def test_a_scene_by_hand():
    # One level of 3 × 3 cells of 8 pixels with anchors of 16 × 16, k = 4, a box of 16 × 16 with its centre in
    # the middle of four cells. Each has an overlap of 12 · 12 pixels, 144 / (512 - 144) = 0.391, so the mean
    # is 0.391, the standard deviation 0, and all four are positive.
    scene = Scene(24, 24, ([[16.0]], [1.0]), strides=(8,))
    assert scene.match(torch.tensor([[0.0, 0, 16, 16]]), 4).outcome.tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0]
    # With k = 9 the mean is (4 · 0.391 + 4 · 48/464 + 16/496) / 9 = 0.224, the standard deviation of a sample
    # 0.161: the same four are positive. Moved by 4 pixels, the box is the anchor of the middle: the mean is
    # (1 + 4 · 1/3 + 4 · 1/7) / 9 = 0.323, the standard deviation 0.279, and 1/3 is below their sum.
    assert scene.match(torch.tensor([[0.0, 0, 16, 16]]), 9).outcome.tolist() == [1, 1, 0, 1, 1, 0, 0, 0, 0]
    assert scene.match(torch.tensor([[4.0, 4, 20, 20]]), 9).outcome.tolist() == [0] * 4 + [1] + [0] * 4


def test_an_anchor_of_two_boxes_belongs_to_the_one_of_higher_iou_and_of_equal_ones_to_the_first():
    scene = Scene(24, 24, ([[16.0]], [1.0]), strides=(8,))
    near, far = [4.0, 4, 20, 20], [4.0, 4, 20, 21]
    for boxes, expected in (([far, near], 1), ([near, far], 0), ([near, near], 0)):
        matched, outcome = scene.match(torch.tensor(boxes), 9)
        assert (int(outcome[4]), int(matched[4])) == (1, expected)


@pytest.mark.parametrize(
    "box",
    [
        [-500.0, -500, -400, -400],
        [9.0, 9, 11, 11],  # holds no centre
        [4.0, 0, 12, 24],  # all centres of two columns are on its edges
        [10.0, 10, 10, 30],  # no area
        [float("nan")] * 4,
        [0.0, 0, float("inf"), float("inf")],
    ],
)
def test_boxes_that_get_no_anchor(box):
    scene = Scene(24, 24, ([[16.0]], [1.0]), strides=(8,))
    good = [4.0, 4, 20, 20]
    matched, outcome = scene.match(torch.tensor([box, good, box]), 9)
    assert outcome.nonzero().flatten().tolist() == [4]
    assert int(matched[4]) == 1


def test_boxes_in_parts_are_matched_as_all_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scene = Scene(80, 100, NINE)
    low = torch.rand(40, 2, generator=generator) * 80
    boxes = torch.cat([low, low + 4 + 60 * torch.rand(40, 2, generator=generator)], 1).round().repeat(2, 1)
    expected = scene.match(boxes, 9)
    parts = []
    find = atss._find_candidates
    monkeypatch.setattr(atss, "_find_candidates", lambda part, *x: parts.append(len(part)) or find(part, *x))
    monkeypatch.setattr(atss, "_MOST_CANDIDATES", 7 * 27 * 9)
    matched, outcome = scene.match(boxes, 9)
    assert parts == [7] * 11 + [3]
    assert torch.equal(outcome, expected.outcome)
    assert torch.equal(matched[outcome == 1], expected.matched[outcome == 1])


def test_the_host_waits_for_no_gpu():
    scene, boxes, k = random_scene(3)
    expected = scene.match(boxes, k)
    with PretendedGPU() as gpu:
        on_gpu = [x.to("cuda") for x in (boxes, scene.anchors)]
        grid = AnchorGrid(*(x.to("cuda") for x in scene.grid))
        gpu.clear()
        matches = match_anchors_atss(*on_gpu, grid, topk=k)
        assert gpu.waits == []
        assert torch.equal(matches.outcome.cpu(), expected.outcome)
