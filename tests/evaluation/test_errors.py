from __future__ import annotations

import json

import numpy as np
import pytest

from focal_d2.evaluation.backends import Detections, Truth, _hotcoco, coco_curves
from focal_d2.evaluation.errors import (
    ERRORS,
    RECALLS,
    analyse,
    coco_outcome,
    confusion_matrix,
    errors_of,
    fixed_ap50,
    tally,
    tide,
    voc_average_precision,
)
from focal_d2.evaluation.matching import best, in_order, match, overlaps, ranks
from focal_d2.evaluation.operating_point import BEST_F1
from tests.evaluation.scenes import random_scene
from tests.evaluation.test_backends import columns

# A box of 100 pixels; parts of it have the IoU of their share.
BOX = (0, 0, 10, 10)
FAR = (50, 50, 10, 10)


def share(tenths: int) -> tuple[int, ...]:
    """A box that covers so many tenths of BOX."""
    return (0, 0, tenths, 10)


def scene(boxes, found, images=2, classes=3):
    """Boxes are (image, label, box) with "ignored" behind it or not, found are (image, label, box, score)."""
    corners = np.array([x[2] for x in boxes], float).reshape(-1, 4)
    truth = Truth(
        images,
        classes,
        np.array([x[0] for x in boxes], np.int64),
        corners,
        np.array([x[1] for x in boxes], np.int64),
        corners[:, 2:].prod(1),
        np.array([len(x) > 3 for x in boxes], bool),
    )
    detections = Detections(
        np.array([x[0] for x in found], np.int64),
        np.array([x[2] for x in found], float).reshape(-1, 4),
        np.array([x[1] for x in found], np.int64),
        np.array([x[3] for x in found], float),
    )
    return in_order(truth, detections)


def figures(truth, detections, limits=(1, 10, 100), score=None):
    curves = coco_curves(truth, detections, backend="hotcoco", max_dets=limits)
    names = [f"class{k}" for k in range(truth.classes)]
    return analyse(truth, detections, curves, names=names, max_dets=limits, goal=BEST_F1, score=score)


def tide_of(truth, detections):
    pairs = overlaps(truth, detections)
    return tide(truth, detections, pairs, coco_outcome(truth, detections, pairs))


# Of each kind the wrong detection and, beside a box that is found (label 0 in image 1), the boxes there are.
# AP50 of a class of which one box of two is found: precision 1 up to recall 0.5, 51 of 101 points.
HALF = 100 * 51 / 101


@pytest.mark.parametrize(
    "kind, boxes, wrong, base, gain",
    [
        # Becomes right: both boxes found.
        ("localisation", [(0, 0, BOX)], (0, 0, share(4)), HALF, 100 - HALF),
        # 0 of class 1 until it is mended; class 0 is 100.
        ("classification", [(0, 1, BOX)], (0, 0, BOX), 50, 50),
        # First by score is right; goes without gain. Scored before the box of image 1, below.
        ("duplicate", [], (1, 0, share(9)), 100, 0),
        ("background", [], (0, 0, FAR), 100, 0),
        # Another class's box, by 0.4 only.
        ("both", [(0, 1, BOX)], (0, 0, share(4)), 50, 0),
    ],
)
def test_tide_knows_each_kind_of_wrong_detection(kind, boxes, wrong, base, gain):
    truth, detections = scene([(1, 0, BOX), *boxes], [(1, 0, BOX, 0.9), (*wrong, 0.8)])
    result = tide_of(truth, detections)
    assert result["AP50"] == pytest.approx(base)
    counts = {x: result["errors"][x]["count"] for x in ERRORS}
    # The box of another class that a detection of kind "both" barely meets is missed besides.
    assert counts == {**dict.fromkeys(ERRORS, 0), kind: 1, **({"missed": 1} if kind == "both" else {})}
    assert result["errors"][kind]["delta_AP50"] == pytest.approx(gain)


