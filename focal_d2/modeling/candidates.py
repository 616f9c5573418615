"""Scores high enough to become detections.

Shapes: N images, L levels, A anchors a cell, C logits an anchor, K classes, E candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.modeling.losses import ClassificationLoss, level_ranges
from focal_d2.ops.common import divide, in_memory_order
from focal_d2.ops.detect import indices_above


class Candidates(NamedTuple):
    """Scores above the threshold, each (E,)."""

    image: Tensor  # int64
    anchor: Tensor  # int64
    label: Tensor  # int64, in [0, K)
    score: Tensor  # float

    def where(self, chosen: Tensor) -> Candidates:
        """Return some of them, by mask or index."""
        return Candidates(*(field[chosen] for field in self))


def find_candidates(
    logits: list[Tensor], cls_loss: ClassificationLoss, threshold: float, most: int
) -> Candidates:
    """Find what scores above the threshold; of each image and level the best.

    Args:
        logits: L × (N, A·C, H, W).
        cls_loss: says what logits mean.
        threshold: candidates have a higher score.
        most: so many of an image and level at most.
    """
    parts = []
    for x, start, _ in level_ranges(logits, cls_loss.num_logits):
        best = _best(_above_threshold(x, cls_loss, threshold), most)
        parts.append(best._replace(anchor=best.anchor + start))
    return Candidates(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _above_threshold(logits: Tensor, cls_loss: ClassificationLoss, threshold: float) -> Candidates:
    """Find what scores above the threshold on a level, (N, A·C, H, W)."""
    num_logits = cls_loss.num_logits
    cells = logits.shape[2] * logits.shape[3]
    anchors = logits.shape[1] // num_logits
    cut = cls_loss.least_logit(threshold)
    if cut is None:
        level = logits.unflatten(1, (-1, num_logits)).permute(0, 3, 4, 1, 2)  # (N, H, W, A, C)
        scores = cls_loss.probabilities(level.float()).flatten(1, 3)  # (N, H · W · A, K)
        image, anchor, label = (scores > threshold).nonzero(as_tuple=True)
        return Candidates(image, anchor, label, scores[image, anchor, label])
    # Few logits are above it: probabilities of the others are never computed. Half precision rounds the
    # number it is compared with.
    cut -= abs(cut) * torch.finfo(logits.dtype).eps if math.isfinite(cut) else 0.0
    flat = in_memory_order(logits)
    place = indices_above(flat, cut)
    score = cls_loss.probabilities(flat[place].float())
    certain = score > threshold
    place, score = place[certain], score[certain]
    if logits.is_contiguous():
        rest, cell = divide(place, cells)
        rest, label = divide(rest, num_logits)
        image, a = divide(rest, anchors)
        return Candidates(image, cell * anchors + a, label, score)
    rest, label = divide(place, num_logits)
    image, anchor = divide(rest, cells * anchors)
    return Candidates(image, anchor, label, score)


def _best(found: Candidates, most: int) -> Candidates:
    """Keep at most so many of each image."""
    if len(found.score) <= most:
        return found
    kept = []
    for image in found.image.unique().tolist():
        own = (found.image == image).nonzero().squeeze(1)
        kept.append(own[found.score[own].topk(min(most, len(own))).indices])
    return found.where(torch.cat(kept))
