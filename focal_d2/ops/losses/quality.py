"""Losses whose positive target is the box's quality: quality focal loss and varifocal loss.

Shapes: logits (..., K); labels (...) int64, [0, K) a class, K background, -1 ignored; quality (...), the IoU
of an anchor's predicted box with its matched box, in [0, 1], read where the label is a class.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from focal_d2.ops.common import check_at_least_0, check_in_0_1, check_quality_beta, prepare_targets, reduce


def quality_focal_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, *, num_classes: int, beta: float, reduction: str = "sum"
) -> Tensor:
    """QFL(p) = -|y - p|^β ((1 - y) log(1 - p) + y log(p)), y the quality of the anchor's class, 0 elsewhere.

    Li et al., "Generalized Focal Loss", NeurIPS 2020, arXiv 2006.04388, eq. 4.

    Args:
        logits: (..., K) float.
        labels: (...) int64.
        quality: (...) float in [0, 1].
        num_classes: K.
        beta: focusing parameter, 0 or at least 1 (the paper: 2); between them the gradient is infinite where
            p = y.
        reduction: "sum", or "none" for (..., K) with 0 for ignored anchors.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 with a gradient path if all anchors are ignored.

    Raises:
        ValueError: if shapes, labels' dtype, beta or reduction do not fit.
    """
    check_quality_beta(beta)
    x, target, valid = _soft_targets(logits, labels, quality, num_classes)
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    if beta > 0:
        loss = (target - x.sigmoid()).abs().pow(beta) * loss
    return reduce(loss, valid, reduction)


def varifocal_loss(
    logits: Tensor,
    labels: Tensor,
    quality: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
    reduction: str = "sum",
) -> Tensor:
    """VFL: q BCE(p, q) for an anchor's class with quality q > 0, -α p^γ log(1 - p) elsewhere.

    Zhang et al., "VarifocalNet", CVPR 2021, arXiv 2008.13367, eq. 2.

    Args:
        logits: (..., K) float.
        labels: (...) int64.
        quality: (...) float in [0, 1].
        num_classes: K.
        alpha: weight of the negatives, in [0, 1] (the paper: 0.75).
        gamma: focusing parameter of the negatives, at least 0 (the paper: 2).
        reduction: "sum", or "none" for (..., K) with 0 for ignored anchors.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 with a gradient path if all anchors are ignored.

    Raises:
        ValueError: if shapes, labels' dtype, alpha, gamma or reduction do not fit.
    """
    check_in_0_1("alpha", alpha)
    check_at_least_0("gamma", gamma)
    x, target, valid = _soft_targets(logits, labels, quality, num_classes)
    loss = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    negative_weight = alpha * torch.exp(gamma * F.logsigmoid(x))
    return reduce(torch.where(target > 0, target, negative_weight) * loss, valid, reduction)


def _soft_targets(
    logits: Tensor, labels: Tensor, quality: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    x, is_class, valid = prepare_targets(logits, labels, num_classes=num_classes, num_logits=num_classes)
    if quality.shape != labels.shape:
        raise ValueError(f"quality {tuple(quality.shape)} must be labels' {tuple(labels.shape)}")
    target = torch.where(is_class, quality.to(x.dtype).unsqueeze(-1), 0.0)
    return x, target, valid


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes pair by pair: (P, 4) and (P, 4) XYXY give (P,); 0 where both are empty."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    intersection = (high - low).clamp(min=0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(1) for b in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return torch.where(union > 0, intersection / union, 0.0)