@pytest.mark.parametrize("kind, wrong", [("background", (0, 0, FAR)), ("duplicate", (1, 0, share(9)))])
def test_tide_gains_what_a_wrong_detection_cost(kind, wrong):
    # By score: right, wrong, right. Precision 1 up to recall 0.5 (51 points), then 2/3 (50 points).
    truth, detections = scene(
        [(1, 0, BOX), (1, 0, FAR)], [(1, 0, BOX, 0.9), (*wrong, 0.8), (1, 0, FAR, 0.7)], classes=1
    )
    result = tide_of(truth, detections)
    assert result["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert result["errors"][kind] == {
        "count": 1,
        "delta_AP50": pytest.approx(100 - result["AP50"]),
        "share": 1,
    }


def test_tide_missed_boxes_are_not_asked_for():
    # Class 0: one of two found. Class 1: one box, not found, and nothing wrong.
    result = tide_of(*scene([(0, 0, BOX), (1, 0, BOX), (0, 1, FAR)], [(0, 0, BOX, 0.9)]))
    assert result["AP50"] == pytest.approx(HALF / 2)
    assert result["errors"]["missed"] == {"count": 2, "delta_AP50": pytest.approx(100 - HALF / 2), "share": 1}
    # With a wrong detection in class 1 that class still counts 0.
    result = tide_of(*scene([(0, 1, BOX)], [(1, 1, BOX, 0.9)]))
    assert result["errors"]["missed"]["delta_AP50"] == 0


def test_tide_mends_only_one_detection_a_box_and_none_of_a_box_that_is_found():
    boxes = [(0, 0, BOX), (1, 0, BOX)]
    # Two bad ones on the free box: the first becomes right, the second goes. A third on the found box goes.
    found = [(0, 0, BOX, 0.9), (1, 0, share(4), 0.8), (1, 0, share(3), 0.7), (0, 0, share(2), 0.6)]
    truth, detections = scene(boxes, found, classes=1)
    result = tide_of(truth, detections)["errors"]
    assert result["localisation"]["count"] == 3
    assert result["localisation"]["delta_AP50"] == pytest.approx(100 - HALF)
    assert result["missed"]["count"] == 0  # the localisation error accounts for it


def test_tide_mends_nothing_on_a_box_that_is_found():
    # The other box is missed: what lies beside the found one can't stand for it.
    truth, detections = scene(
        [(0, 0, BOX), (1, 0, BOX)], [(0, 0, BOX, 0.9), (0, 0, share(4), 0.8)], classes=1
    )
    errors = tide_of(truth, detections)["errors"]
    assert errors["localisation"] == {"count": 1, "delta_AP50": 0, "share": 0}
    assert errors["missed"]["count"] == 1


def test_tide_at_its_thresholds():
    kinds = {10: None, 5: None, 4: "localisation", 1: "localisation", 0: "background"}
    for tenths, kind in kinds.items():
        truth, detections = scene([(0, 0, BOX)], [(0, 0, share(tenths) if tenths else FAR, 0.9)])
        pairs = overlaps(truth, detections)
        errors = errors_of(truth, detections, pairs, coco_outcome(truth, detections, pairs))
        assert errors.kind[0] == (-1 if kind is None else ERRORS.index(kind)), tenths


def test_tide_ignores_what_lies_in_a_crowd():
    crowd = (0, 0, (0, 0, 100, 100), "ignored")
    result = tide_of(*scene([crowd, (1, 0, BOX)], [(0, 0, BOX, 0.9), (0, 1, FAR, 0.8), (1, 0, BOX, 0.7)]))
    assert result["AP50"] == pytest.approx(100)
    counts = {x: result["errors"][x]["count"] for x in ERRORS}
    assert counts == {**dict.fromkeys(ERRORS, 0), "background": 1}  # of another class than the crowd


