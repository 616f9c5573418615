from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from focal_d2.modeling import FocalRetinaNetHead
from tests.conftest import make_cfg

SHAPES = [ShapeSpec(channels=32, stride=s) for s in (8, 16, 32, 64, 128)]


PRIOR_BIAS = torch.tensor([-1.0, -2.0, -3.0])


def make_head(cfg) -> FocalRetinaNetHead:
    return FocalRetinaNetHead(cfg, SHAPES, num_classes=3, prior_bias=PRIOR_BIAS)


def features() -> list[torch.Tensor]:
    return [torch.randn(2, 32, 64 // s, 64 // s) for s in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("channels, expected", [(0, 32), (48, 48)])
@pytest.mark.parametrize("num_convs", [1, 3])
def test_head_width_and_depth_come_from_yaml(channels, expected, num_convs):
    cfg = make_cfg(MODEL__FOCAL__HEAD__CHANNELS=channels, MODEL__RETINANET__NUM_CONVS=num_convs)
    head = make_head(cfg)
    convs = [m for m in head.cls_subnet.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convs] == [expected] * num_convs
    logits, deltas = head(features())
    assert [tuple(x.shape) for x in logits] == [(2, 27, 64 // s, 64 // s) for s in (1, 2, 4, 8, 16)]
    assert [x.shape[1] for x in deltas] == [36] * 5


@pytest.mark.parametrize("norm, count", [("", 0), ("GN", 4), ("BN", 20)])
def test_head_norm_comes_from_yaml(norm, count):
    cfg = make_cfg(MODEL__RETINANET__NUM_CONVS=2, MODEL__RETINANET__NORM=norm)
    head = make_head(cfg)
    norms = [m for m in head.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    # Two subnets of two convolutions; BN keeps statistics for each of five levels.
    assert len(norms) == count
    head(features())
    if norm == "BN":
        means = [m.running_mean for m in norms[:5]]
        assert all(not torch.equal(means[0], m) for m in means[1:])


def test_head_is_shared_over_levels():
    head = make_head(make_cfg())
    x = torch.randn(1, 32, 8, 8)
    logits, deltas = head([x] * 5)
    assert all(torch.equal(level, logits[0]) for level in logits)
    assert all(torch.equal(level, deltas[0]) for level in deltas)


def test_head_initialisation():
    head = make_head(make_cfg(MODEL__FPN__OUT_CHANNELS=256))
    for name, parameter in head.named_parameters():
        if name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.01, rel=0.05)
        elif not name.startswith("cls_score"):
            assert parameter.abs().max().item() == 0
    assert torch.equal(head.cls_score.bias, PRIOR_BIAS.repeat(9))  # anchor by anchor, as logits are laid out
