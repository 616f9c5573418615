"""Find the scores that are high enough for detections.

Shapes: N images, L levels, A anchors a cell, C logits an anchor, K classes, E candidates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from focal_d2.modeling.losses import ClassificationLoss, level_deltas, level_ranges
from focal_d2.ops.common import divide, in_memory_order
from focal_d2.ops.detect import indices_of_best


class Candidates(NamedTuple):
    """Scores above the threshold."""

    image: Tensor  # (E,) int64
    anchor: Tensor  # (E,) int64
    label: Tensor  # (E,) int64, in [0, K)
    score: Tensor  # (E,) float
    deltas: Tensor  # (E, 4) float, of the anchor's box


class _Scores(NamedTuple):
    """Scores of a level, each (E,)."""

    image: Tensor  # int64
    anchor: Tensor  # int64, of the level's
    label: Tensor  # int64, in [0, K)
    score: Tensor  # float


def find_candidates(
    logits: list[Tensor], deltas: list[Tensor], cls_loss: ClassificationLoss, threshold: float, most: int
) -> Candidates:
    """Find the scores above the threshold, of each image and level at most the `most` best.

    If logits of a level are equal, those that come first in memory are kept.

    Args:
        logits: L × (N, A·C, H, W).
        deltas: L × (N, A·4, H, W).
        cls_loss: computes probabilities from logits.
        threshold: candidates have a higher score.
        most: limit on the candidates of an image and level.
    """
    parts = []
    for (x, start, _), level in zip(level_ranges(logits, cls_loss.num_logits), deltas, strict=True):
        best = _above_threshold(x, cls_loss, threshold, most)
        values = level_deltas(level, best.image, best.anchor)
        values = values if values.dtype == torch.float64 else values.float()
        parts.append(Candidates(best.image, best.anchor + start, best.label, best.score, values))
    return Candidates(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _above_threshold(logits: Tensor, cls_loss: ClassificationLoss, threshold: float, most: int) -> _Scores:
    """Find scores above the threshold on a level, (N, A·C, H, W): of each image at most the `most` best."""
    num_images, num_logits = len(logits), cls_loss.num_logits
    cells = logits.shape[2] * logits.shape[3]
    anchors = logits.shape[1] // num_logits
    cut = cls_loss.least_logit(threshold)
    if cut is None:
        level = logits.unflatten(1, (-1, num_logits)).permute(0, 3, 4, 1, 2)  # (N, H, W, A, C)
        scores = cls_loss.probabilities(level.float()).flatten(1)  # (N, H · W · A · K)
        position = indices_of_best(scores, threshold, most)
        score = scores.flatten()[position]
        num_logits, by_anchor = cls_loss.num_classes, True
    else:
        # Few logits are above the threshold, so only their probabilities are computed. The comparison rounds
        # the threshold to the logits' precision, so it is lowered by the rounding error.
        cut -= abs(cut) * torch.finfo(logits.dtype).eps if math.isfinite(cut) else 0.0
        flat = in_memory_order(logits)
        position = indices_of_best(flat.view(num_images, cells * logits.shape[1]), cut, most)
        score = cls_loss.probabilities(flat[position].float())
        by_anchor = not logits.is_contiguous()
    above = score > threshold
    position, score = position[above], score[above]
    if by_anchor:
        rest, label = divide(position, num_logits)
        image, anchor = divide(rest, cells * anchors)
        return _Scores(image, anchor, label, score)
    rest, cell = divide(position, cells)
    rest, label = divide(rest, num_logits)
    image, a = divide(rest, anchors)
    return _Scores(image, cell * anchors + a, label, score)