def test_tide_on_random_scenes():
    limits = (1, 10, 100)
    for seed in range(60):
        truth, detections = in_order(*columns(*random_scene(seed)))
        result = figures(truth, detections, limits)
        last = coco_curves(truth, detections, backend="hotcoco", max_dets=limits).precision[0, :, :, 0, -1]
        if not (last > -1).any():
            assert result["tide"]["AP50"] is None
            continue
        assert result["tide"]["AP50"] == pytest.approx(100 * last[last > -1].mean(), abs=1e-9)
        kept = ranks(detections.image, detections.labels) < limits[-1]
        detections = Detections(*(x[kept] for x in detections))
        pairs = overlaps(truth, detections)
        outcome = coco_outcome(truth, detections, pairs)
        errors = errors_of(truth, detections, pairs, outcome)
        assert fixed_ap50(truth, detections, outcome, errors, ERRORS) == pytest.approx(1)
        gains = [x["delta_AP50"] for x in result["tide"]["errors"].values()]
        shares = [x["share"] for x in result["tide"]["errors"].values()]
        assert min(gains) > -1e-9
        assert (sum(shares) == pytest.approx(1)) if sum(gains) else shares == [None] * len(ERRORS)
        # Every detection is right, ignored or of one kind.
        assert ((errors.kind >= 0) ^ (outcome.matched >= 0) ^ outcome.ignored).all()


def test_tide_counts_are_hotcocos_where_it_has_no_crowds_or_limits():
    names = dict(zip(("Loc", "Cls", "Dupe", "Bkg", "Both", "Miss"), ERRORS, strict=True))
    compared = 0
    for seed in range(100):
        truth, detections = in_order(*columns(*random_scene(seed)))
        counts = ~truth.ignored
        truth = truth._replace(
            **{k: getattr(truth, k)[counts] for k in ("image", "boxes", "labels", "areas", "ignored")}
        )
        if len(detections.image) > 60:
            continue
        evaluation = _hotcoco(truth, detections)
        evaluation.evaluate()
        evaluation.accumulate()
        errors = tide_of(truth, detections)["errors"]
        expected = evaluation.tide_errors()["counts"]
        assert {k: errors[name]["count"] for k, name in names.items()} == expected, seed
        compared += 1
    assert compared > 40


def test_voc_average_precision_is_the_area_under_the_whole_curve():
    # By score: right, wrong, right of 3 boxes. Precision 1 to recall 1/3, 2/3 to 2/3: area 1/3 + 2/9 = 5/9.
    boxes = [(0, 0, BOX), (0, 0, FAR), (1, 0, BOX)]
    found = [(0, 0, BOX, 0.9), (1, 0, FAR, 0.8), (0, 0, FAR, 0.7)]
    result = voc_average_precision(*(s := scene(boxes, found)), overlaps(*s))
    assert result[0] == pytest.approx(5 / 9)
    assert np.isnan(result[1:]).all()


def test_voc_takes_the_best_box_whether_free_or_not():
    # The second detection overlaps the found box by 0.9 and the free one by 0.8: COCO gives it the free one.
    boxes = [(0, 0, BOX), (0, 0, (1, 0, 10, 10))]
    found = [(0, 0, BOX, 0.9), (0, 0, (0, 0, 10, 9), 0.8)]
    s = scene(boxes, found)
    assert voc_average_precision(*s, overlaps(*s))[0] == pytest.approx(0.5)
    assert (coco_outcome(*s, overlaps(*s)).matched >= 0).all()


def test_voc_difficult_boxes_count_neither_way():
    boxes = [(0, 0, BOX, "ignored"), (1, 0, BOX)]
    found = [(0, 0, BOX, 0.9), (0, 0, share(9), 0.85), (1, 0, BOX, 0.8)]
    s = scene(boxes, found)
    assert voc_average_precision(*s, overlaps(*s))[0] == pytest.approx(1)
    # A detection inside a large difficult box overlaps it by too little, and is wrong; in COCO it is ignored.
    boxes = [(0, 0, (0, 0, 100, 100), "ignored"), (1, 0, BOX)]
    s = scene(boxes, [(0, 0, BOX, 0.9), (1, 0, BOX, 0.8)])
    assert voc_average_precision(*s, overlaps(*s))[0] == pytest.approx(0.5)


