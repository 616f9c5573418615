from __future__ import annotations

import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes

from focal_d2.modeling import anchors
from focal_d2.modeling.anchors import AnchorCache, grid_of
from tests.waits import PretendedGPU


def make_generator(kind=DefaultAnchorGenerator):
    return kind(sizes=[[16.0, 24.0], [32.0]], aspect_ratios=[[0.5, 2.0], [1.0]], strides=[8, 16], offset=0.5)


def levels(height, width):
    return [(height, width), (height // 2, width // 2)], torch.device("cpu")


def test_anchors_are_made_once_for_a_shape():
    cache = AnchorCache(make_generator())
    first = cache(*levels(8, 6))
    features = [torch.zeros(1, 1, *size) for size in levels(8, 6)[0]]
    assert torch.equal(first.boxes, Boxes.cat(make_generator()(features)).tensor)
    assert cache(*levels(8, 6)) is first
    assert cache(*levels(8, 4)) is not first


def test_the_shape_met_longest_ago_is_forgotten(monkeypatch):
    monkeypatch.setattr(anchors, "_MOST_SHAPES", 2)
    cache = AnchorCache(make_generator())
    first, second = cache(*levels(8, 6)), cache(*levels(8, 4))
    cache(*levels(8, 6))
    cache(*levels(4, 4))
    assert cache(*levels(8, 6)) is first
    assert cache(*levels(8, 4)) is not second


def test_the_grid_says_where_every_anchor_stands():
    made = AnchorCache(make_generator())(*levels(4, 6))
    grid = made.grid
    found = torch.full_like(made.boxes, float("nan"))
    for s in range(len(grid.stride)):
        for y in range(int(grid.height[s])):
            for x in range(int(grid.width[s])):
                shift = torch.tensor([x, y, x, y]) * grid.stride[s]
                index = grid.first[s] + (y * grid.width[s] + x) * grid.step[s]
                found[index] = (grid.corners[s] + shift).float()
    torch.testing.assert_close(found, made.boxes)


def test_another_kind_of_generator_has_no_grid():
    class Own(DefaultAnchorGenerator):
        pass

    assert grid_of(make_generator(Own), [(4, 6), (2, 3)]) is None


def test_a_new_shape_does_not_wait_for_a_gpu():
    expected = AnchorCache(make_generator())(*levels(4, 6))
    with PretendedGPU() as gpu:
        cache, device = AnchorCache(make_generator().to("cuda")), torch.device("cuda:0")
        cache(levels(8, 8)[0], device)  # reads the anchors of a cell, once
        gpu.clear()
        anchors = cache(levels(4, 6)[0], device)
        assert not gpu.waits
        assert not gpu.pageable
        for x, y in zip((anchors.boxes, *anchors.grid), (expected.boxes, *expected.grid), strict=True):
            assert x.is_cuda
            assert torch.equal(x.cpu(), y)
