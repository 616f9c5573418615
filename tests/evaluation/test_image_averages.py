from __future__ import annotations

import numpy as np
import pytest

from focal_d2.evaluation.image_averages import assigned, image_averages
from tests.evaluation.test_errors import BOX, FAR, scene, share


def averages(boxes, found, images=2, score=0.5, in_ignored=()):
    truth, detections = scene(boxes, found, images)
    inside = np.zeros(len(detections.image), dtype=bool)
    inside[list(in_ignored)] = True
    return image_averages(truth, detections, score, inside)


def test_precision_and_recall_are_averaged_over_images():
    # Image 0: 1 of 2 detections right, 1 of 1 box found. Image 1: 1 of 1 right, 1 of 4 found.
    boxes = [(0, 0, BOX), (1, 0, BOX), (1, 0, FAR), (1, 0, (20, 20, 5, 5)), (1, 0, (80, 80, 5, 5))]
    found = [(0, 0, BOX, 0.9), (0, 0, FAR, 0.8), (0, 0, (70, 70, 5, 5), 0.4), (1, 0, BOX, 0.5)]
    assert averages(boxes, found) == {
        "iou": 0.4,
        "score": 0.5,
        "images": 2,
        "precision": (1 / 2 + 1) / 2,
        "recall": (1 + 1 / 4) / 2,
    }


def test_an_image_without_detections_has_recall_0_and_no_precision():
    result = averages([(0, 0, BOX), (1, 0, BOX)], [(0, 0, BOX, 0.9), (1, 0, BOX, 0.1)])
    assert (result["precision"], result["recall"]) == (1, 0.5)


def test_images_without_boxes_are_left_out():
    result = averages([(0, 0, BOX)], [(0, 0, BOX, 0.9), (1, 0, FAR, 0.9)], images=3)
    assert (result["images"], result["precision"], result["recall"]) == (1, 1, 1)


def test_nothing_to_average_is_none():
    assert averages([], [(0, 0, BOX, 0.9)]) == {
        "iou": 0.4, "score": 0.5, "images": 0, "precision": None, "recall": None
    }  # fmt: skip
    result = averages([(0, 0, BOX)], [], score=np.inf)
    assert result == {"iou": 0.4, "score": None, "images": 1, "precision": None, "recall": 0}


def test_classes_are_not_looked_at():
    result = averages([(0, 0, BOX)], [(0, 2, BOX, 0.9)])
    assert (result["precision"], result["recall"]) == (1, 1)


def test_ignored_boxes_and_what_lies_in_them_are_not_counted():
    boxes = [(0, 0, BOX), (0, 0, FAR, "ignored")]
    found = [(0, 0, BOX, 0.9), (0, 0, FAR, 0.8), (0, 0, (80, 80, 5, 5), 0.7)]
    result = averages(boxes, found, in_ignored=[1])
    assert (result["precision"], result["recall"]) == (1 / 2, 1)


def test_iou_must_be_above_0_4():
    # Parts of a box of 100 pixels: IoU 0.4 is not enough, 0.5 is.
    truth = np.array([BOX], float)
    assert assigned(np.array([share(4)], float), truth).tolist() == [False]
    assert assigned(np.array([share(5)], float), truth).tolist() == [True]


def test_assignment_is_one_to_one():
    truth, twice = np.array([BOX], float), np.array([BOX, BOX], float)
    assert assigned(twice, truth).sum() == 1
    # Common areas: of the first detection 60 and 70 pixels, of the second one 80 and 10. The largest sum is
    # 70 + 80; IoUs are 70 / 130 and 80 / 100.
    truth = np.array([BOX, (7, 0, 10, 10)], float)
    detected = np.array([(4, 0, 10, 10), (0, 0, 8, 10)], float)
    assert assigned(detected, truth).tolist() == [True, True]


def test_assignment_is_by_common_area_and_not_by_iou():
    # The large detection has all 100 pixels of the box, at IoU 0.25; the good one has 80 of them, at IoU 0.8.
    truth = np.array([BOX], float)
    large, good = (0, 0, 20, 20), share(8)
    assert assigned(np.array([good], float), truth).tolist() == [True]
    assert assigned(np.array([large, good], float), truth).tolist() == [False, False]


@pytest.mark.parametrize("detections, boxes", [(0, 0), (0, 2), (2, 0)])
def test_no_detections_or_no_boxes(detections, boxes):
    result = assigned(np.ones((detections, 4)), np.ones((boxes, 4)))
    assert result.shape == (detections,)
    assert not result.any()
