from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from focal_d2 import UserError
from focal_d2.annotations import Table
from focal_d2.data import register_datasets
from focal_d2.engine import resolve_alpha
from focal_d2.engine.alpha import count_anchors, count_anchors_by_class, per_class_alphas
from focal_d2.modeling.label_counts import LabelCounts
from focal_d2.modeling.losses import LOSSES, register_loss
from focal_d2.modeling.losses.elementwise import FocalLoss
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


@pytest.mark.parametrize("drop_empty", [True, False])
def test_a_table_and_its_records_count_alike(coco_dataset, monkeypatch, drop_empty):
    """The first image has no box, the second only one without area, the third only a crowd."""
    data = coco_dataset(images=5)
    content = json.loads(data.annotations.read_text())
    boxes = [a for a in content["annotations"] if a["image_id"] > 2]
    boxes += [{"image_id": 1, "category_id": 1, "bbox": [4, 4, 0, 9]}]
    boxes += [{"image_id": 2, "category_id": 2, "bbox": [4, 4, 9, 9], "iscrowd": 1}]
    content["annotations"] = [{**a, "id": i} for i, a in enumerate(boxes, 1)]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    records = DatasetCatalog.get(data.name)
    DatasetCatalog.register("records", lambda: records)
    settings = {"DATALOADER__FILTER_EMPTY_ANNOTATIONS": drop_empty}
    expected = count_anchors_by_class(make_cfg(DATASETS__TRAIN=("records",), **settings))
    monkeypatch.setattr(Table, "records", None)
    positives, negatives = count_anchors_by_class(make_cfg(DATASETS__TRAIN=(data.name,), **settings))
    assert positives.tolist() == expected[0].tolist()
    assert negatives == expected[1]
    both = count_anchors(make_cfg(DATASETS__TRAIN=(data.name, "records"), **settings))
    assert both == (2 * positives.sum(), 2 * negatives)


def test_records_with_boxes_without_area_count_as_images_with_boxes(cfg):
    """detectron2 trains on such images, as on the background that they are."""
    (record, *_) = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    flat = {**record["annotations"][0], "bbox": [4.0, 4, 0, 9]}
    records = [record, {**record, "annotations": [flat]}, {**record, "annotations": []}]
    DatasetCatalog.register("flat", lambda: records)
    DatasetCatalog.register("one", lambda: records[:1])
    counts = []
    for cfg.DATASETS.TRAIN in (("flat",), ("one",)):
        counts.append(count_anchors(cfg))
    assert counts[0] == (counts[1][0], counts[1][1] + 64)  # 64 anchors an image


def test_auto_is_the_inverse_frequency(cfg):
    positives, negatives = count_anchors(cfg)
    resolved = resolve_alpha(cfg)
    assert pytest.approx(negatives / (positives + negatives)) == resolved.MODEL.FOCAL.LOSS.ALPHA
    assert build_model(resolved).cls_loss.alpha == resolved.MODEL.FOCAL.LOSS.ALPHA
    assert cfg.MODEL.FOCAL.LOSS.ALPHA == "auto"


def test_auto_is_clipped(cfg, monkeypatch):
    monkeypatch.setattr("focal_d2.engine.alpha.count_anchors", lambda cfg: (1, 10**6))
    assert resolve_alpha(cfg).MODEL.FOCAL.LOSS.ALPHA == 0.99


@pytest.mark.parametrize("wanted", ["auto", "auto_per_class"])
def test_auto_without_positives_is_refused(cfg, monkeypatch, wanted):
    cfg.MODEL.FOCAL.LOSS.ALPHA = wanted
    none = LabelCounts([0], [10], 1, 1, 1, [])
    monkeypatch.setattr("focal_d2.engine.alpha.count_labels", lambda *_, **__: none)
    with pytest.raises(UserError, match=f"ALPHA is {wanted}, but no anchor of DATASETS.TRAIN is positive"):
        resolve_alpha(cfg)