def test_voc_takes_the_first_of_boxes_that_are_equal():
    for boxes, value in (
        ([(0, 0, BOX), (0, 0, BOX, "ignored")], 1),
        ([(0, 0, BOX, "ignored"), (0, 0, BOX)], 0),
    ):
        s = scene(boxes, [(0, 0, BOX, 0.9)])
        assert voc_average_precision(*s, overlaps(*s))[0] == value


def test_confusion_matrix_by_hand():
    boxes = [(0, 0, BOX), (0, 1, FAR), (1, 2, BOX), (1, 2, FAR, "ignored")]
    found = [
        (0, 0, BOX, 0.9),  # right
        (0, 2, FAR, 0.8),  # a 1 taken for a 2
        (0, 1, FAR, 0.7),  # right, but its box is gone: background taken for a 1
        (1, 0, FAR, 0.6),  # not of the ignored box's class: background taken for a 0
        (1, 2, FAR, 0.6),  # ignored
        (1, 2, BOX, 0.4),  # below the score: its box is missed
    ]
    s = scene(boxes, found)
    matrix = confusion_matrix(*s, overlaps(*s), 0.5)
    assert matrix.tolist() == [
        [1, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
        [1, 1, 0, 0],
    ]


def test_confusion_matrix_prefers_its_own_class_at_equal_overlap():
    s = scene([(0, 1, BOX), (0, 0, BOX)], [(0, 0, BOX, 0.9), (0, 1, BOX, 0.8)])
    assert confusion_matrix(*s, overlaps(*s), 0).trace() == 2
    s = scene([(0, 0, BOX), (0, 1, BOX)], [(0, 0, BOX, 0.9), (0, 1, BOX, 0.8)])
    assert confusion_matrix(*s, overlaps(*s), 0).trace() == 2


def test_tally_orders_detections_by_score_and_leaves_out_ignored_ones():
    boxes = [(0, 0, BOX), (1, 0, BOX)]
    # Right at 0.9 and 0.5; wrong at 0.5 and 0.2.
    found = [(1, 0, BOX, 0.5), (0, 0, BOX, 0.9), (1, 0, FAR, 0.2), (1, 0, FAR, 0.5)]
    truth, detections = in_order(*scene(boxes, found))
    result = tally(truth, detections, coco_outcome(truth, detections, overlaps(truth, detections)))
    assert (result.scores.tolist(), result.right.tolist(), result.boxes) == (
        [0.9, 0.5, 0.5, 0.2], [True, True, False, False], 2
    )  # fmt: skip
    truth = truth._replace(ignored=np.array([False, True]))
    result = tally(truth, detections, coco_outcome(truth, detections, overlaps(truth, detections)))
    assert (result.scores.tolist(), result.boxes) == ([0.9, 0.5, 0.2], 1)


def test_all_figures_are_those_of_a_score_that_was_chosen_elsewhere():
    scene_of_two = scene([(0, 0, BOX), (1, 0, BOX)], [(0, 0, BOX, 0.9), (1, 0, BOX, 0.5), (1, 0, FAR, 0.2)])
    chosen = figures(*scene_of_two)
    assert chosen["operating_point"] == {"score": 0.5, "precision": 1, "recall": 1, "f1": 1, "per_class": {}}
    given = figures(*scene_of_two, score=0.7)
    assert given["operating_point"].pop("per_class") == {}
    assert given["operating_point"] == pytest.approx(
        {"score": 0.7, "precision": 1, "recall": 0.5, "f1": 2 / 3}
    )
    assert given["confusion"]["score"] == given["image_averages"]["score"] == 0.7
    assert given["confusion"]["matrix"][0] == [1, 0, 0, 1]
    assert given["image_averages"]["recall"] == 0.5
    nothing = figures(*scene_of_two, score=0.95)["operating_point"]
    assert nothing == {"score": 0.95, "precision": None, "recall": 0, "f1": 0, "per_class": {}}


def test_match_takes_boxes_by_score_and_of_equal_overlaps_the_later():
    s = scene([(0, 0, BOX), (0, 0, BOX)], [(0, 0, BOX, 0.9), (0, 0, BOX, 0.8), (0, 0, BOX, 0.7)])
    assert match(overlaps(*s), np.arange(3), 2).tolist() == [1, 0, -1]


def test_best_of_equal_overlaps_is_the_later_or_the_preferred():
    pairs = overlaps(*scene([(0, 0, BOX), (0, 0, BOX)], [(0, 0, BOX, 0.9), (1, 0, BOX, 0.8)]))
    assert pairs.box[best(pairs, 2)[0]] == 1
    assert pairs.box[best(pairs, 2, prefer=np.array([1, 0]))[0]] == 0
    assert best(pairs, 2)[1] == -1


def test_overlaps_in_chunks_are_the_same(monkeypatch):
    s = in_order(*columns(*random_scene(12)))
    whole = overlaps(*s)
    assert len(whole.detection) > 20
    for size in (1, 7):
        monkeypatch.setattr("focal_d2.evaluation.matching._CHUNK", size)
        for a, b in zip(overlaps(*s), whole, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("boxes", [[], [(0, 0, BOX)], [(0, 0, BOX, "ignored")]])
@pytest.mark.parametrize("found", [[], [(0, 0, FAR, 0.9)]])
def test_analyse_of_nothing_is_null_or_zero(boxes, found):
    result = figures(*scene(boxes, found))
    json.dumps(result, allow_nan=False)
    there = bool(boxes) and len(boxes[0]) == 3
    assert result["boxes"] == there
    assert result["voc"]["mAP"] == result["tide"]["AP50"] == (0 if there else None)
    assert result["per_class"][1]["AP"] is None
    assert result["curves"]["precision"]["0.5"][1] is None
    assert sum(map(sum, result["confusion"]["matrix"])) == there + bool(found and there)


def test_analyse_has_curves_and_classes():
    # Class 0: found exactly, and once by 0.6 of the box. Class 1: missed.
    boxes = [(0, 0, BOX), (1, 0, BOX), (1, 1, FAR)]
    found = [(0, 0, BOX, 0.9), (1, 0, share(6), 0.8)]
    result = figures(*scene(boxes, found, classes=2))
    assert result["curves"]["recall"] == RECALLS.tolist()
    assert result["curves"]["precision"]["0.5"][0] == pytest.approx([1.0] * 101)
    assert result["curves"]["precision"]["0.75"][0] == pytest.approx([1.0] * 51 + [0.0] * 50)
    assert result["curves"]["precision"]["0.5"][1] == [0.0] * 101
    # IoU 0.6 counts at 0.5, 0.55 and 0.6 of 10 thresholds.
    half = 100 * 51 / 101
    assert result["per_class"][0] == {
        "name": "class0",
        "boxes": 2,
        "detections": 2,
        "AP": pytest.approx(0.3 * 100 + 0.7 * half),
        "AP50": pytest.approx(100),
        "AP75": pytest.approx(half),
        "AR": pytest.approx(100 * (3 + 7 * 0.5) / 10),
        "voc_AP50": pytest.approx(100),
    }
    assert result["coco"]["ARs"] == pytest.approx((65 + 0) / 2)
    assert result["coco"]["ARm"] is None


def test_analyse_counts_what_the_last_limit_leaves():
    boxes = [(0, 0, (20 * i, 0, 10, 10)) for i in range(3)]
    result = figures(*scene(boxes, [(*x, 0.9 - 0.1 * i) for i, x in enumerate(boxes)]), limits=(1, 2))
    assert result["detections"] == 2
    assert result["tide"]["errors"]["missed"]["count"] == 1
    assert result["voc"]["mAP"] == pytest.approx(100)  # has no limit
