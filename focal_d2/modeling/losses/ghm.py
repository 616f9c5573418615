"""Gradient harmonising for classification (GHM-C, arXiv 1811.05181); see `focal_d2.ops.losses.ghm`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from focal_d2.modeling.all_reduce import number_of_ranks, sum_over_ranks
from focal_d2.modeling.losses.base import ClassificationLoss, DenseBatch, register_loss
from focal_d2.ops import sigmoid_cross_entropy
from focal_d2.ops.common import prepare_targets
from focal_d2.ops.losses.ghm import gradient_density, harmonise


@register_loss("ghm")
class GradientHarmonisedLoss(ClassificationLoss):
    """Cross entropy divided by the density of gradient norms; with momentum above 0, by its moving average.

    The moving average is a buffer and therefore part of the checkpoint. It includes the examples of all
    processes. The loss is not divided by the number of positives: the density is a number of examples.
    """

    divided_by_positives = False
    fixed_shapes = True
    histogram: Tensor

    def __init__(self, *, num_classes: int, bins: int, momentum: float) -> None:
        super().__init__(num_classes=num_classes)
        if bins < 1 or not 0 <= momentum < 1:
            raise ValueError(f"BINS is {bins} and MOMENTUM {momentum}; at least 1 and in [0, 1) are needed")
        self.momentum = momentum
        self.register_buffer("histogram", torch.zeros(bins))

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return Σ CE / GD(g) over all anchors that are not ignored and all classes (eq. 8)."""
        logits = batch.all_logits()
        with torch.no_grad():
            norms, valid = self._norms(logits, batch.labels)
            density = harmonise(norms, valid, self.histogram, self.momentum, sum_over_ranks)
        # Times the number of processes, because their gradients are averaged.
        loss = sigmoid_cross_entropy(logits, batch.labels, num_classes=self.num_classes)
        return (loss / density).sum() * number_of_ranks()

    def example_losses(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield each pair's part of the loss, with the densities from the histogram after `forward`."""
        for logits, labels in batch.levels():
            norms, _ = self._norms(logits, labels)
            loss = sigmoid_cross_entropy(logits, labels, num_classes=self.num_classes)
            yield loss / gradient_density(norms, self.histogram)

    def _norms(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient norms g = |p - y| (N, r, K), and which pairs are not ignored, (N, r, K) bool."""
        x, is_class, valid = prepare_targets(
            logits, labels, num_classes=self.num_classes, num_logits=self.num_classes
        )
        norms = (x.sigmoid() - is_class.to(x.dtype)).abs()
        return norms, valid.expand_as(norms)
