from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.export.check import Limits, Loss, compare_detections, read_picture
from focal_d2.export.run import Detections

LIMITS = Limits(0.05, 4)


def detections(*rows: tuple[float, float, int]) -> Detections:
    """Boxes of 40 × 40 at x, with score and class."""
    boxes = np.array([[x, 10, x + 40, 50] for x, _, _ in rows], np.float32).reshape(-1, 4)
    scores, classes = (np.array([row[i] for row in rows]) for i in (1, 2))
    return Detections(boxes, scores.astype(np.float32), classes.astype(np.int64))


ONE = detections((0, 0.9, 1), (100, 0.8, 0), (200, 0.3, 2))


@pytest.mark.parametrize(
    ("other", "different"),
    [
        (ONE, 0),
        (detections((0.01, 0.90005, 1), (100, 0.8, 0), (200, 0.3, 2)), 0),
        (detections((0, 0.9002, 1), (100, 0.8, 0), (200, 0.3, 2)), 2),  # the score
        (detections((0.1, 0.9, 1), (100, 0.8, 0), (200, 0.3, 2)), 2),  # IoU 0.995
        (detections((0, 0.9, 0), (100, 0.8, 0), (200, 0.3, 2)), 2),  # the class
        (detections((0, 0.9, 1), (100, 0.8, 0)), 1),
        (detections(), 3),
    ],
)
def test_detections_without_a_twin_are_counted_on_both_sides(other, different):
    agreement = compare_detections(ONE, other, LIMITS)
    assert (agreement.detections, agreement.different, agreement.at_limit) == (3, different, 0)
    assert agreement.agrees == (different == 0)


def test_a_rounding_error_may_decide_at_the_threshold_and_at_the_limit():
    with_one_more = detections((0, 0.9, 1), (100, 0.8, 0), (200, 0.3, 2), (300, 0.05004, 0))
    agreement = compare_detections(ONE, with_one_more, LIMITS)
    assert agreement.agrees
    assert agreement.at_limit == 1
    assert "1 more at the threshold" in str(agreement)
    full = [detections((0, 0.9, 1), (100, 0.8, 0), (200, 0.3, 2), (x, 0.2, 0)) for x in (300, 400)]
    agreement = compare_detections(*full, LIMITS)
    assert agreement.agrees
    assert agreement.at_limit == 2
    assert not compare_detections(*full, Limits(0.05, 5)).agrees


def test_nothing_detected_is_no_agreement():
    agreement = compare_detections(detections(), detections(), LIMITS)
    assert not agreement.agrees
    assert str(agreement) == "nothing was detected in 1 pictures: there is nothing to compare"


@pytest.mark.parametrize(
    ("after", "agrees"), [(41.0, True), (40.9, True), (39.9, False), (float("nan"), False)]
)
def test_loss_of_ap_is_compared_with_the_largest(after, agrees):
    loss = Loss(41.0, after, 1.0, "mine_val")
    assert loss.agrees == agrees
    assert ("the file is removed" in str(loss)) != agrees


@pytest.mark.parametrize(("make", "why"), [(os.mkfifo, "pipe"), (Path.touch, "not an image")])
def test_a_picture_that_is_none_is_refused(tmp_path, make, why):
    make(tmp_path / "x.png")
    with pytest.raises(UserError, match=f"cannot read image .*x.png: .*{why}"):
        read_picture(tmp_path / "x.png")
