"""Converted weights beside the torchvision models that they are from, with random weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18
from torchvision.models.detection import RetinaNet, retinanet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.models.resnet import Bottleneck
from torchvision.ops.boxes import clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from focal_d2 import UserError
from focal_d2.storage.torchvision_weights import convert
from tests.conftest import make_cfg

LABELS, CHANNELS = 5, 32


def narrow_resnet(**settings) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], **{"width_per_group": 4, **settings})


def randomise(model: nn.Module) -> nn.Module:
    """Give norms statistics, and the last layers outputs that differ from each other."""
    for name, x in model.state_dict().items():
        if "running_var" in name:
            x.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            x.normal_(0, 0.1)
        elif "bn3.weight" in name or "bn2.weight" in name:
            x.uniform_(0.2, 0.4)
        elif "cls_logits.weight" in name:
            x.normal_(0, 0.5)
        elif "bbox_reg.weight" in name:
            x.normal_(0, 0.02)
        elif "head" in name and "conv" in name and x.ndim == 4:
            nn.init.kaiming_normal_(x)
    return model.eval()


def make_retinanet(version: int, **settings) -> RetinaNet:
    """As torchvision's two functions build it, with a narrower network."""
    body = narrow_resnet(**settings)
    layers = {f"layer{i}": str(i - 2) for i in (2, 3, 4)}
    top = LastLevelP6P7(CHANNELS if version == 1 else 2048, CHANNELS)
    backbone = BackboneWithFPN(body, layers, [512, 1024, 2048], CHANNELS, extra_blocks=top)
    norm = partial(nn.GroupNorm, 32) if version == 2 else None
    head = RetinaNetHead(CHANNELS, 9, LABELS, norm_layer=norm)
    return randomise(RetinaNet(backbone, LABELS, anchor_generator=_default_anchorgen(), head=head))


def build_ours(converted) -> nn.Module:
    cfg = make_cfg(MODEL__FPN__OUT_CHANNELS=256, MODEL__BACKBONE__NAME="build_focal_resnet_fpn_backbone")
    cfg.merge_from_other_cfg(CfgNode(converted.settings))
    model = build_model(cfg).eval()
    result = model.load_state_dict(converted.weights, strict=False)
    assert result.unexpected_keys == []
    assert all(x.startswith(("pixel_", "loss_normalizer.")) for x in result.missing_keys)
    return model


def in_torchvisions_order(level: Tensor, numbers: int) -> Tensor:
    """Turn our outputs (1, 9 · n, H, W) of a level into torchvision's, (1, H · W · 9, n)."""
    by_anchor = level.view(3, 3, numbers, -1)  # sizes, ratios, numbers, cells
    return by_anchor.permute(3, 1, 0, 2).reshape(1, -1, numbers)


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_a_converted_retinanet_gives_torchvisions_detections(version):
    theirs = make_retinanet(version)
    ours = build_ours(convert(theirs.state_dict()))
    image = torch.rand(1, 3, 128, 160)  # P6 and P7 have cells of other sizes than their strides
    theirs.transform.min_size, theirs.transform.max_size = (128,), 160
    images, _ = theirs.transform([image[0]])
    inputs = ours.preprocess_image([{"image": image[0] * 255}])
    torch.testing.assert_close(inputs.tensor, images.tensors)

    expected_features = list(theirs.backbone(images.tensors).values())
    features = ours.backbone(inputs.tensor)
    features = [features[name] for name in ours.head_in_features]
    for x, y in zip(features, expected_features, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)

    expected = theirs.head(expected_features)
    logits, deltas = ours.head(features)
    outputs = {
        "cls_logits": [in_torchvisions_order(x, LABELS) for x in logits],
        "bbox_regression": [in_torchvisions_order(x, 4) for x in deltas],
    }
    for name, levels in outputs.items():
        torch.testing.assert_close(torch.cat(levels, 1), expected[name], rtol=1e-4, atol=1e-4)
    assert outputs["cls_logits"][0].std() > 0.1

    anchors = [x.tensor for x in ours.anchor_generator(features)]
    # Of a cell: 3 sizes times 3 ratios become 3 ratios times 3 sizes.
    of_torchvision = [x.view(-1, 3, 3, 4).transpose(1, 2).reshape(-1, 4) for x in anchors]
    assert torch.equal(torch.cat(of_torchvision), theirs.anchor_generator(images, expected_features)[0])

    # Ours are in the same order now: torchvision's post-processing finds the same.
    found = theirs.postprocess_detections(outputs, [of_torchvision], images.image_sizes)[0]
    (wanted,) = theirs([image[0]])
    assert len(found["boxes"]) == len(wanted["boxes"]) == 300
    assert torch.equal(found["labels"], wanted["labels"])
    torch.testing.assert_close(found["boxes"], wanted["boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found["scores"], wanted["scores"], rtol=0, atol=1e-4)


@torch.no_grad()
def test_detections_are_torchvisions_but_for_clipping_before_nms(monkeypatch):
    """torchvision clips boxes to the image before NMS, detectron2 and we after it."""
    theirs = make_retinanet(1)
    ours = build_ours(convert(theirs.state_dict()))
    theirs.transform.min_size, theirs.transform.max_size = (160,), 224
    image = torch.rand(3, 160, 224)
    monkeypatch.setattr(retinanet.box_ops, "clip_boxes_to_image", lambda boxes, _: boxes)
    (wanted,) = theirs([image])
    found = ours([{"image": image * 255}])[0]["instances"]
    boxes = clip_boxes_to_image(wanted["boxes"], (160, 224))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert len(found) == kept.sum() > 250
    assert torch.equal(found.pred_classes, wanted["labels"][kept])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[kept], rtol=0, atol=1e-3)
    torch.testing.assert_close(found.scores, wanted["scores"][kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"groups": 8}, {"width_per_group": 8}, None])
