from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_backbone

from tests.conftest import make_resnet_cfg

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
BASIC = {"MODEL__RESNETS__RES2_OUT_CHANNELS": 64}
BOTTLENECK = {"MODEL__RESNETS__RES2_OUT_CHANNELS": 256}
RESNEXT = {**BOTTLENECK, "MODEL__RESNETS__NUM_GROUPS": 32, "MODEL__RESNETS__WIDTH_PER_GROUP": 4}


@pytest.mark.parametrize(
    "depth, widths, out_channels",
    [
        (18, BASIC, 256),
        (34, BASIC, 64),
        (50, BOTTLENECK, 256),
        (101, BOTTLENECK, 128),
        (152, BOTTLENECK, 256),
        (50, RESNEXT, 256),
    ],
)
def test_backbone_levels(depth, widths, out_channels):
    backbone = build_backbone(
        make_resnet_cfg(MODEL__RESNETS__DEPTH=depth, MODEL__FPN__OUT_CHANNELS=out_channels, **widths)
    )
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 128, 256))
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        n: (out_channels, s) for n, s in STRIDES.items()
    }
    assert {n: tuple(x.shape) for n, x in features.items()} == {
        n: (1, out_channels, 128 // s, 256 // s) for n, s in STRIDES.items()
    }


@pytest.mark.parametrize("p6_from, in_channels", [("res5", 512), ("p5", 32)])
def test_p6_comes_from_c5_or_p5_and_p7_through_relu(p6_from, in_channels):
    backbone = build_backbone(make_resnet_cfg(MODEL__FOCAL__FPN__P6_FROM=p6_from))
    assert backbone.top_block.p6.in_channels == in_channels
    with torch.no_grad():
        image = torch.randn(1, 3, 128, 128)
        features = backbone(image)
        source = features["p5"] if p6_from == "p5" else backbone.bottom_up(image)["res5"]
        p6 = backbone.top_block.p6(source)
        torch.testing.assert_close(features["p6"], p6)
        torch.testing.assert_close(features["p7"], backbone.top_block.p7(p6.clamp(min=0)))


@pytest.mark.parametrize("init", ["xavier", "paper"])
def test_pyramid_starts_as_yaml_says(init):
    backbone = build_backbone(make_resnet_cfg(MODEL__FOCAL__FPN__INIT=init, MODEL__FPN__OUT_CHANNELS=128))
    for conv in (backbone.fpn_lateral5, backbone.fpn_output3, backbone.top_block.p6, backbone.top_block.p7):
        is_paper = conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert is_paper == (init == "paper")
    assert backbone.bottom_up.res5[0].conv1.weight.std().item() != pytest.approx(0.01, rel=0.02)


def test_parameter_names_are_detectron2s():
    ours = build_backbone(make_resnet_cfg()).state_dict()
    theirs = build_backbone(
        make_resnet_cfg(MODEL__BACKBONE__NAME="build_retinanet_resnet_fpn_backbone")
    ).state_dict()
    assert {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}
