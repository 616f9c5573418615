"""Losses over a selection of anchors: random sampling, OHEM and SSD's hard negative mining."""

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
    """Cross entropy over the anchors that `choose` selects in each image."""

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over the chosen anchors of all images."""
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
        """Return the chosen anchors as a mask (N, R) bool."""
        chosen = [self.choose(image, row, batch) for image, row in enumerate(loss)]
        return torch.stack(chosen) if chosen else torch.zeros_like(loss, dtype=torch.bool)

    def choose(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return the chosen anchors of an image, (R,) bool.

        Args:
            image: index in the batch.
            loss: (R,) loss of each anchor.
            batch: all images.
        """
        raise NotImplementedError


class _AtRatio(_Mining):
    """Base of losses with all positives and a fixed number of negatives for each, image by image.

    An image without positives has no loss.
    """

    def __init__(self, *, num_classes: int, negatives_per_positive: float) -> None:
        super().__init__(num_classes=num_classes)
        check_at_least_0("NEGATIVES_PER_POSITIVE", negatives_per_positive)
        self.negatives_per_positive = negatives_per_positive

    def choose(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return all positives, and the negatives with the highest `score`."""
        positive = batch.positive[image]
        count = int(self.negatives_per_positive * int(positive.sum()))
        negative = self.negatives(image, batch)
        return positive | top_negatives(self.score(image, loss, batch), negative, count=count)

    def negatives(self, image: int, batch: DenseBatch) -> Tensor:
        """Return (R,) bool: the anchors of an image from which negatives are chosen."""
        return batch.labels[image] == self.num_classes

    def score(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return a number (R,) for each anchor of an image, from its losses (R,); the highest are chosen."""
        raise NotImplementedError


@register_loss("hard_negative_mining")
class HardNegativeMining(_AtRatio):
    """All positives and the negatives with the highest loss, in a ratio (SSD, arXiv 1512.02325)."""

    def score(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return the loss."""
        return loss


@register_loss("random_sampling")
class RandomSampling(_AtRatio):
    """All positives and random negatives, in a ratio, as two-stage detectors do (paper, section 2).

    The random numbers are computed from the image's seed and from each anchor's level, cell and index in the
    cell. The loader derives the seed from the number of the draw. Anchors in the padding are never chosen. So
    the negatives do not depend on the padded size, on the device, or on the number of processes, workers and
    parts of a batch, and a resumed training chooses the same ones.

    Departure from the region proposal network of Faster R-CNN: that samples 256 anchors of an image, at most
    half of them positives, and replaces missing positives by negatives.
    """

    samples = True

    def score(self, image: int, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return random numbers."""
        return random_numbers(batch.seeds[image], batch.positions())

    def negatives(self, image: int, batch: DenseBatch) -> Tensor:
        """Return the negatives outside the padding."""
        return super().negatives(image, batch) & batch.inside(image)


@register_loss("ohem")
class OnlineHardExampleMining(_Mining):
    """The anchors with the highest loss in each image after NMS on predicted boxes (paper, table 1d).

    Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors with Online Hard Example Mining",
    CVPR 2016. With `negatives_per_positive` above 0, the anchors that remain after NMS are chosen in that
    ratio (the paper's "OHEM 1:3"); with 0, by their loss alone.
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
        """Return the anchors with the highest loss that remain after NMS."""
        positive = batch.positive[image]
        keep = torch.zeros_like(positive)
        if self.negatives_per_positive > 0:
            # NMS is computed over all anchors together, before the ratio is applied.
            survivors = self._survivors(image, loss, batch, count=len(loss))
            positives = survivors[positive[survivors]]
            most_positives = round(self.examples / (1 + self.negatives_per_positive))
            positives = positives[:most_positives]
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
