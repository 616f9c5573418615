from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from focal_d2 import UserError
from focal_d2.modeling.anchors import Anchors
from focal_d2.modeling.assigners import ATSSAssigner, IoUAssigner, build_assigner
from focal_d2.ops.matching.atss import match_anchors_atss
from tests.conftest import make_cfg
from tests.modeling.test_retinanet import make_image

ONE_A_CELL = {
    "MODEL__ANCHOR_GENERATOR__SIZES": [[8 * s] for s in (8, 16, 32, 64, 128)],
    "MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[1.0]],
}


def instances(boxes, classes):
    return Instances(
        (128, 160), gt_boxes=Boxes(torch.tensor(boxes).view(-1, 4)), gt_classes=torch.tensor(classes).long()
    )


@pytest.mark.parametrize("name, kind", [("iou", IoUAssigner), ("atss", ATSSAssigner)])
def test_the_key_chooses(name, kind):
    assert type(build_assigner(make_cfg(MODEL__FOCAL__ASSIGNER__NAME=name))) is kind


def test_detectron2s_own_retinanet_has_iou_whatever_the_key_is():
    cfg = make_cfg(MODEL__META_ARCHITECTURE="RetinaNet", MODEL__FOCAL__ASSIGNER__NAME="atss")
    assert type(build_assigner(cfg)) is IoUAssigner


@pytest.mark.parametrize(
    "overrides, line",
    [
        ({"MODEL__FOCAL__ASSIGNER__NAME": "simota"}, "ASSIGNER.NAME is .simota.; legal values: iou, atss"),
        ({"MODEL__FOCAL__ASSIGNER__TOPK": 0}, "ASSIGNER.TOPK is 0; it must be within 1 and 1000"),
    ],
)
def test_mistakes_are_named(overrides, line):
    with pytest.raises(UserError, match=line):
        build_model(make_cfg(**overrides))


def test_atss_of_anchors_on_no_grid_is_refused():
    anchors = Anchors(torch.tensor([[0.0, 0, 8, 8]]), None)
    with pytest.raises(UserError, match="ASSIGNER.NAME is atss, which needs the anchors of DefaultAnchor"):
        ATSSAssigner(topk=9).assign(torch.tensor([[0.0, 0, 8, 8]]), anchors)


@pytest.mark.parametrize("topk", [9, 3])
@pytest.mark.parametrize("overrides", [{}, ONE_A_CELL], ids=["nine a cell", "one a cell"])
def test_labels_of_a_batch_are_those_of_atss(overrides, topk):
    model = build_model(
        make_cfg(MODEL__FOCAL__ASSIGNER__NAME="atss", MODEL__FOCAL__ASSIGNER__TOPK=topk, **overrides)
    )
    boxes = [[10.0, 10, 50, 60], [40, 20, 140, 110], [41, 20, 140, 110]]
    batch = [instances(boxes[:1], [2]), instances([], []), instances(boxes[1:], [0, 1])]
    region = torch.tensor([[0.0, 0, 80, 128]])
    images = model.preprocess_image([{"image": torch.zeros(3, 128, 160)}] * 3)
    anchors = model.anchors_for(images)
    targets = model.label_anchors(anchors, batch, [None, region, region])
    positives = targets.positives()
    assert set(positives.image.tolist()) == {0, 2}
    for i, labels in enumerate(targets.labels):
        of_image = batch[i].gt_boxes.tensor
        expected = torch.full_like(labels, 3)
        if i:
            inside = anchors.boxes.clone()
            inside[:, 0::2] = inside[:, 0::2].clamp(0, 80)
            inside[:, 1::2] = inside[:, 1::2].clamp(0, 128)
            area = lambda x: (x[:, 2:] - x[:, :2]).prod(1)  # noqa: E731
            expected[area(inside) >= 0.5 * area(anchors.boxes)] = -1
        if len(of_image):
            matched, outcome = match_anchors_atss(of_image, anchors.boxes, anchors.grid, topk=topk)
            expected = torch.where(outcome == 1, batch[i].gt_classes[matched], expected)
            got = positives.gt_boxes[positives.image == i]
            assert torch.equal(got, of_image[matched[outcome == 1]])
        assert torch.equal(labels, expected)


def test_a_model_with_atss_trains_on_images_with_and_without_boxes():
    model = build_model(make_cfg(MODEL__FOCAL__ASSIGNER__NAME="atss", **ONE_A_CELL)).train()
    with EventStorage():
        losses = model([make_image(3, 3), make_image(0, 3)])
    sum(losses.values()).backward()
    assert all(x.isfinite() and x > 0 for x in losses.values())