@pytest.mark.parametrize(
    "gamma, alpha",
    [
        *[(0, 0.75), (0.1, 0.75), (0.2, 0.75), (0.35, 0.625), (0.5, 0.5)],
        *[(0.75, 0.375), (1, 0.25), (2, 0.25), (5, 0.25), (9, 0.25)],
    ],
)
def test_auto_of_the_focal_loss_is_the_papers_best_for_gamma(cfg, monkeypatch, caplog, gamma, alpha):
    monkeypatch.setattr("focal_d2.engine.alpha.count_labels", None)  # nothing is counted
    caplog.set_level("INFO", logger="focal_d2")
    cfg.MODEL.FOCAL.LOSS.NAME = "focal"
    for section, key in ((cfg.MODEL.RETINANET, "FOCAL_LOSS_GAMMA"), (cfg.MODEL.FOCAL.LOSS, "GAMMA")):
        section[key] = float(gamma)
        resolved = resolve_alpha(cfg)
        assert pytest.approx(alpha) == resolved.MODEL.FOCAL.LOSS.ALPHA
        section[key] = 3.0  # the key under MODEL.FOCAL.LOSS goes before the other
    assert build_model(resolved).cls_loss.alpha == pytest.approx(alpha)
    assert f"the paper's best α for γ {gamma} (table 1b" in caplog.text
    assert ("linear between" in caplog.text) == (gamma in (0.35, 0.75))
    assert "mean class" not in caplog.text


@pytest.mark.parametrize("gamma", ["high", True, float("inf"), -1.0])
def test_auto_needs_a_gamma_that_is_a_number(cfg, gamma):
    cfg.MODEL.FOCAL.LOSS.NAME, cfg.MODEL.FOCAL.LOSS.GAMMA = "focal", gamma
    with pytest.raises(UserError, match=f"GAMMA is {gamma!r}; it must be .*at least 0"):
        resolve_alpha(cfg)


def test_auto_knows_the_gamma_of_derived_losses_or_refuses(cfg):
    class Steep(FocalLoss):
        def __init__(self, *, num_classes, alpha, gamma=0.5):
            super().__init__(num_classes=num_classes, alpha=alpha, gamma=gamma)

    class Fixed(FocalLoss):
        def __init__(self, *, num_classes, alpha):
            super().__init__(num_classes=num_classes, alpha=alpha, gamma=2.0)

    try:
        register_loss("steep")(Steep)
        register_loss("fixed")(Fixed)
        cfg.MODEL.FOCAL.LOSS.NAME = "steep"
        assert resolve_alpha(cfg).MODEL.FOCAL.LOSS.ALPHA == 0.5
        cfg.MODEL.FOCAL.LOSS.NAME = "fixed"
        with pytest.raises(UserError, match="no GAMMA is known of the loss fixed: give a number"):
            resolve_alpha(cfg)
    finally:
        LOSSES.pop("steep"), LOSSES.pop("fixed")


@pytest.mark.parametrize("architecture", ["RetinaNet", "GeneralizedRCNN"])
def test_auto_counts_nothing_for_models_that_do_not_read_it(cfg, caplog, architecture):
    cfg.MODEL.META_ARCHITECTURE = architecture
    assert resolve_alpha(cfg) is cfg
    assert not caplog.text


def test_per_class_alphas_are_inverse_frequencies():
    # Of 1000 anchors, class 0 has 10, class 1 has 40, class 2 has none: 950 are background.
    counted = per_class_alphas(np.array([10, 40, 0]), 950, mean_alpha=None)
    # n / m is 990 / 10, 960 / 40, and 975 / 25 for the mean of those that have any.
    np.testing.assert_allclose(counted, [990 / 1000, 960 / 1000, 975 / 1000])
    # Odds of 1 / 3 for the mean class, times (990 / 10) / (975 / 25) and (960 / 40) / (975 / 25).
    leveled = per_class_alphas(np.array([10, 40, 0]), 950, mean_alpha=0.25)
    odds = np.array([99 / 39, 24 / 39, 1]) / 3
    np.testing.assert_allclose(leveled, odds / (1 + odds))
    np.testing.assert_allclose(leveled[[0, 1]], [0.4583, 0.1702], atol=1e-4)
    # A single class is "auto".
    assert per_class_alphas(np.array([10]), 990, mean_alpha=None) == pytest.approx(0.99)
    assert per_class_alphas(np.array([10]), 990, mean_alpha=0.25) == pytest.approx(0.25)
    # Within ALPHA_RANGE.
    np.testing.assert_allclose(per_class_alphas(np.array([1, 10**6]), 10, mean_alpha=0.25), [0.99, 0.01])


