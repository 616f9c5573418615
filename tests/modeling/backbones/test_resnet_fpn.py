from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from focal_d2 import UserError
from focal_d2.engine.optimizer import build_optimizer
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


@pytest.mark.parametrize("in_features", [["res3", "res4", "res5"], ["res2", "res3", "res4", "res5"]])
def test_p2_to_p6_by_one_key(in_features):
    cfg = make_resnet_cfg(
        MODEL__FOCAL__FPN__LEVELS="p2-p6",
        MODEL__FPN__IN_FEATURES=in_features,
        MODEL__RESNETS__OUT_FEATURES=in_features,
    )
    backbone = build_backbone(cfg)
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 128))
    assert {n: tuple(x.shape[2:]) for n, x in features.items()} == {
        f"p{i}": (64 // 2**i, 128 // 2**i) for i in range(2, 7)
    }
    assert {n: s.stride for n, s in backbone.output_shape().items()} == {f"p{i}": 2**i for i in range(2, 7)}
    # The other levels have the names that they have in P3 to P7, so that weights of one fit the other.
    names = set(build_backbone(make_resnet_cfg()).state_dict())
    assert names ^ set(backbone.state_dict()) == {
        f"{layer}.{x}"
        for layer in ("fpn_lateral2", "fpn_output2", "top_block.p7")
        for x in ("weight", "bias")
    }


def test_levels_of_the_head_must_be_in_the_pyramid():
    with pytest.raises(UserError, match='IN_FEATURES entry is "p7"; legal values: p2, p3, p4, p5, p6'):
        build_model(make_resnet_cfg(MODEL__FOCAL__FPN__LEVELS="p2-p6"))


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


def test_layer_decay_of_a_resnet_goes_by_its_stages():
    cfg = make_resnet_cfg(SOLVER__FOCAL__LAYER_DECAY=0.5, SOLVER__BASE_LR=0.64)
    model = build_model(cfg)
    names = {p: n for n, p in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    rates = {names[p].split(".")[2]: group["lr"] for group in groups for p in group["params"]}
    assert {n: rates[n] for n in ("stem", "res2", "res3", "res4", "res5")} == pytest.approx(
        {"stem": 0.02, "res2": 0.04, "res3": 0.08, "res4": 0.16, "res5": 0.32}
    )
    assert rates["weight"] == rates["p6"] == 0.64  # of the FPN


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"MODEL__BACKBONE__NAME": "TinyPyramid"},
            "LAYER_DECAY is 0.5; it must be 1.0 unless",
        ),
        (
            {"SOLVER__BIAS_LR_FACTOR": 2.0},
            "BIAS_LR_FACTOR is 2.0; it must be 1.0 with SOLVER",
        ),
    ],
)
def test_layer_decay_that_has_no_meaning_is_one_line(settings, words):
    cfg = make_resnet_cfg(SOLVER__FOCAL__LAYER_DECAY=0.5, **settings)
    model = build_model(cfg)
    with pytest.raises(UserError, match=words):
        build_optimizer(cfg, model)
