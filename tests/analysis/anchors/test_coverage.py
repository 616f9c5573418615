from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes

from focal_d2 import UserError
from focal_d2.analysis.anchors.coverage import best_anchors, grids_of, recall
from focal_d2.modeling.anchors import AnchorLayout, build_layout
from tests.conftest import make_cfg

STRIDES = [8, 16, 32, 64, 128]
PAPER = [[s * 2 ** (k / 3) for k in range(3)] for s in (32, 64, 128, 256, 512)]


def make_layout(
    sizes=PAPER, ratios=(0.5, 1.0, 2.0), strides=STRIDES, offset=0.0, make=DefaultAnchorGenerator
):
    generator = make(sizes=sizes, aspect_ratios=[list(ratios)], strides=strides, offset=offset)
    return AnchorLayout(generator, strides, 32)


def find(boxes, layout, size=(128, 128)):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return best_anchors(boxes, np.zeros(len(boxes), dtype=int), np.array([size]), grids_of(layout))


def dense_iou(boxes, layout, size):
    """All IoUs (B, R) in float64, and of each anchor its level and place within it."""
    cells = layout.cells(*size)
    made = layout.generator([torch.empty(1, 1, *x) for x in cells])
    anchors = Boxes.cat(made).tensor.double().numpy()
    low = np.maximum(boxes[:, None, :2], anchors[:, :2])
    sides = (np.minimum(boxes[:, None, 2:], anchors[:, 2:]) - low).clip(min=0)
    overlap = sides.prod(axis=2)
    areas = [(x[:, 2:] - x[:, :2]).prod(axis=1) for x in (boxes, anchors)]
    iou = overlap / (areas[0][:, None] + areas[1] - overlap)
    level = np.repeat(np.arange(len(made)), [len(x) for x in made])
    per_cell = layout.generator.num_anchors[0]
    return iou, level, np.concatenate([np.arange(len(x)) % per_cell for x in made])


def test_best_iou_by_hand():
    layout = make_layout(sizes=[[32.0]], ratios=(1.0,), strides=[8])
    boxes = [
        [48, 40, 80, 72],  # around (64, 56), which is on the grid: an anchor
        [52, 40, 84, 72],  # 4 pixels to the right, between two cells: 28 of 32 columns are shared
        [52, 44, 84, 76],  # and 4 down
        [48, 40, 64, 72],  # around (56, 56), half as wide: within an anchor, half its area
        [120, 0, 152, 32],  # centred beyond the last cell, which is at 120
    ]
    expected = [
        1,
        28 * 32 / (2 * 1024 - 28 * 32),
        28 * 28 / (2 * 1024 - 28 * 28),
        0.5,
        16 * 32 / (2 * 1024 - 16 * 32),
    ]
    got = find(boxes, layout)
    np.testing.assert_allclose(got.iou, expected, rtol=1e-12)
    assert got.level.tolist() == [0] * 5
    assert got.anchor.tolist() == [0] * 5


def test_level_and_anchor_are_named():
    layout = make_layout(sizes=[[16.0, 32.0], [64.0, 128.0]], ratios=(0.5, 2.0), strides=[8, 16], offset=0.5)
    wide, high = 128 * 2**0.5, 128 / 2**0.5  # ratio 0.5 is half as high as wide
    found = find([[72 - wide / 2, 72 - high / 2, 72 + wide / 2, 72 + high / 2]], layout, (160, 160))
    assert (found.level.tolist(), found.anchor.tolist()) == ([1], [2])
    assert found.iou == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", range(40))
def test_best_iou_is_that_of_the_whole_matrix(seed):
    rng = np.random.default_rng(seed)
    layout = make_layout(offset=0.5 * (seed % 2))
    size = rng.integers(20, 500, 2).tolist()
    sides = np.concatenate([low * (high / low) ** rng.random((12, 2)) for low, high in ((4, 600), (0.1, 8))])
    centres = (rng.random((24, 2)) * 1.4 - 0.2) * size[::-1]  # some outside
    boxes = np.concatenate([centres - sides / 2, centres + sides / 2], axis=1)
    boxes[:6] = boxes[:6].clip(0, [*size[::-1]] * 2)  # some at the border, some without area
    iou, level, anchor = dense_iou(boxes, layout, size)
    got = find(boxes, layout, size)
    # The generator rounds corners to float32.
    np.testing.assert_allclose(got.iou, iou.max(axis=1), atol=2e-6)
    # What is named is a best one.
    named = [
        row[(level == at) & (anchor == place)].max() if row.max() else 0
        for row, at, place in zip(iou, got.level, got.anchor, strict=True)
    ]
    np.testing.assert_allclose(named, got.iou, atol=2e-6)


def test_each_box_sees_the_grid_of_its_own_image():
    boxes = np.array([[240.0, 240, 272, 272]] * 2)
    sizes = np.array([[64, 64], [300, 300]])
    got = best_anchors(
        boxes, np.array([0, 1]), sizes, grids_of(make_layout(sizes=[[32.0]] * 5, ratios=(1.0,)))
    )
    assert got.iou.tolist() == [0, 1]


def test_boxes_that_nothing_touches_have_no_anchor():
    got = find([[5000, 5000, 5001, 5001], [50, 50, 50, 90], [float("nan")] * 4], make_layout())
    assert got.iou.tolist() == [0, 0, 0]
    assert got.level.tolist() == got.anchor.tolist() == [-1, -1, -1]


def test_no_boxes_have_no_anchors():
    got = find([], make_layout())
    assert [x.shape for x in got] == [(0,)] * 3
    assert np.isnan(recall(got.iou, 0.5))


def test_chunks_do_not_show(monkeypatch):
    rng = np.random.default_rng(0)
    corners = rng.random((50, 2)) * 100
    boxes = np.concatenate([corners, corners + rng.random((50, 2)) * 60], axis=1)
    whole = find(boxes, make_layout())
    monkeypatch.setattr("focal_d2.analysis.anchors.coverage._CHUNK", 7)
    for a, b in zip(find(boxes, make_layout()), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_recall_counts_the_threshold_itself():
    assert recall(np.array([0.2, 0.5, 0.7, 0.49]), 0.5) == 0.5


def test_grids_are_those_of_the_config():
    cfg = make_cfg(MODEL__ANCHOR_GENERATOR__OFFSET=0.5, MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[0.5, 2.0]])
    grids = grids_of(build_layout(cfg))
    assert (grids.layout.strides, grids.offset, grids.layout.divisibility) == (STRIDES, 0.5, 32)
    # 32 pixels, ratio 0.5: 32 · √2 wide and 32 / √2 high.
    np.testing.assert_allclose(grids.shapes[0][0], [45.254834, 22.627417], rtol=1e-6)
    assert [x.shape for x in grids.shapes] == [(6, 2)] * 5


def test_anchors_of_another_kind_are_refused():
    class Own(DefaultAnchorGenerator):
        pass

    with pytest.raises(UserError, match=r"MODEL.ANCHOR_GENERATOR.NAME makes a Own; .* DefaultAnchorGen"):
        grids_of(make_layout(make=Own))