@pytest.mark.parametrize("name", ["balanced_ce", "focal"])
def test_auto_per_class_gives_each_class_its_own(cfg, caplog, name):
    caplog.set_level("INFO", logger="focal_d2")
    cfg.MODEL.FOCAL.LOSS.NAME, cfg.MODEL.FOCAL.LOSS.ALPHA = name, "auto_per_class"
    positives, negatives = count_anchors_by_class(cfg)
    assert (positives.sum(), negatives) == count_anchors(cfg)
    resolved = resolve_alpha(cfg)
    mean = 0.25 if name == "focal" else None
    expected = per_class_alphas(positives, negatives, mean_alpha=mean)
    assert expected.tolist() == resolved.MODEL.FOCAL.LOSS.ALPHA
    torch.testing.assert_close(build_model(resolved).cls_loss.alpha, torch.from_numpy(expected).float())
    assert (
        f"for class class{positives.argmax()} ({positives.max()} positive anchors, the most)" in caplog.text
    )
    assert ("the mean class gets 0.25, the paper's best α for γ 2" in caplog.text) == (name == "focal")
    # The command line takes such a list.
    again = make_cfg()
    again.merge_from_list(["MODEL.FOCAL.LOSS.ALPHA", str(resolved.MODEL.FOCAL.LOSS.ALPHA)])
    assert expected.tolist() == again.MODEL.FOCAL.LOSS.ALPHA


def test_auto_per_class_says_when_it_balances_nothing(cfg, monkeypatch, caplog):
    cfg.MODEL.FOCAL.LOSS.ALPHA = "auto_per_class"
    counts = LabelCounts([6], [10**6], 1, 1, 0, [1, 2, 3])
    monkeypatch.setattr("focal_d2.engine.alpha.count_labels", lambda *_, **__: counts)
    assert resolve_alpha(cfg).MODEL.FOCAL.LOSS.ALPHA == [0.99] * 3
    assert "each gets the highest, 0.99" in caplog.text


@pytest.mark.parametrize(
    ("by_class", "expected"), [([1, 2, 0], "1 class has none"), ([3], "2 classes have none")]
)
def test_auto_per_class_says_how_many_classes_have_no_anchors(cfg, monkeypatch, caplog, by_class, expected):
    caplog.set_level("INFO", logger="focal_d2")
    cfg.MODEL.FOCAL.LOSS.ALPHA = "auto_per_class"
    counts = LabelCounts([3], [10], 1, 1, 0, by_class)
    monkeypatch.setattr("focal_d2.engine.alpha.count_labels", lambda *_, **__: counts)
    resolve_alpha(cfg)
    assert expected in caplog.text


def test_a_number_stays_as_it_is():
    cfg = make_cfg(MODEL__FOCAL__LOSS__ALPHA=0.3)
    assert resolve_alpha(cfg) is cfg


@pytest.mark.parametrize("wanted", ["auto", "auto_per_class"])
@pytest.mark.parametrize("name", ["varifocal", "softmax_focal", "focal_star", "ce"])
def test_auto_is_for_losses_that_balance(cfg, name, wanted):
    cfg.MODEL.FOCAL.LOSS.NAME, cfg.MODEL.FOCAL.LOSS.ALPHA = name, wanted
    with pytest.raises(
        UserError, match=f"{wanted}, which {name} does not take; these do: balanced_ce, focal"
    ):
        resolve_alpha(cfg)


@pytest.mark.parametrize("wanted", ["auto", "auto_per_class"])
def test_auto_evaluates_but_does_not_train_elsewhere(cfg, wanted):
    cfg.MODEL.FOCAL.LOSS.ALPHA = wanted
    model = build_model(cfg)
    with pytest.raises(UserError, match=f"ALPHA is {wanted}: .*resolve_alpha"):
        model([make_image(1, 3)])
    model.eval()([make_image(1, 3)])
