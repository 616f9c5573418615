"""The errors of a detector, as figures for a report: `analysis.json`.

N images, K classes, B ground-truth boxes, D detections. Boxes that are ignored (crowds, difficult ones) count
nowhere; detections that fit only them are neither right nor wrong.

The file is one JSON object; a figure that is not defined is null, and lists of classes are in label order:

    dataset, backend       texts
    images, boxes          numbers of images, and of boxes that count
    detections             number of detections
    max_dets               limits on the detections of a class in an image; the last holds for all but "voc"
    coco                   the evaluator's metrics, per cent, and ARs, ARm, ARl: recall by size
    per_class              a list of {name, boxes, detections, AP, AP50, AP75, AR, voc_AP50}, per cent
    voc                    {iou, mAP}: VOC's average precision at IoU 0.5, per cent
    operating_point        {score, precision, recall, f1, goal, chosen_on, validation, per_class}: what
                           detections from this score on reach over all classes at IoU 0.5; what the score
                           was chosen for, on which dataset, and whether that is one of DATASETS.VAL; and, by
                           name, the scores of classes that have at least 50 boxes there
    image_averages         {iou, score, images, precision, recall}: means over the images with boxes, from
                           this score on, with detections and boxes assigned one to one
    confusion              {iou, score, matrix}: K + 1 rows of truth, columns of detections, background last
    tide                   {match, background, AP50, errors}; errors is kind -> {count, delta_AP50, share}
    curves                 {recall, precision}: 101 recalls; IoU ("0.5", "0.75") -> class -> 101 precisions
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from focal_d2.evaluation.backends import AREAS, IOUS, Curves, Detections, Truth
from focal_d2.evaluation.image_averages import image_averages
from focal_d2.evaluation.matching import BACKGROUND, MATCH, Pairs, best, in_order, match, overlaps, ranks
from focal_d2.evaluation.operating_point import Goal, Tally, choose, figures_from

RECALLS = np.linspace(0, 1, 101)
FEWEST_BOXES = 50  # of a class that gets an operating point of its own
# The kinds of error, in the order in which a wrong detection is tried.
ERRORS = ("localisation", "classification", "duplicate", "background", "both", "missed")


def analyse(
    truth: Truth,
    detections: Detections,
    curves: Curves,
    *,
    names: Sequence[str],
    max_dets: Sequence[int],
    goal: Goal,
    score: float | None,
) -> dict[str, Any]:
    """Compute what `analysis.json` holds, but for "dataset", "backend" and the evaluator's own metrics.

    Of "operating_point" it returns the numbers only, and "per_class": name -> score of the classes that have
    enough boxes for one of their own, if the score is chosen here and there are several classes.

    Args:
        truth: the ground truth.
        detections: of the same images.
        curves: of the same.
        names: of the K classes.
        max_dets: limits that the curves were made with.
        goal: what the operating point's score is chosen for.
        score: it was chosen already; None: choose it on these detections.
    """
    truth, detections = in_order(truth, detections)
    pairs = overlaps(truth, detections)
    voc = voc_average_precision(truth, detections, pairs)
    # From here on, what COCO counts.
    kept = ranks(detections.image, detections.labels) < max_dets[-1]
    detections = Detections(*(x[kept] for x in detections))
    pairs = pairs.where(kept[pairs.detection])
    pairs = pairs._replace(detection=(np.cumsum(kept) - 1)[pairs.detection])
    outcome = coco_outcome(truth, detections, pairs)
    counted = tally(truth, detections, outcome)
    point = choose(counted, goal) if score is None else figures_from(counted, score)
    per_class = {} if score is not None else scores_of_classes(truth, detections, outcome, names, goal)
    score = math.inf if point["score"] is None else point["score"]
    precision = curves.precision[..., -1]
    at = {iou: precision[np.isclose(IOUS, iou)][0] for iou in (0.5, 0.75)}
    return {
        "images": truth.images,
        "boxes": int((~truth.ignored).sum()),
        "detections": len(detections.image),
        "max_dets": list(max_dets),
        "coco": {
            f"AR{size[0]}": _percent(_mean(curves.recall[..., i, -1]))
            for i, size in enumerate(AREAS)
            if size != "all"
        },
        "per_class": _per_class(truth, detections, curves, at, voc, names),
        "voc": {"iou": MATCH, "mAP": _percent(_mean(voc))},
        "operating_point": {**point, "per_class": per_class},
        "image_averages": image_averages(truth, detections, score, _in_ignored(truth, detections, pairs)),
        "confusion": {
            "iou": MATCH,
            "score": point["score"],
            "matrix": confusion_matrix(truth, detections, pairs, score).tolist(),
        },
        "tide": tide(truth, detections, pairs, outcome),
        "curves": {
            "recall": RECALLS.tolist(),
            "precision": {
                str(iou): [_curve(of_iou[:, k, 0]) for k in range(truth.classes)]
                for iou, of_iou in at.items()
            },
        },
    }


def _per_class(
    truth: Truth,
    detections: Detections,
    curves: Curves,
    at: Mapping[float, np.ndarray],
    voc: np.ndarray,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the figures of each class; see the module.

    Args:
        truth: the ground truth.
        detections: those within the limit.
        curves: of the same.
        at: IoU -> precision (101, K, areas) of the curves.
        voc: (K,) VOC's AP.
        names: of the K classes.
    """
    precision, recall = curves.precision[..., -1], curves.recall[..., -1]
    boxes = np.bincount(truth.labels[~truth.ignored], minlength=truth.classes)
    detected = np.bincount(detections.labels, minlength=truth.classes)
    return [
        {
            "name": name,
            "boxes": int(boxes[k]),
            "detections": int(detected[k]),
            "AP": _percent(_mean(precision[:, :, k, 0])),
            "AP50": _percent(_mean(at[0.5][:, k, 0])),
            "AP75": _percent(_mean(at[0.75][:, k, 0])),
            "AR": _percent(_mean(recall[:, k, 0])),
            "voc_AP50": _percent(voc[k]),
        }
        for k, name in enumerate(names)
    ]


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """Replace NaN, which JSON does not have, by None."""
    return {k: None if math.isnan(v) else float(v) for k, v in figures.items()}


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]  # NaN is not either
    return float(values.mean()) if values.size else math.nan


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else 100 * float(value)


