from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator

from focal_d2.modeling.anchors import compute_anchors, grid_of
from tests.conftest import make_cfg

STRIDES = (8, 16, 32, 64, 128)


def make_generator(name: str = "TorchvisionAnchorGenerator"):
    cfg = make_cfg(MODEL__ANCHOR_GENERATOR__NAME=name)
    return build_anchor_generator(cfg, [ShapeSpec(stride=s) for s in STRIDES])


def cells(height: int, width: int) -> list[tuple[int, int]]:
    return [(-(-height // s), -(-width // s)) for s in STRIDES]


def test_corners_are_whole_and_far_levels_are_stretched():
    generator = make_generator()
    anchors = compute_anchors(generator, cells(320, 480), torch.device("cpu")).boxes
    assert torch.equal(anchors, anchors.round())
    # 320 × 480 pixels are 3 × 4 cells of P7: 320 // 3 is 106, 480 // 4 is 120.
    p7 = anchors[-3 * 4 * 9 :].view(3, 4, 9, 4)
    assert torch.equal(p7[1, 0] - p7[0, 0], torch.tensor([0.0, 106.0, 0.0, 106.0]).expand(9, 4))
    assert torch.equal(p7[0, 1] - p7[0, 0], torch.tensor([120.0, 0.0, 120.0, 0.0]).expand(9, 4))


@pytest.mark.parametrize("size, regular", [((256, 384), True), ((320, 480), False), ((256, 416), False)])
def test_the_grid_is_known_where_cells_are_a_stride_apart(size, regular):
    generator, plain = make_generator(), make_generator("DefaultAnchorGenerator")
    grid = grid_of(generator, cells(*size))
    assert (grid is not None) == regular
    if regular:
        rounded = [x.round() for x in plain.cell_anchors]
        assert torch.equal(grid.corners, torch.cat(rounded).double())
        expected = compute_anchors(plain, cells(*size), torch.device("cpu"))
        assert (
            compute_anchors(generator, cells(*size), torch.device("cpu")).boxes - expected.boxes
        ).abs().max() <= 0.5
        assert all(torch.equal(x, y) for x, y in zip(grid[1:], expected.grid[1:], strict=True))
