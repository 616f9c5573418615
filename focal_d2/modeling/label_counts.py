"""Count the positive and negative anchors of a training set, for α and for the doctor.

Shapes: N images, L levels, M boxes, K classes. Boxes are XYXY in absolute pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from focal_d2.modeling.anchors import AnchorCache, AnchorLayout
from focal_d2.modeling.assigners import Assigner

# Counting the anchors of more images changes the third digit and costs minutes.
_MOST_IMAGES = 1000


class LabelCounts(NamedTuple):
    """The numbers of positive and negative anchors on L levels."""

    positives: list[int]  # L
    negatives: list[int]  # L
    images: int  # that were counted
    boxes: int  # in these images
    unmatched: int  # those of them without a positive anchor
    by_class: list[int]  # positives of each class, up to the highest that a box has; [] without classes


@torch.no_grad()
def count_labels(
    boxes: np.ndarray,
    image: np.ndarray,
    sizes: np.ndarray,
    *,
    layout: AnchorLayout,
    assigner: Assigner,
    classes: np.ndarray | None = None,
) -> LabelCounts:
    """Count positive and negative anchors. Only sizes are needed; every image is padded as a batch of one.

    Args:
        boxes: (M, 4) XYXY in the pixels of `sizes`.
        image: (M,) the image of each, ascending.
        sizes: (N, 2) height and width of the images; of more than 1000 images, 1000 evenly spread are taken.
        layout: the model's anchors.
        assigner: the model's.
        classes: (M,) int64 class of each box; None: positives are not counted by class.
    """
    spread = np.linspace(0, len(sizes) - 1, min(len(sizes), _MOST_IMAGES)).round().astype(np.int64)
    # Sorted by shape: images of the same shape use the same cached anchors.
    chosen = spread[np.lexsort(sizes[spread].T)].tolist()
    ends = np.searchsorted(image, np.arange(len(sizes) + 1))
    anchors_of = AnchorCache(layout.generator)
    positives = np.zeros(len(layout.strides), dtype=np.int64)
    negatives = np.zeros_like(positives)
    by_class = np.zeros(0 if classes is None else classes.max(initial=-1) + 1, dtype=np.int64)
    unmatched = 0
    for i in chosen:
        cells = layout.cells(*sizes[i].tolist())
        anchors = anchors_of(cells, torch.device("cpu"))
        in_image = torch.from_numpy(boxes[ends[i] : ends[i + 1]]).float()
        outcome = np.zeros(len(anchors.boxes), dtype=np.int8)
        if len(in_image):
            matches = assigner.assign(in_image, anchors)
            outcome = matches.outcome.numpy()
            matched = matches.matched.numpy()[outcome == 1]
            unmatched += len(in_image) - len(np.unique(matched))
            if classes is not None:
                by_class += np.bincount(classes[ends[i] + matched], minlength=len(by_class))
        areas = [height * width for height, width in cells]
        per_cell = len(outcome) // sum(areas)
        firsts = np.cumsum([0, *areas[:-1]]) * per_cell
        positives += np.add.reduceat(outcome == 1, firsts, dtype=np.int64)
        negatives += np.add.reduceat(outcome == 0, firsts, dtype=np.int64)
    counted = int(sum(ends[i + 1] - ends[i] for i in chosen))
    return LabelCounts(
        positives.tolist(), negatives.tolist(), len(chosen), counted, unmatched, by_class.tolist()
    )
