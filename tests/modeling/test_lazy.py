"""FocalRetinaNet from the LazyConfig of detectron2's RetinaNet."""

from __future__ import annotations

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage

import focal_d2
from focal_d2 import UserError
from tests.modeling.test_retinanet import make_image


def make_config(num_classes=3):
    """The model zoo's LazyConfig, with ResNet-18 and group norm instead of ResNet-50."""
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    bottom_up = cfg.model.backbone.bottom_up
    bottom_up.stem.norm = bottom_up.stages.norm = "GN"
    bottom_up.stages.depth = 18
    del bottom_up.stages["stride_in_1x1"]
    cfg.model.backbone.out_channels = 32
    cfg.model.backbone.top_block.in_channels = 512
    cfg.model.head.input_shape = [{"_target_": "detectron2.layers.ShapeSpec", "channels": 32}] * 5
    cfg.model.head.conv_dims = [32]
    cfg.model.num_classes = num_classes
    return cfg


def outcome(model, batch):
    model.train()
    with torch.no_grad(), EventStorage():
        losses = model(batch)
    model.eval()
    with torch.no_grad():
        return losses, [x["instances"] for x in model(batch)]


@pytest.mark.parametrize("box_reg_loss_type", ["smooth_l1", "giou"])
def test_the_zoos_retinanet_config_builds_the_same_model_of_ours(box_reg_loss_type):
    cfg = make_config()
    cfg.model.focal_loss_alpha, cfg.model.focal_loss_gamma = 0.4, 1.5
    cfg.model.box_reg_loss_type = box_reg_loss_type
    cfg.model.test_score_thresh = 0.005
    theirs = instantiate(cfg.model)
    cfg.model._target_ = focal_d2.build_focal_retinanet
    ours = instantiate(cfg.model)
    assert type(ours) is focal_d2.FocalRetinaNet
    ours.load_state_dict(theirs.state_dict(), strict=False)
    batch = [make_image(3, 3), make_image(0, 3, size=(96, 130))]
    (our_losses, ours_found), (their_losses, theirs_found) = (outcome(x, batch) for x in (ours, theirs))
    torch.testing.assert_close(our_losses, their_losses)
    for actual, expected in zip(ours_found, theirs_found, strict=True):
        assert len(actual) == len(expected) > 10
        torch.testing.assert_close(actual.scores, expected.scores)


def test_focal_keys_and_their_overrides_on_the_command_line():
    cfg = make_config()
    cfg.model._target_ = focal_d2.build_focal_retinanet
    cfg.model.focal = {"LOSS": {"NAME": "softmax_focal"}, "CHANNELS_LAST": True}
    cfg.model.head.num_classes = 4  # background has a logit of its own
    cfg = LazyConfig.apply_overrides(cfg, ["model.focal.LOSS.GAMMA=1.0"])
    model = instantiate(cfg.model)
    assert type(model.cls_loss).__name__ == "SoftmaxFocalLoss"
    assert model.cls_loss.gamma == 1.0
    assert model.channels_last
    # An object of any class has a probability of 0.01 at the start.
    background = model.head.cls_score.bias.detach().view(9, 4).softmax(1)[:, 3]
    torch.testing.assert_close(background, torch.full((9,), 0.99))


@pytest.mark.parametrize("name, kind", [("iou", "IoUAssigner"), ("atss", "ATSSAssigner")])
def test_the_assigner_is_the_matcher_unless_another_one_is_named(name, kind):
    cfg = make_config()
    cfg.model._target_ = focal_d2.build_focal_retinanet
    cfg.model.focal = {"ASSIGNER": {"NAME": name}}
    assert type(instantiate(cfg.model).assigner).__name__ == kind


@pytest.mark.parametrize(
    ("focal", "match"),
    [
        ({"LOSS": {"NAME": "none"}}, "MODEL.FOCAL.LOSS.NAME is .none"),
        ({"LOSS": {"NAME": "softmax_ce"}}, "set model.head.num_classes to 4"),
        ({"LOS": {"NAME": "ce"}}, "model.focal: .*LOS"),
        ("ce", "model.focal is 'ce'; it must be a mapping with keys among HEAD, .*LOSS"),
        ({"LOSS": "ce"}, "model.focal.LOSS is 'ce'; it must be a mapping with keys among NAME, "),
        (
            {"LOSS": {"ALPHA": "auto_per_class"}},
            "ALPHA is auto_per_class, which needs a dataset to count: give",
        ),
        ({"LOSS": {"NAME": "balanced_ce", "ALPHA": "auto"}}, "ALPHA is auto, which needs a dataset to count"),
        ({"LOSS": {"ALPHA": "auto", "GAMMA": -1.0}}, "model.focal.LOSS.GAMMA is -1.0; "),
        ({"LOSS": {"ALPHA": [0.1, 0.2]}}, "ALPHA has 2 values for 3 classes"),
        ({"CHANNELS_LAST": 3}, "model.focal: .*CHANNELS_LAST"),
        ({"HEAD": {"CHANNELS": 64}}, "model.focal.HEAD.CHANNELS has no effect .*model.head.conv_dims"),
        ({"LOW_QUALITY_MATCHES": False}, "model.focal.LOW_QUALITY_MATCHES has no effect"),
        (
            {"FPN": {"LEVELS": "p2-p6"}},
            "model.focal.FPN.LEVELS has no effect in a LazyConfig: set model.backbone",
        ),
        ({"TIMM": {"NAME": "resnet18"}}, "model.focal.TIMM.NAME has no effect"),
    ],
)
def test_a_mistake_in_focal_is_named(focal, match):
    cfg = make_config()
    cfg.model._target_ = focal_d2.build_focal_retinanet
    cfg.model.focal = focal
    with pytest.raises(UserError, match=match):
        instantiate(cfg.model)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("focal_loss_alpha", None, "^model.focal_loss_alpha is None; "),
        ("focal_loss_alpha", "auto", '^model.focal_loss_alpha is "auto"; '),
        ("focal_loss_gamma", -1.0, "^model.focal_loss_gamma is -1.0; "),
        ("focal_loss_gamma", "high", '^model.focal_loss_gamma is "high"; '),
    ],
)
def test_a_mistake_in_an_argument_is_named(name, value, match):
    cfg = make_config()
    cfg.model._target_ = focal_d2.build_focal_retinanet
    cfg.model[name] = value
    with pytest.raises(UserError, match=match):
        instantiate(cfg.model)


@pytest.mark.parametrize(("alpha", "expected"), [([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]), ("auto", 0.5)])
def test_alpha_for_each_class_or_of_gamma(alpha, expected):
    cfg = make_config()
    cfg.model._target_ = focal_d2.build_focal_retinanet
    cfg.model.focal_loss_gamma = 0.5
    cfg.model.focal = {"LOSS": {"ALPHA": alpha}}
    built = instantiate(cfg.model).cls_loss.alpha
    torch.testing.assert_close(torch.as_tensor(built), torch.tensor(expected))


def test_an_argument_that_detectron2_does_not_have_is_refused():
    cfg = make_config()
    cfg.model._target_ = focal_d2.build_focal_retinanet
    cfg.model.focal_loss_beta = 1.0
    with pytest.raises(TypeError, match="focal_loss_beta"):
        instantiate(cfg.model)
