"""Precision and recall as the field of tree crowns counts them: image by image, then averaged.

NeonTreeEvaluation and DeepForest count so (Weinstein et al., PLOS Computational Biology 2021): in each image
detections and boxes are assigned one to one so that the sum of their common areas is largest, and an assigned
pair is right if its IoU is above 0.4. Classes are not looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from focal_d2.evaluation.backends import Detections, Truth

IOU = 0.4


def image_averages(
    truth: Truth, detections: Detections, score: float, in_ignored: np.ndarray
) -> dict[str, Any]:
    """Average the precision and the recall of the images that have boxes.

    An image without detections has recall 0 and no precision, so it is left out of the mean of precision;
    images without boxes are left out of both. Ignored boxes are not counted, nor are detections that match
    no box and lie in an ignored one.

    Args:
        truth: see `in_order`.
        detections: see `in_order`.
        score: the lowest score that counts.
        in_ignored: (D,) bool, which detections lie in an ignored box.

    Returns:
        "iou"; "score"; "images", their number; "precision" and "recall", means from 0 to 1, or None.
    """
    precisions, recalls = [], []
    numbers = np.arange(truth.images + 1)
    box_starts, starts = np.searchsorted(truth.image, numbers), np.searchsorted(detections.image, numbers)
    for i in range(truth.images):
        of_truth = np.arange(box_starts[i], box_starts[i + 1])
        of_truth = of_truth[~truth.ignored[of_truth]]
        if not len(of_truth):
            continue
        of_image = np.arange(starts[i], starts[i + 1])
        of_image = of_image[detections.scores[of_image] >= score]
        right = assigned(detections.boxes[of_image], truth.boxes[of_truth])
        counted = np.count_nonzero(right | ~in_ignored[of_image])
        recalls.append(np.count_nonzero(right) / len(of_truth))
        if counted:
            precisions.append(np.count_nonzero(right) / counted)
    return {
        "iou": IOU,
        "score": score if np.isfinite(score) else None,
        "images": len(recalls),
        "precision": float(np.mean(precisions)) if precisions else None,
        "recall": float(np.mean(recalls)) if recalls else None,
    }


def assigned(detected: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return which detections of an image get a box with which their IoU is above `IOU`, (D,) bool.

    Args:
        detected: (D, 4) left, top, width, height in pixels.
        boxes: (B, 4), the same.
    """
    sides = np.minimum(
        detected[:, None, :2] + detected[:, None, 2:], boxes[None, :, :2] + boxes[None, :, 2:]
    ) - np.maximum(detected[:, None, :2], boxes[None, :, :2])
    common = sides.clip(min=0).prod(2)  # (D, B)
    union = detected[:, None, 2:].prod(2) + boxes[None, :, 2:].prod(2) - common
    rows, columns = linear_sum_assignment(common, maximize=True)
    right = np.zeros(len(detected), dtype=bool)
    right[rows] = common[rows, columns] > IOU * union[rows, columns]
    return right
