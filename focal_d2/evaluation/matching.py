"""Overlaps of detections and boxes in the same image, and COCO's greedy matching, for all images at once.

B ground-truth boxes, D detections, P overlapping pairs.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from focal_d2.evaluation.backends import Detections, Truth

# A pair counts as a match from here, as in AP50 and VOC's AP.
MATCH = 0.5
# Overlaps below this count as none (TIDE's t_b).
BACKGROUND = 0.1
# Pairs whose overlaps are computed at once: some 20 MB, near the cache.
_CHUNK = 250_000


class Pairs(NamedTuple):
    """Pairs of an image's detection and box, ascending by detection, then by box.

    Attributes:
        detection: (P,) int64, position in the detections.
        box: (P,) int64, position in the boxes.
        iou: (P,) float64, intersection over union.
        covered: (P,) float64, intersection over the detection's area, which COCO uses with crowds.
    """

    detection: np.ndarray
    box: np.ndarray
    iou: np.ndarray
    covered: np.ndarray

    def where(self, kept: np.ndarray) -> Pairs:
        """Return the pairs that are marked in `kept`, (P,) bool."""
        return Pairs(*(x[kept] for x in self))


def in_order(truth: Truth, detections: Detections) -> tuple[Truth, Detections]:
    """Sort both by image, and detections then by falling score; ties keep their order."""
    boxes = np.argsort(truth.image, kind="stable")
    order = np.lexsort((-detections.scores, detections.image))
    return (
        truth._replace(
            **{k: getattr(truth, k)[boxes] for k in ("image", "boxes", "labels", "areas", "ignored")}
        ),
        Detections(*(x[order] for x in detections)),
    )


def overlaps(truth: Truth, detections: Detections) -> Pairs:
    """Find the pairs that overlap by `BACKGROUND` or, with an ignored box, cover `MATCH` of the detection.

    Args:
        truth: see `in_order`.
        detections: see `in_order`.
    """
    starts = np.searchsorted(truth.image, detections.image, side="left")
    counts = np.searchsorted(truth.image, detections.image, side="right") - starts
    ends = np.cumsum(counts)
    chunks, low = [], 0
    while low < len(counts):
        before = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _CHUNK, side="right")))
        detection = np.repeat(np.arange(low, high), counts[low:high])
        box = np.arange(len(detection)) + np.repeat(
            starts[low:high] - (ends[low:high] - counts[low:high] - before), counts[low:high]
        )
        chunks.append(_overlapping(truth, detections, detection, box))
        low = high
    if not chunks:
        return Pairs(*(np.zeros(0, dtype) for dtype in (np.int64, np.int64, np.float64, np.float64)))
    return Pairs(*(np.concatenate(x) for x in zip(*chunks, strict=True)))


def _overlapping(truth: Truth, detections: Detections, detection: np.ndarray, box: np.ndarray) -> Pairs:
    shared = np.ones(len(detection))
    for low in (0, 1):
        # In the order of pycocotools' sums, so that an IoU at a threshold falls on the same side.
        a, b = detections.boxes[:, low][detection], truth.boxes[:, low][box]
        ends = a + detections.boxes[:, low + 2][detection], b + truth.boxes[:, low + 2][box]
        side = np.minimum(*ends) - np.maximum(a, b)
        meet = side > 0
        detection, box, shared = detection[meet], box[meet], shared[meet] * side[meet]
    area = detections.boxes[detection, 2] * detections.boxes[detection, 3]
    iou = shared / (area + truth.boxes[box, 2] * truth.boxes[box, 3] - shared)
    covered = shared / area
    pairs = Pairs(detection, box, iou, covered)
    return pairs.where((iou >= BACKGROUND) | (truth.ignored[box] & (covered >= MATCH)))


def ranks(*groups: np.ndarray) -> np.ndarray:
    """Return the rank (D,) of each detection among those with the same values in all `groups`, each (D,)."""
    order = np.lexsort(groups)
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.any([g[order][1:] != g[order][:-1] for g in groups], axis=0)
    first = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - first
    return rank


def best(pairs: Pairs, detections: int, prefer: np.ndarray | None = None) -> np.ndarray:
    """Return each detection's pair of highest IoU: (D,) positions in `pairs`, or -1.

    Args:
        pairs: to choose from.
        detections: D.
        prefer: (P,) what decides between equal IoUs, the higher; None: the later box.
    """
    order = np.lexsort((pairs.box if prefer is None else prefer, pairs.iou, pairs.detection))
    chosen = np.full(detections, -1, dtype=np.int64)
    chosen[pairs.detection[order]] = order  # the last one stays
    return chosen


def match(pairs: Pairs, rank: np.ndarray, boxes: int, prefer: np.ndarray | None = None) -> np.ndarray:
    """Give detections boxes as COCO does: by score, each the free box that it overlaps most.

    Args:
        pairs: those that may match.
        rank: (D,) rank of each detection among those that compete for the same boxes.
        boxes: B.
        prefer: see `best`.

    Returns:
        (D,) box or -1.
    """
    matched, taken = np.full(len(rank), -1, dtype=np.int64), np.zeros(boxes, dtype=bool)
    keys = (pairs.box, pairs.iou, pairs.detection, rank[pairs.detection])
    order = np.lexsort(keys if prefer is None else (pairs.box, prefer, *keys[1:]))
    ends = np.searchsorted(rank[pairs.detection][order], np.arange(rank.max(initial=-1) + 2))
    for low, high in itertools.pairwise(ends):
        # Detections of one rank have no box in common.
        turn = order[low:high]
        turn = turn[~taken[pairs.box[turn]]]
        matched[pairs.detection[turn]] = pairs.box[turn]  # the last one stays: the highest IoU
        taken[matched[pairs.detection[turn]]] = True
    return matched
