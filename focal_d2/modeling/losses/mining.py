"""Losses over chosen examples: random sampling, OHEM and SSD's hard negative mining."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import nms

from focal_d2.modeling.losses.base import ClassificationLoss, DenseBatch, register_loss
from focal_d2.ops import IGNORE_LABEL, sigmoid_cross_entropy
from focal_d2.ops.common import check_at_least_0, check_in_0_1
from focal_d2.ops.mining import random_numbers, suppress, top_negatives


class _Mining(ClassificationLoss):
    """Cross entropy over the examples that `choose` marks, image by image."""

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over the chosen examples of all images."""
        pairs = sigmoid_cross_entropy(batch.all_logits(), batch.labels, num_classes=batch.num_logits)
        loss = pairs.sum(-1)  # (N, R)
        return torch.where(self._chosen(loss, batch), loss, 0.0).sum()

    def example_losses(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield each pair's cross entropy, 0 where its anchor is not chosen."""
        pairs = sigmoid_cross_entropy(batch.all_logits(), batch.labels, num_classes=batch.num_logits)
        chosen = self._chosen(pairs.sum(-1), batch)
        yield from batch.split(torch.where(chosen.unsqueeze(-1), pairs, 0.0))

    @torch.no_grad()
    def _chosen(self, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Mark the examples (N, R) bool."""
        chosen = [self.choose(image, row, batch) for image, row in enumerate(loss)]
        return torch.stack(chosen) if chosen else torch.zeros_like(loss, dtype=torch.bool)

    def choose(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Mark the examples (R,) bool of an image with losses (R,)."""
        raise NotImplementedError


class _AtRatio(_Mining):
    """All positives, and for each so many negatives of its image; an image without positives adds nothing."""

    def __init__(self, *, num_classes: int, negatives_per_positive: float) -> None:
        super().__init__(num_classes=num_classes)
        check_at_least_0("NEGATIVES_PER_POSITIVE", negatives_per_positive)
        self.negatives_per_positive = negatives_per_positive

    def choose(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """All positives and the first negatives."""
        positive = batch.positive[image]
        count = int(self.negatives_per_positive * int(positive.sum()))
        negative = self.negatives(image, batch)
        return positive | top_negatives(self.score(image, loss, batch), negative, count=count)

    def negatives(self, image: int, batch: DenseBatch) -> Tensor:
        """Return (R,) bool: the anchors of an image that negatives are chosen from."""
        return batch.labels[image] == self.num_classes

    def score(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return (R,) numbers of an image with losses (R,); the negatives of the highest are chosen."""
        raise NotImplementedError


@register_loss("hard_negative_mining")
class HardNegativeMining(_AtRatio):
    """All positives and the negatives of the highest loss, in a ratio (SSD, arXiv 1512.02325)."""

    def score(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """The loss."""
        return loss


@register_loss("random_sampling")
class RandomSampling(_AtRatio):
    """All positives and random negatives, in a ratio, as two-stage detectors do (paper, section 2).

    The numbers come from each image's seed, which our loader derives from the number of its draw, and from
    each anchor's level, cell and place in it; anchors in the padding take no part. So the negatives are the
    same whatever size the image is padded to, in any number of processes, workers and parts of a batch, on
    any device, and after a resumption.

    Departure from the region proposal network of Faster R-CNN: that draws 256 anchors of an image, positives
    too where there are many, and fills up with negatives where positives are few.
    """

    samples = True

    def score(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Random numbers."""
        return random_numbers(batch.seeds[image], batch.positions())

    def negatives(self, image: int, batch: DenseBatch) -> Tensor:
        """Those outside the padding."""
        return super().negatives(image, batch) & batch.inside(image)


@register_loss("ohem")
class OnlineHardExampleMining(_Mining):
    """The examples of the highest loss in each image after suppression on predicted boxes (paper, table 1d).

    Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors with Online Hard Example Mining",
    CVPR 2016. With `negatives_per_positive` above 0, the examples that survive suppression are drawn from
    in that ratio (the paper's "OHEM 1:3"); 0 leaves the ratio to the losses.
    """

    def __init__(
        self, *, num_classes: int, examples: int, nms_thresh: float, negatives_per_positive: float
    ) -> None:
        super().__init__(num_classes=num_classes)
        check_at_least_0("NEGATIVES_PER_POSITIVE", negatives_per_positive)
        if not isinstance(examples, int) or examples < 1:
            raise ValueError(f"EXAMPLES is {examples}; it must be a whole number, at least 1")
        check_in_0_1("NMS_THRESH", nms_thresh)
        self.examples = examples
        self.nms_thresh = nms_thresh
        self.negatives_per_positive = negatives_per_positive

    def choose(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """The hardest examples that survive suppression."""
        positive = batch.positive[image]
        keep = torch.zeros_like(positive)
        if self.negatives_per_positive > 0:
            # Suppression runs over all examples together; only then is the ratio enforced.
            survivors = self._survivors(image, loss, batch, count=len(loss))
            positives = survivors[positive[survivors]]
            quota = round(self.examples / (1 + self.negatives_per_positive))
            positives = positives[:quota]
            negatives = survivors[~positive[survivors]]
            keep[positives] = True
            keep[negatives[: int(self.negatives_per_positive * len(positives))]] = True
        else:
            keep[self._survivors(image, loss, batch, count=self.examples)] = True
        return keep

    def _survivors(self, image: int, loss: Tensor, batch: DenseBatch, count: int) -> Tensor:
        return suppress(
            loss.masked_fill(batch.labels[image] == IGNORE_LABEL, float("-inf")),
            partial(batch.predicted_boxes, image),
            lambda boxes, scores: nms(boxes, scores.to(boxes.dtype), self.nms_thresh),
            count=count,
        )
