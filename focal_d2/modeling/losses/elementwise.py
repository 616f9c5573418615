"""Losses that are a sum over anchors and classes: cross entropy, focal loss and similar losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from focal_d2.errors import UserError
from focal_d2.modeling.losses.base import ClassificationLoss, DenseBatch, register_loss
from focal_d2.ops import (
    dense_focal_loss,
    dense_quality_focal_loss,
    dense_varifocal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    varifocal_loss,
)
from focal_d2.ops.common import (
    check_at_least_0,
    check_in_0_1,
    check_quality_beta,
    check_weight,
    prepare_targets,
)

_NO_WEIGHTING = -1.0
# ALPHA that `focal_d2.engine.resolve_alpha` turns into numbers.
AUTO, AUTO_PER_CLASS = "auto", "auto_per_class"
# The values of γ in the paper and the best α for each (table 1b). Beyond γ 5, α stays at 0.25.
PAPER_GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BEST_ALPHAS = (0.75, 0.75, 0.75, 0.5, 0.25, 0.25, 0.25)


def best_alpha(gamma: float) -> float:
    """Return the α that the paper found best for a γ of the focal loss (table 1b).

    α is 0.75 for γ up to 0.2, 0.5 for γ = 0.5, and 0.25 from γ = 1. In between it is interpolated linearly.

    Raises:
        ValueError: if γ is not a finite number or is below 0.
    """
    check_at_least_0("GAMMA", gamma)
    return float(np.interp(gamma, PAPER_GAMMAS, _BEST_ALPHAS))


class _Elementwise(ClassificationLoss):
    """Sum `term` over levels."""

    fixed_shapes = True

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over all anchors that are not ignored."""
        return torch.stack([self.term(logits, labels) for logits, labels in batch.levels()]).sum()

    def example_losses(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield each example's term."""
        for logits, labels in batch.levels():
            yield self.term(logits, labels, reduction="none")

    def term(self, logits: Tensor, labels: Tensor, *, reduction: str = "sum") -> Tensor:
        """Return the sum over (N, r, C) logits with (N, r) labels, or each example's part (N, r, E)."""
        raise NotImplementedError


class _AlphaBalanced(_Elementwise):
    """Base of losses with α: a number, or a buffer with a number for each class."""

    alpha: Any
    takes_auto_alpha = False  # whether ALPHA may be "auto" or "auto_per_class"

    def __init__(self, *, num_classes: int, alpha: float | list[float] | str) -> None:
        super().__init__(num_classes=num_classes)
        if alpha in (AUTO, AUTO_PER_CLASS) and self.takes_auto_alpha:
            self.alpha = alpha
            return
        if isinstance(alpha, (list, tuple)):
            if len(alpha) != num_classes:
                raise ValueError(f"ALPHA has {len(alpha)} values for {num_classes} classes")
            for value in alpha:
                check_in_0_1("each of ALPHA", value)
            self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32), persistent=False)
            return
        if isinstance(alpha, (str, bool)):
            auto = f", {AUTO} or {AUTO_PER_CLASS}" if self.takes_auto_alpha else ""
            raise ValueError(f"ALPHA is {alpha!r}; it must be a number, a list of one for each class{auto}")
        check_weight("ALPHA", alpha)
        self.alpha = float(alpha)

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over all anchors that are not ignored."""
        if isinstance(self.alpha, str):
            # Only training computes losses. So evaluation needs no training set to count anchors.
            raise UserError(
                f"MODEL.FOCAL.LOSS.ALPHA is {self.alpha}: focal_d2's trainer turns it into numbers; "
                "elsewhere call focal_d2.engine.resolve_alpha(cfg)"
            )
        return super().forward(batch)


class _SigmoidFocal(_AlphaBalanced):
    """Sigmoid focal loss and its special cases."""

    has_fused = True
    gamma = 0.0

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over all anchors that are not ignored."""
        if not self.use_fused(batch) or isinstance(self.alpha, str):
            return super().forward(batch)
        return dense_focal_loss(
            batch.logits,
            batch.labels,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            use_kernels=self.use_kernels,
            upstream=batch.upstream,
        )

    def term(self, logits: Tensor, labels: Tensor, *, reduction: str = "sum") -> Tensor:
        """See `focal_d2.ops.sigmoid_focal_loss`."""
        return sigmoid_focal_loss(
            logits,
            labels,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=reduction,
        )


