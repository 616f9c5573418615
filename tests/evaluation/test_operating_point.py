from __future__ import annotations

import math

import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.evaluation.backends import Detections, Truth
from focal_d2.evaluation.errors import FEWEST_BOXES, coco_outcome, scores_of_classes
from focal_d2.evaluation.matching import in_order, overlaps
from focal_d2.evaluation.operating_point import (
    BEST_F1,
    Goal,
    OperatingPoint,
    Tally,
    choose,
    figures_from,
    point_of,
    saved_point,
)

POINT = OperatingPoint(0.5, 0.8, 0.4, 0.53, "best F1", "mine_val", True)


def tally(scores: list[float], right: str, boxes: int) -> Tally:
    """`right` has an x for each detection that is right."""
    return Tally(np.array(scores), np.array([x == "x" for x in right]), boxes)


def figures(score, precision, recall):
    return pytest.approx(
        {
            "score": score,
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
        }
    )


# Of 5 boxes; right of all after each score: 1 of 1, 2 of 2, 2 of 4 (two have the score 0.7), 3 of 5, 3 of 6.
# Precision 1, 1, 0.5, 0.6, 0.5; recall 0.2, 0.4, 0.4, 0.6, 0.6; F1 0.33, 0.57, 0.44, 0.6, 0.55.
FIVE = tally([0.9, 0.8, 0.7, 0.7, 0.6, 0.5], "xx--x-", 5)


@pytest.mark.parametrize(
    "goal, expected, words",
    [
        (BEST_F1, (0.6, 0.6, 0.6), "best F1"),
        (Goal("recall", 0.4), (0.8, 1, 0.4), "recall of at least 0.4"),
        (Goal("recall", 0.45), (0.6, 0.6, 0.6), "recall of at least 0.45"),
        (Goal("recall", 0.7), (0.5, 0.5, 0.6), "recall of at least 0.7 (not reached)"),
        (Goal("precision", 1.0), (0.8, 1, 0.4), "precision of at least 1"),
        (Goal("precision", 0.55), (0.6, 0.6, 0.6), "precision of at least 0.55"),
    ],
)
def test_choose_meets_the_goal(goal, expected, words):
    result = choose(FIVE, goal)
    assert result == figures(*expected)
    assert goal.in_words(result) == words


def test_a_precision_that_is_not_reached_gives_the_highest():
    # 0 of 1, 1 of 2, 1 of 3.
    result = choose(tally([0.9, 0.8, 0.7], "-x-", 2), Goal("precision", 0.9))
    assert result == figures(0.8, 0.5, 0.5)
    assert Goal("precision", 0.9).in_words(result) == "precision of at least 0.9 (not reached)"


def test_equal_scores_pass_together():
    assert choose(tally([0.5, 0.5, 0.5], "x--", 1), BEST_F1) == figures(0.5, 1 / 3, 1)


@pytest.mark.parametrize("empty", [tally([], "", 3), tally([0.5], "-", 0)])
def test_without_detections_or_boxes_there_is_no_point(empty):
    result = choose(empty, BEST_F1)
    assert set(result.values()) == {None}
    numbers = dict.fromkeys(result, math.nan)
    assert point_of(numbers, BEST_F1, chosen_on="a", validation=True) is None


def test_figures_from_a_score_that_lies_between():
    assert figures_from(FIVE, 0.75) == figures(0.75, 1, 0.4)
    assert figures_from(FIVE, 0.95) == {"score": 0.95, "precision": None, "recall": 0, "f1": 0}
    assert figures_from(tally([0.5], "-", 0), 0.1) == {
        "score": 0.1,
        "precision": 0,
        "recall": None,
        "f1": None,
    }


def test_point_says_what_it_was_chosen_on():
    assert str(POINT) == ("score 0.5, best F1 on mine_val (precision 0.800, recall 0.400, F1 0.530 there)")
    assert "on mine_val, a test set (" in str(POINT._replace(validation=False))


def test_saved_point_is_what_was_saved():
    assert saved_point({"operating_point": POINT._asdict()}, "a.pth") == POINT
    assert saved_point({}, "a.pth") is None  # an older checkpoint


@pytest.mark.parametrize(
    "damage",
    [
        "text",
        {"score": 0.5},
        POINT._asdict() | {"score": math.nan},
        POINT._asdict() | {"score": 2.0},
        POINT._asdict() | {"recall": "0.4"},
        POINT._asdict() | {"chosen_on": "a\nb"},
        POINT._asdict() | {"validation": 1},
        POINT._asdict() | {"more": 1},
    ],
)
def test_a_damaged_point_is_refused(damage):
    with pytest.raises(UserError, match="a.pth is damaged: the operating point"):
        saved_point({"operating_point": damage}, "a.pth")


def test_classes_with_many_boxes_get_scores_of_their_own():
    """Class 0 is found surely, class 1 unsurely, and class 2 has too few boxes to say."""
    numbers = [FEWEST_BOXES, FEWEST_BOXES, FEWEST_BOXES - 1]
    labels = np.repeat([0, 1, 2], numbers)
    boxes = np.array([[20.0 * i, 0, 10, 10] for i in range(len(labels))])
    on_one = np.zeros(len(labels), int)
    truth = Truth(1, 3, on_one, boxes, labels, boxes[:, 2] * 10, on_one.astype(bool))
    scores = np.array([0.9, 0.2, 0.5])[labels]
    wrong = np.array([[0.0, 500, 10, 10]] * 60)  # of class 0, less sure than the right ones
    found = Detections(
        np.zeros(len(labels) + 60, int),
        np.concatenate([boxes, wrong]),
        np.concatenate([labels, np.zeros(60, int)]),
        np.concatenate([scores, np.full(60, 0.6)]),
    )
    truth, found = in_order(truth, found)
    outcome = coco_outcome(truth, found, overlaps(truth, found))
    names = ["sure", "unsure", "rare"]
    assert scores_of_classes(truth, found, outcome, names, BEST_F1) == {"sure": 0.9, "unsure": 0.2}
    assert scores_of_classes(truth._replace(classes=1), found, outcome, ["all"], BEST_F1) == {}


def test_scores_of_classes_travel_in_the_point():
    figures = {"score": 0.5, "precision": 0.8, "recall": 0.4, "f1": 0.53, "score-tree": 0.3}
    point = point_of(figures, BEST_F1, chosen_on="mine_val", validation=True)
    assert point is not None
    assert point.per_class == {"tree": 0.3}
    assert saved_point({"operating_point": point._asdict()}, "a.pth") == point
    older = {name: x for name, x in point._asdict().items() if name != "per_class"}
    assert saved_point({"operating_point": older}, "a.pth") == point._replace(per_class={})
    assert str(point).endswith("F1 0.530 there); of single classes: tree 0.3")
    for damage in ([], {"tree": 2.0}, {"tree": "0.3"}, {1: 0.3}):
        with pytest.raises(UserError, match="a.pth is damaged: the operating point's per_class is"):
            saved_point({"operating_point": {**point._asdict(), "per_class": damage}}, "a.pth")