def _curve(values: np.ndarray) -> list[float] | None:
    return None if values[0] < 0 else values.tolist()


class Outcome(NamedTuple):
    """COCO's matching at IoU 0.5, class by class.

    Attributes:
        matched: (D,) int64 box or -1.
        ignored: (D,) bool: no box matches, but it lies in an ignored one of its class.
    """

    matched: np.ndarray
    ignored: np.ndarray


def coco_outcome(truth: Truth, detections: Detections, pairs: Pairs) -> Outcome:
    """Match as pycocotools does for AP50."""
    same = truth.labels[pairs.box] == detections.labels[pairs.detection]
    kept = same & ~truth.ignored[pairs.box] & (pairs.iou >= MATCH)
    matched = match(pairs.where(kept), ranks(detections.image, detections.labels), len(truth.boxes))
    return Outcome(matched, _in_ignored(truth, detections, pairs) & (matched < 0))


def _in_ignored(truth: Truth, detections: Detections, pairs: Pairs) -> np.ndarray:
    """(D,) bool: at least `MATCH` of its area lies in an ignored box of its class."""
    inside = np.zeros(len(detections.image), dtype=bool)
    same = truth.labels[pairs.box] == detections.labels[pairs.detection]
    inside[pairs.detection[same & truth.ignored[pairs.box] & (pairs.covered >= MATCH)]] = True
    return inside


def voc_average_precision(truth: Truth, detections: Detections, pairs: Pairs) -> np.ndarray:
    """VOC's AP at IoU 0.5 of each class, (K,) from 0 to 1, NaN without boxes.

    As the development kit of VOC 2010 and later: a detection takes the box of its class that it overlaps
    most, be it free or not; a box's first detection is right, later ones are wrong, those of a difficult box
    don't count; the area under the whole curve of precision, made to fall. Coordinates here are continuous,
    the kit counts inclusive pixels.
    """
    size = len(detections.image)
    order = np.argsort(-detections.scores, kind="stable")
    of_class = pairs.where(
        (truth.labels[pairs.box] == detections.labels[pairs.detection]) & (pairs.iou >= MATCH)
    )
    chosen = best(of_class, size, prefer=-of_class.box)  # of equal ones the first
    box = np.where(chosen >= 0, np.append(of_class.box, -1)[chosen], -1)
    hit = np.zeros(size, dtype=bool)
    taken_by = order[box[order] >= 0]
    hit[taken_by[np.unique(box[taken_by], return_index=True)[1]]] = True
    counts = ~np.append(truth.ignored, False)[box]
    result = np.full(truth.classes, np.nan)
    numbers = np.bincount(truth.labels[~truth.ignored], minlength=truth.classes)
    hits_of_class = _split(hit, counts, detections.labels, order, truth.classes)
    for k, (hits, number) in enumerate(zip(hits_of_class, numbers, strict=True)):
        if number:
            precision, recall = _precision_recall(hits, number)
            result[k] = np.sum(np.diff(recall, prepend=0) * precision)
    return result