@register_loss("ce")
class CrossEntropy(_SigmoidFocal):
    """Sigmoid cross entropy (paper, eq. 1)."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, alpha=_NO_WEIGHTING)


@register_loss("balanced_ce")
class BalancedCrossEntropy(_SigmoidFocal):
    """α-balanced sigmoid cross entropy (paper, eq. 3)."""

    takes_auto_alpha = True


@register_loss("focal")
class FocalLoss(_SigmoidFocal):
    """α-balanced sigmoid focal loss (paper, eq. 5)."""

    takes_auto_alpha = True

    def __init__(self, *, num_classes: int, alpha: float | list[float], gamma: float) -> None:
        super().__init__(num_classes=num_classes, alpha=alpha)
        check_at_least_0("GAMMA", gamma)
        self.gamma = gamma


@register_loss("focal_star")
class FocalStarLoss(_AlphaBalanced):
    """The paper's alternate form FL* (appendix A)."""

    def __init__(self, *, num_classes: int, alpha: float | list[float], gamma: float, beta: float) -> None:
        super().__init__(num_classes=num_classes, alpha=alpha)
        if gamma <= 0:
            raise ValueError(f"GAMMA is {gamma}; it must be above 0")
        self.gamma = gamma
        self.beta = beta

    def term(self, logits: Tensor, labels: Tensor, *, reduction: str = "sum") -> Tensor:
        """See `focal_d2.ops.sigmoid_focal_star_loss`."""
        return sigmoid_focal_star_loss(
            logits,
            labels,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            beta=self.beta,
            reduction=reduction,
        )


@register_loss("softmax_focal")
class SoftmaxFocalLoss(_Elementwise):
    """Focal loss over K + 1 mutually exclusive classes, background last."""

    def __init__(self, *, num_classes: int, alpha: float, gamma: float) -> None:
        super().__init__(num_classes=num_classes)
        check_weight("ALPHA", alpha)
        check_at_least_0("GAMMA", gamma)
        self.alpha = alpha
        self.gamma = gamma

    @property
    def num_logits(self) -> int:
        """K + 1."""
        return self.num_classes + 1

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax without the probability of background."""
        return logits.softmax(-1)[..., :-1]

    def prior_bias(self, prior: float) -> Tensor:
        """Return logits with which background has the probability 1 - π and all classes together π."""
        bias = torch.zeros(self.num_logits)
        bias[-1] = math.log(self.num_classes * (1 - prior) / prior)
        return bias

    def correctness(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield the probability of each anchor's class, which may be background: E = 1."""
        for logits, labels in batch.levels():
            classes = torch.where(labels < 0, self.num_classes, labels).unsqueeze(-1)
            yield logits.float().softmax(-1).gather(-1, classes)

    def term(self, logits: Tensor, labels: Tensor, *, reduction: str = "sum") -> Tensor:
        """See `focal_d2.ops.softmax_focal_loss`."""
        loss = softmax_focal_loss(
            logits,
            labels,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=reduction,
        )
        return loss.unsqueeze(-1) if reduction == "none" else loss


