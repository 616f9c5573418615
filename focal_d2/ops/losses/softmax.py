"""Softmax cross entropy and focal loss over K classes and background."""

from __future__ import annotations

import torch
from torch import Tensor

from focal_d2.ops.common import apply_alpha, check_at_least_0, check_weight, prepare_targets, reduce


def softmax_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    alpha: float | Tensor,
    gamma: float,
    reduction: str = "sum",
) -> Tensor:
    """Focal loss with p_t the softmax probability of the anchor's class, background being class K.

        FL(p_t) = -α_t (1 - p_t)^γ log(p_t)

    α_t is alpha for the K classes and 1 - alpha for background. (1 - p_t)^γ comes from the log of the
    other classes' summed probability, so that it and its gradient stay finite as p_t nears 1.

    Args:
        logits: (..., K + 1) float, background last.
        labels: (...) int64: [0, K) a class, K background, -1 ignored.
        num_classes: K.
        alpha: weight of the classes in [0, 1]; a negative number leaves all at 1.
        gamma: focusing parameter, at least 0; at 0 this is softmax cross entropy.
        reduction: "sum", or "none" for (...) with 0 for ignored anchors.

    Returns:
        A scalar in float32 (float64 for float64 logits); 0 with a gradient path if all anchors are ignored.

    Raises:
        ValueError: if shapes, labels' dtype, alpha, gamma or reduction do not fit.
    """
    check_weight("alpha", alpha)
    check_at_least_0("gamma", gamma)
    x, is_class, valid = prepare_targets(logits, labels, num_classes=num_classes, num_logits=num_classes + 1)
    log_total = x.logsumexp(-1)  # (...)
    # An ignored anchor has no class; it is computed as background, and `reduce` sets its loss to 0.
    true = torch.where(labels < 0, num_classes, labels).unsqueeze(-1)  # (..., 1)
    loss = log_total - x.gather(-1, true).squeeze(-1)
    if gamma > 0:
        others = x.masked_fill(is_class, float("-inf")).logsumexp(-1)
        loss = torch.exp(gamma * (others - log_total)) * loss
    return reduce(apply_alpha(loss, labels < num_classes, alpha), valid.squeeze(-1), reduction)
