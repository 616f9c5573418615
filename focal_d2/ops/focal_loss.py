"""Sigmoid focal loss on integer labels.

Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002.

Shapes: K classes; logits (..., K); labels (...), an integer in [0, K) for a class, K for background,
`IGNORE_LABEL` for an anchor that takes no part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_LABEL = -1


def sigmoid_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float,
    gamma: float,
) -> Tensor:
    """Sum of the α-balanced focal loss over all anchors that are not ignored and all classes.

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
        alpha: weight of the positives in [0, 1], 1 - alpha that of the negatives; a negative value
            leaves both at 1 (as fvcore's and torchvision's operators do).
        gamma: focusing parameter, at least 0; at 0 this is α-balanced cross entropy (paper, eq. 3).

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 with a gradient path if no anchor counts.

    Raises:
        ValueError: if shapes, labels' dtype, alpha or gamma do not fit.

    Example:
        >>> x = torch.tensor([[2.1972246]])  # σ(x) = 0.9
        >>> round(sigmoid_focal_loss(x, torch.tensor([0]), num_classes=1, alpha=0.25, gamma=2.0).item(), 7)
        0.0002634
    """
    if logits.shape[-1:] != (num_classes,) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} must be labels' {tuple(labels.shape)} plus (K={num_classes},)"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, not {labels.dtype}")
    if alpha > 1:
        raise ValueError(f"alpha is {alpha}; it must be in [0, 1], or negative for no weighting")
    if gamma < 0:
        raise ValueError(f"gamma is {gamma}; it must be at least 0")

    logits = logits if logits.dtype == torch.float64 else logits.float()
    is_class = labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)  # (..., K)
    x_t = torch.where(is_class, logits, -logits)
    loss = -F.logsigmoid(x_t)
    if gamma > 0:
        loss = torch.exp(gamma * F.logsigmoid(-x_t)) * loss
    if alpha >= 0:
        loss = torch.where(is_class, alpha * loss, (1 - alpha) * loss)
    counts = labels.unsqueeze(-1) != IGNORE_LABEL
    return torch.where(counts, loss, 0.0).sum()