@register_loss("softmax_ce")
class SoftmaxCrossEntropy(SoftmaxFocalLoss):
    """Softmax cross entropy over K + 1 classes."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__(num_classes=num_classes, alpha=_NO_WEIGHTING, gamma=0.0)


@register_loss("fixed_weights")
class FixedWeights(_SigmoidFocal):
    """Cross entropy with separate weights for positives and negatives, as in YOLO v1 (arXiv 1506.02640)."""

    def __init__(self, *, num_classes: int, positive_weight: float, negative_weight: float) -> None:
        if min(positive_weight, negative_weight) < 0 or positive_weight + negative_weight == 0:
            raise ValueError("weights must be at least 0, and not both 0")
        self.total = positive_weight + negative_weight
        super().__init__(num_classes=num_classes, alpha=positive_weight / self.total)

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over all anchors. The weights are α and 1 - α, times the sum of both weights."""
        if batch.upstream is not None:
            batch = batch._replace(upstream=batch.upstream * self.total)
        return self.total * super().forward(batch)


class _Quality(ClassificationLoss):
    """Base of losses in which the target of a positive is the IoU of the predicted box."""

    fixed_shapes = True

    def correctness(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield 1 - |y - p|. The target y of an anchor's class is the IoU of its predicted box."""
        for (logits, labels), quality in zip(batch.levels(), batch.split(batch.quality()), strict=True):
            x, is_class, _ = prepare_targets(
                logits, labels, num_classes=self.num_classes, num_logits=self.num_logits
            )
            target = torch.where(is_class, quality.unsqueeze(-1), 0.0)
            yield 1 - (target - x.sigmoid()).abs()

    def example_losses(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield each pair's term."""
        for (logits, labels), quality in zip(batch.levels(), batch.split(batch.quality()), strict=True):
            yield self.term(logits, labels, quality, reduction="none")

    def term(self, logits: Tensor, labels: Tensor, quality: Tensor, *, reduction: str = "sum") -> Tensor:
        """Return the sum over (N, r, K) logits with (N, r) labels and qualities, or each pair's part."""
        raise NotImplementedError


@register_loss("quality_focal")
class QualityFocalLoss(_Quality):
    """Quality focal loss: the positives' target is the IoU of the predicted box (arXiv 2006.04388)."""

    has_fused = True

    def __init__(self, *, num_classes: int, beta: float) -> None:
        super().__init__(num_classes=num_classes)
        check_quality_beta(beta)
        self.beta = beta

    def forward(self, batch: DenseBatch) -> Tensor:
        """See `focal_d2.ops.quality_focal_loss`."""
        if self.use_fused(batch):
            return dense_quality_focal_loss(
                batch.logits,
                batch.labels,
                batch.quality(),
                num_classes=self.num_classes,
                beta=self.beta,
                use_kernels=self.use_kernels,
                upstream=batch.upstream,
            )
        return self.term(batch.all_logits(), batch.labels, batch.quality())

    def term(self, logits: Tensor, labels: Tensor, quality: Tensor, *, reduction: str = "sum") -> Tensor:
        """See `focal_d2.ops.quality_focal_loss`."""
        return quality_focal_loss(
            logits, labels, quality, num_classes=self.num_classes, beta=self.beta, reduction=reduction
        )


@register_loss("varifocal")
class VarifocalLoss(_Quality):
    """Varifocal loss: positives weigh as much as the IoU of the predicted box (arXiv 2008.13367)."""

    has_fused = True

    def __init__(self, *, num_classes: int, alpha: float, gamma: float) -> None:
        super().__init__(num_classes=num_classes)
        check_in_0_1("ALPHA", alpha)
        check_at_least_0("GAMMA", gamma)
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, batch: DenseBatch) -> Tensor:
        """See `focal_d2.ops.varifocal_loss`."""
        if self.use_fused(batch):
            return dense_varifocal_loss(
                batch.logits,
                batch.labels,
                batch.quality(),
                num_classes=self.num_classes,
                alpha=self.alpha,
                gamma=self.gamma,
                use_kernels=self.use_kernels,
                upstream=batch.upstream,
            )
        return self.term(batch.all_logits(), batch.labels, batch.quality())

    def term(self, logits: Tensor, labels: Tensor, quality: Tensor, *, reduction: str = "sum") -> Tensor:
        """See `focal_d2.ops.varifocal_loss`."""
        return varifocal_loss(
            logits,
            labels,
            quality,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            reduction=reduction,
        )
