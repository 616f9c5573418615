from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from focal_d2.modeling import label_counts
from focal_d2.modeling.anchors import build_layout
from focal_d2.modeling.assigners import build_assigner
from focal_d2.modeling.label_counts import count_labels
from tests.conftest import make_cfg


@pytest.mark.parametrize(
    "overrides, unmatched",
    [
        ({}, 0),
        ({"MODEL__FOCAL__LOW_QUALITY_MATCHES": False}, 1),
        ({"MODEL__FOCAL__ASSIGNER__NAME": "atss"}, 1),
    ],
)
def test_counts_are_those_of_the_model_s_labels(overrides, unmatched):
    cfg = make_cfg(MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[0.5, 1.0]], **overrides)
    sizes = np.array([[100, 130], [64, 64], [100, 130]])  # the second has no box
    boxes = np.array([[3.0, 5, 60, 80], [10, 10, 42, 42], [90, 50, 130, 100], [0, 0, 8, 8]])
    image, classes = np.array([0, 0, 2, 2]), np.array([1, 0, 1, 1])
    model = build_model(cfg)
    expected, by_class = np.zeros((2, 5), dtype=int), np.zeros(2, dtype=int)
    for i, (height, width) in enumerate(sizes.tolist()):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor(boxes[image == i]).float())
        instances.gt_classes = torch.tensor(classes[image == i])
        images = model.preprocess_image([{"image": torch.zeros(3, height, width)}])
        anchors = model.anchors_for(images)
        labels = model.label_anchors(anchors, [instances]).labels[0]
        by_class += np.bincount(labels[(labels >= 0) & (labels < 3)], minlength=2)
        padded = images.tensor.shape[-2:]
        areas = [-(-padded[0] // s) * -(-padded[1] // s) for s in (8, 16, 32, 64, 128)]
        for level, part in enumerate(labels.split([6 * x for x in areas])):
            expected[:, level] += [int(((part >= 0) & (part < 3)).sum()), int((part == 3).sum())]
    arguments = {"layout": build_layout(cfg), "assigner": build_assigner(cfg)}
    counts = count_labels(boxes, image, sizes, **arguments, classes=classes)
    assert counts.by_class == by_class.tolist()
    assert count_labels(boxes, image, sizes, **arguments) == counts._replace(by_class=[])
    assert [counts.positives, counts.negatives] == expected.tolist()
    assert (counts.images, counts.boxes, counts.unmatched) == (3, 4, unmatched)
    assert sum(counts.positives) > 0


def test_counting_spreads_over_many_images(monkeypatch):
    monkeypatch.setattr(label_counts, "_MOST_IMAGES", 3)
    cfg = make_cfg()
    sizes = np.full((9, 2), 64)
    boxes = np.tile([10.0, 10, 42, 42], (9, 1))
    arguments = {"layout": build_layout(cfg), "assigner": build_assigner(cfg)}
    # Of nine, the first, the middle and the last are counted: two of these boxes are there.
    counts = count_labels(boxes[:3], np.array([3, 4, 8]), sizes, **arguments)
    assert (counts.images, counts.boxes) == (3, 2)


def test_counting_nothing():
    cfg = make_cfg()
    none = np.zeros((0, 4)), np.zeros(0, dtype=int), np.zeros((0, 2), dtype=int)
    counts = count_labels(*none, layout=build_layout(cfg), assigner=build_assigner(cfg))
    assert counts == ([0] * 5, [0] * 5, 0, 0, 0, [])
