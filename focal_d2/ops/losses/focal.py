"""Sigmoid focal loss on integer labels, and the paper's alternate form FL*.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002.

Shapes: K classes; logits (..., K); labels (...), an integer in [0, K) for a class, K for background,
`IGNORE_LABEL` for an anchor that takes no part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from focal_d2.ops.common import apply_alpha, check_at_least_0, check_weight, prepare_targets, reduce


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float | Tensor,
    gamma: float,
    reduction: str = "sum",
) -> Tensor:
    """α-balanced focal loss of all anchors that are not ignored and all classes.

    Every (anchor, class) pair is a binary problem with logit x, p = σ(x), p_t = p where the anchor has
    that class and 1 - p elsewhere (paper, eq. 2), and α_t likewise:

        FL(p_t) = -α_t (1 - p_t)^γ log(p_t)                                    (paper, eq. 5)

    This is the reference that every faster implementation is tested against. It never forms p_t: with
    x_t = ±x, log(p_t) = logσ(x_t) and (1 - p_t)^γ = exp(γ logσ(-x_t)), which stay finite, with finite
    gradients, for any finite logit. Half precision is computed and summed in float32.

    Args:
        logits: (..., K) float; K binary logits an anchor, there is no background logit.
        labels: (...) int64; the class in [0, K), K for background, -1 (`IGNORE_LABEL`) for no loss.
        num_classes: K.
        alpha: weight of the positives in [0, 1], 1 - alpha that of the negatives, or one for each class
            (K,); a negative number leaves both at 1 (as fvcore's and torchvision's operators do).
        gamma: focusing parameter, at least 0; at 0 this is α-balanced cross entropy (paper, eq. 3).
        reduction: "sum", or "none" for (..., K) with 0 for ignored anchors.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 with a gradient path if all anchors are ignored.

    Raises:
        ValueError: if shapes, labels' dtype, alpha, gamma or reduction do not fit.

    Example:
        >>> x = torch.tensor([[2.1972246]])  # σ(x) = 0.9
        >>> loss = sigmoid_focal_loss(x, torch.tensor([0]), num_classes=1, alpha=0.25, gamma=2.0)
        >>> round(loss.item(), 7)
        0.0002634
    """
    check_weight("alpha", alpha)
    check_at_least_0("gamma", gamma)
    x, is_class, valid = prepare_targets(logits, labels, num_classes=num_classes, num_logits=num_classes)
    x_t = torch.where(is_class, x, -x)
    loss = -F.logsigmoid(x_t)
    if gamma > 0:
        loss = torch.exp(gamma * F.logsigmoid(-x_t)) * loss
    return reduce(apply_alpha(loss, is_class, alpha), valid, reduction)


def sigmoid_cross_entropy(logits: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """Return the cross entropy of each pair of anchor and class, (..., K): focal loss with γ = 0 and no α.

    Args:
        logits: see `sigmoid_focal_loss`.
        labels: see `sigmoid_focal_loss`; pairs of an ignored anchor have 0.
        num_classes: K.
    """
    return sigmoid_focal_loss(
        logits, labels, num_classes=num_classes, alpha=-1.0, gamma=0.0, reduction="none"
    )


def sigmoid_focal_star_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float | Tensor,
    gamma: float,
    beta: float,
    reduction: str = "sum",
) -> Tensor:
    """FL*, the paper's alternate form of the focal loss, on two parameters that shift and stretch the logit.

        FL* = -α_t log(σ(γ x_t + β)) / γ                                  (paper, appendix A, eq. 7)

    Args:
        logits: (..., K) float.
        labels: (...) int64; see `sigmoid_focal_loss`.
        num_classes: K.
        alpha: see `sigmoid_focal_loss`; the paper's formula has none (a negative number).
        gamma: stretches the logit, above 0.
        beta: shifts it.
        reduction: see `sigmoid_focal_loss`.

    Returns:
        See `sigmoid_focal_loss`.

    Raises:
        ValueError: if shapes, labels' dtype, alpha, gamma or reduction do not fit.
    """
    check_weight("alpha", alpha)
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}; it must be above 0")
    x, is_class, valid = prepare_targets(logits, labels, num_classes=num_classes, num_logits=num_classes)
    x_t = torch.where(is_class, x, -x)
    loss = -F.logsigmoid(gamma * x_t + beta) / gamma
    return reduce(apply_alpha(loss, is_class, alpha), valid, reduction)