def _precision_recall(hits: np.ndarray, boxes: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision, made to fall, and recall after each of a class's detections, (n,) bool by falling score."""
    right = np.cumsum(hits)
    precision = right / np.arange(1, len(hits) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1], right / boxes


def _average_precision(hits: np.ndarray, boxes: int) -> float:
    """COCO's, from 0 to 1: the mean precision at 101 recalls, 0 where a recall is not reached."""
    precision, recall = _precision_recall(hits, boxes)
    return float(np.append(precision, 0)[np.searchsorted(recall, RECALLS)].mean())


def _split(
    hit: np.ndarray, counts: np.ndarray, labels: np.ndarray, order: np.ndarray, classes: int
) -> list[np.ndarray]:
    """Divide `hit` into K arrays by `labels`, in `order`, of the detections that count; all (D,)."""
    order = order[counts[order]]
    order = order[np.argsort(labels[order], kind="stable")]
    return np.split(hit[order], np.searchsorted(labels[order], np.arange(1, classes)))


def tally(truth: Truth, detections: Detections, outcome: Outcome) -> Tally:
    """Return which detections are right at IoU 0.5, by falling score, without those that do not count."""
    order = np.argsort(-detections.scores, kind="stable")
    order = order[~outcome.ignored[order]]
    return Tally(detections.scores[order], outcome.matched[order] >= 0, int((~truth.ignored).sum()))


def scores_of_classes(
    truth: Truth, detections: Detections, outcome: Outcome, names: Sequence[str], goal: Goal
) -> dict[str, float]:
    """Choose a score for each of several classes that has `FEWEST_BOXES`; with fewer it is mostly chance."""
    scores = {}
    numbers = np.bincount(truth.labels[~truth.ignored], minlength=truth.classes)
    for k, name in enumerate(names if truth.classes > 1 else ()):
        if numbers[k] < FEWEST_BOXES:
            continue
        kept = detections.labels == k
        parts = Detections(*(x[kept] for x in detections)), Outcome(*(x[kept] for x in outcome))
        chosen = choose(tally(truth, *parts)._replace(boxes=int(numbers[k])), goal)["score"]
        if chosen is not None:
            scores[name] = chosen
    return scores


def confusion_matrix(truth: Truth, detections: Detections, pairs: Pairs, score: float) -> np.ndarray:
    """Count how often each class was detected as each class.

    Detections of at least `score` are taken by falling score; each gets the free box of any class that it
    overlaps most, by IoU 0.5 at least (of equal ones, one of its own class).

    Returns:
        (K + 1, K + 1) int64: row of the box's class, column of the detection's, background last: there are
        detections without a box in the last row, boxes without a detection in the last column.
    """
    kept = detections.scores >= score
    candidates = pairs.where(kept[pairs.detection] & ~truth.ignored[pairs.box] & (pairs.iou >= MATCH))
    same = truth.labels[candidates.box] == detections.labels[candidates.detection]
    matched = match(candidates, ranks(detections.image), len(truth.boxes), prefer=same)
    kept &= (matched >= 0) | ~_in_ignored(truth, detections, pairs)
    rows = np.append(truth.labels, truth.classes)[matched[kept]]
    matrix = np.zeros((truth.classes + 1,) * 2, dtype=np.int64)
    np.add.at(matrix, (rows, detections.labels[kept]), 1)
    missed = ~truth.ignored
    missed[matched[matched >= 0]] = False
    matrix[:-1, -1] = np.bincount(truth.labels[missed], minlength=truth.classes)
    return matrix


class Errors(NamedTuple):
    """The kind of every error at IoU 0.5.

    Attributes:
        kind: (D,) int64 position in `ERRORS`; -1 for detections that are right or ignored.
        target: (D,) int64: the box that a detection would match if only its class or place were right, or -1.
        missed: (B,) bool: boxes that no detection matches or would match if corrected.
    """

    kind: np.ndarray
    target: np.ndarray
    missed: np.ndarray


def errors_of(truth: Truth, detections: Detections, pairs: Pairs, outcome: Outcome) -> Errors:
    """Sort wrong detections and boxes not found into kinds (Bolya et al., arXiv 2008.08115, section 2.2).

    With t_f = `MATCH`, t_b = `BACKGROUND`, a wrong detection is the first of: localisation: it overlaps a box
    of its class by t_b or more, and none by t_f; classification: one of another class by t_f or more;
    duplicate: one of its class by t_f or more, which is taken; background: none by more than t_b; both: the
    rest.
    """
    size = len(detections.image)
    pairs = pairs.where(~truth.ignored[pairs.box])
    same = truth.labels[pairs.box] == detections.labels[pairs.detection]

    def highest(candidates: Pairs) -> tuple[np.ndarray, np.ndarray]:
        chosen = best(candidates, size)
        return np.append(candidates.iou, 0)[chosen], np.append(candidates.box, -1)[chosen]

    iou, box = highest(pairs.where(same))
    other_iou, other_box = highest(pairs.where(~same))
    tests = (
        (iou >= BACKGROUND) & (iou < MATCH),
        other_iou >= MATCH,
        iou >= MATCH,
        np.maximum(iou, other_iou) <= BACKGROUND,
    )
    wrong = (outcome.matched < 0) & ~outcome.ignored
    kind = np.where(wrong, np.select(tests, range(4), ERRORS.index("both")), -1)
    target = np.select([kind == 0, kind == 1], [box, other_box], -1)
    missed = ~truth.ignored
    missed[outcome.matched[outcome.matched >= 0]] = False
    missed[target[target >= 0]] = False
    return Errors(kind, target, missed)


def fixed_ap50(
    truth: Truth, detections: Detections, outcome: Outcome, errors: Errors, kinds: Sequence[str]
) -> float:
    """COCO's AP50, 0 to 1, if there were no errors of these kinds (arXiv 2008.08115, section 2.3).

    A detection of the wrong place or class becomes right, unless its box has a match, or another such
    detection of a higher score; then it goes, as wrong ones of other kinds do. Missed boxes are not asked
    for; a class that has no others counts 1 without wrong detections, else 0 (the paper leaves it open).
    """
    fixed = np.isin(errors.kind, [ERRORS.index(x) for x in kinds])
    order = np.argsort(-detections.scores, kind="stable")
    free = np.ones(len(truth.boxes) + 1, dtype=bool)
    free[outcome.matched[outcome.matched >= 0]] = False
    free[-1] = False
    corrected = order[(fixed & free[errors.target])[order]]
    corrected = corrected[np.unique(errors.target[corrected], return_index=True)[1]]
    hit = outcome.matched >= 0
    hit[corrected] = True
    labels = detections.labels.copy()
    labels[corrected] = truth.labels[errors.target[corrected]]
    counts = ~outcome.ignored & (~fixed | hit)
    numbers = np.bincount(truth.labels[~truth.ignored], minlength=truth.classes)
    expected = numbers
    if "missed" in kinds:
        expected = numbers - np.bincount(truth.labels[errors.missed], minlength=truth.classes)
    of_class = _split(hit, counts, labels, order, truth.classes)
    values = [
        _average_precision(hits, boxes) if boxes else float(not len(hits))
        for hits, boxes, number in zip(of_class, expected, numbers, strict=True)
        if number
    ]
    return float(np.mean(values)) if values else math.nan


def tide(truth: Truth, detections: Detections, pairs: Pairs, outcome: Outcome) -> dict[str, Any]:
    """Count errors by kind, and what AP50 would gain without each kind, alone.

    Returns:
        "match" and "background", the IoUs that divide kinds; "AP50" in per cent; "errors": kind -> "count",
        "delta_AP50" in per cent, and "share", its part of the deltas' sum.
    """
    errors = errors_of(truth, detections, pairs, outcome)
    base = fixed_ap50(truth, detections, outcome, errors, ())
    gains = {x: fixed_ap50(truth, detections, outcome, errors, (x,)) - base for x in ERRORS}
    total = sum(gains.values())
    counts = [*(int((errors.kind == i).sum()) for i in range(len(ERRORS) - 1)), int(errors.missed.sum())]
    return {
        "match": MATCH,
        "background": BACKGROUND,
        "AP50": _percent(base),
        "errors": {
            x: {
                "count": count,
                "delta_AP50": _percent(gains[x]),
                "share": gains[x] / total if total > 0 else None,
            }
            for x, count in zip(ERRORS, counts, strict=True)
        },
    }