@torch.no_grad()
def test_a_converted_resnet_gives_torchvisions_features(settings):
    theirs = randomise(resnet18() if settings is None else narrow_resnet(**settings))
    converted = convert(theirs.state_dict())
    assert not converted.is_detector
    cfg = make_cfg(MODEL__BACKBONE__NAME="build_focal_resnet_fpn_backbone")
    cfg.merge_from_other_cfg(CfgNode(converted.settings))
    ours = build_model(cfg).eval()
    result = ours.load_state_dict(converted.weights, strict=False)
    assert result.unexpected_keys == []
    assert not any("bottom_up" in x for x in result.missing_keys)
    x = image = torch.randn(1, 3, 64, 64)
    for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = getattr(theirs, part)(x)
    features = ours.backbone.bottom_up(image)
    torch.testing.assert_close(features["res5"], x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_norms_of_another_epsilon_are_converted():
    theirs = randomise(narrow_resnet(norm_layer=partial(FrozenBatchNorm2d, eps=0.0)))
    variance = convert(theirs.state_dict(), norm_eps=0.0).weights[
        "backbone.bottom_up.stem.conv1.norm.running_var"
    ]
    torch.testing.assert_close(variance + 1e-5, theirs.bn1.running_var)


def test_names_of_older_files_are_known():
    state = make_retinanet(1).state_dict()
    old = {}
    for name, x in state.items():
        name = name.replace("_blocks.0.0.", "_blocks.0.").replace("_blocks.1.0.", "_blocks.1.")
        name = name.replace("_blocks.2.0.", "_blocks.2.")
        for i in range(4):
            name = name.replace(f"head.conv.{i}.0.", f"head.conv.{2 * i}.")
        old[name] = x
    assert old.keys() != state.keys()
    ours, again = convert(state).weights, convert(old).weights
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_chosen_classes_are_in_the_order_that_was_given():
    state = make_retinanet(1).state_dict()
    every, some = convert(state), convert(state, classes=[3, 1])
    assert some.settings["MODEL"]["RETINANET"]["NUM_CLASSES"] == 2
    bias = every.weights["head.cls_score.bias"].view(9, LABELS)
    assert torch.equal(some.weights["head.cls_score.bias"].view(9, 2), bias[:, [3, 1]])
    assert torch.equal(some.weights["head.bbox_pred.weight"], every.weights["head.bbox_pred.weight"])


def without(state: dict, part: str) -> dict:
    return {name: x for name, x in state.items() if part not in name}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda _: {}, "neither weights of torchvision's ResNets .* they have no tensors"),
        (lambda x: without(x, "layer3.5"), "neither weights of torchvision's ResNets"),
        (
            lambda x: without(x, "extra_blocks.p7"),
            "this is no RetinaNet .* it has no backbone.fpn.extra",
        ),
        (
            lambda x: {**x, "backbone.fpn.inner_blocks.3.0.weight": torch.zeros(1)},
            "begins at P2 and ends at P7",
        ),
    ],
)
def test_other_models_are_one_line(change, words):
    with pytest.raises(UserError, match=words):
        convert(change(make_retinanet(1).state_dict()))


def test_other_anchors_are_one_line():
    theirs = RetinaNet(
        make_retinanet(1).backbone, LABELS, anchor_generator=AnchorGenerator(((32,),) * 5, ((1.0, 2.0),) * 5)
    )
    with pytest.raises(UserError, match="has 2 anchors a cell; torchvision's have 9"):
        convert(theirs.state_dict())


def test_classes_that_are_not_there_are_one_line():
    with pytest.raises(UserError, match="there is no class 5 in this file; it has 0 to 4"):
        convert(make_retinanet(1).state_dict(), classes=[1, 5])
    with pytest.raises(UserError, match="no detector's head, so it has no classes"):
        convert(narrow_resnet().state_dict(), classes=[1])
