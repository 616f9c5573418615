from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from focal_d2 import UserError
from focal_d2.data import register_datasets
from focal_d2.engine import resolve_alpha
from focal_d2.engine.alpha import count_anchors
from tests.conftest import make_cfg
from tests.modeling.test_retinanet import make_image


@pytest.fixture
def cfg(coco_dataset):
    data = coco_dataset(images=2, size=64)
    register_datasets([data.entry])
    # One anchor a cell on P3 alone: 8 × 8 cells of 8 pixels, 24-pixel anchors against 24-pixel boxes.
    return make_cfg(
        DATASETS__TRAIN=(data.name,),
        MODEL__FOCAL__LOSS__NAME="balanced_ce",
        MODEL__FOCAL__LOSS__ALPHA="auto",
        MODEL__RETINANET__IN_FEATURES=["p3"],
        MODEL__ANCHOR_GENERATOR__SIZES=[[24.0]],
        MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]],
    )


def test_anchors_are_counted(cfg):
    positives, negatives = count_anchors(cfg)
    # By brute force, anchor by anchor.
    expected = [0, 0]
    corners = [8 * k - 12 for k in range(8)]
    for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0]):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        anchors = torch.tensor([[x, y, x + 24, y + 24] for y in corners for x in corners]).float()
        iou = box_iou(boxes, anchors)
        best = (iou == iou.max(dim=1, keepdim=True).values).any(dim=0)
        positive = best | (iou.max(dim=0).values >= 0.5)
        expected[0] += int(positive.sum())
        expected[1] += int((~positive & (iou.max(dim=0).values < 0.4)).sum())
    assert [positives, negatives] == expected


def test_auto_is_the_inverse_frequency(cfg):
    positives, negatives = count_anchors(cfg)
    resolved = resolve_alpha(cfg)
    assert pytest.approx(negatives / (positives + negatives)) == resolved.MODEL.FOCAL.LOSS.ALPHA
    assert build_model(resolved).cls_loss.alpha == resolved.MODEL.FOCAL.LOSS.ALPHA
    assert cfg.MODEL.FOCAL.LOSS.ALPHA == "auto"


def test_auto_is_clipped(cfg, monkeypatch):
    monkeypatch.setattr("focal_d2.engine.alpha.count_anchors", lambda cfg: (1, 10**6))
    assert resolve_alpha(cfg).MODEL.FOCAL.LOSS.ALPHA == 0.99


def test_auto_without_positives_is_refused(cfg, monkeypatch):
    monkeypatch.setattr("focal_d2.engine.alpha.count_anchors", lambda cfg: (0, 10))
    with pytest.raises(UserError, match="no anchor"):
        resolve_alpha(cfg)


def test_a_number_stays_as_it_is():
    cfg = make_cfg(MODEL__FOCAL__LOSS__ALPHA=0.3)
    assert resolve_alpha(cfg) is cfg


@pytest.mark.parametrize("name", ["varifocal", "softmax_focal", "focal_star", "ce"])
def test_auto_is_for_losses_that_balance(cfg, name):
    cfg.MODEL.FOCAL.LOSS.NAME = name
    with pytest.raises(UserError, match=f"auto, which {name} does not take; these do: balanced_ce, focal"):
        resolve_alpha(cfg)


def test_auto_evaluates_but_does_not_train_elsewhere(cfg):
    model = build_model(cfg)
    with pytest.raises(UserError, match="resolve_alpha"):
        model([make_image(1, 3)])
    model.eval()([make_image(1, 3)])
