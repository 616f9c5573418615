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
    """Cross entropy over the anchors that `choose` selects."""

    def forward(self, batch: DenseBatch) -> Tensor:
        """Return the sum over the chosen anchors of all images."""
        pairs = sigmoid_cross_entropy(batch.all_logits(), batch.labels, num_classes=batch.num_logits)
        loss = pairs.sum(-1)  # (N, R)
        return torch.where(self.choose(loss, batch), loss, 0.0).sum()

    def example_losses(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield each pair's cross entropy, 0 where its anchor is not chosen."""
        pairs = sigmoid_cross_entropy(batch.all_logits(), batch.labels, num_classes=batch.num_logits)
        chosen = self.choose(pairs.sum(-1), batch)
        yield from batch.split(torch.where(chosen.unsqueeze(-1), pairs, 0.0))

    def choose(self, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return the chosen anchors of a batch, (N, R) bool; the losses (N, R) are read without gradient."""
        raise NotImplementedError


class _AtRatio(_Mining):
    """Base of losses with all positives and a fixed number of negatives for each, image by image.

    An image without positives has no loss.
    """

    def __init__(self, *, num_classes: int, negatives_per_positive: float) -> None:
        super().__init__(num_classes=num_classes)
        check_at_least_0("NEGATIVES_PER_POSITIVE", negatives_per_positive)
        self.negatives_per_positive = negatives_per_positive

    @torch.no_grad()
    def choose(self, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return all positives, and each image's negatives with the highest `score`."""
        negative = self.negatives(batch)
        # The host waits for a GPU here, once for all images.
        numbers = torch.stack([batch.positive.sum(1), negative.sum(1)], dim=1).tolist()
        chosen = batch.positive.clone()
        for image, (positives, negatives) in enumerate(numbers):
            top = top_negatives(
                self.score(image, loss[image], batch),
                negative[image],
                negatives=negatives,
                count=int(self.negatives_per_positive * positives),
            )
            chosen[image].logical_or_(top)
        return chosen

    def negatives(self, batch: DenseBatch) -> Tensor:
        """Return (N, R) bool: the anchors from which negatives are chosen."""
        return batch.labels == self.num_classes

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

    def negatives(self, batch: DenseBatch) -> Tensor:
        """Return the negatives outside the padding."""
        negative = super().negatives(batch)
        for image, row in enumerate(negative):
            row.logical_and_(batch.inside(image))
        return negative


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

    @torch.no_grad()
    def choose(self, loss: Tensor, batch: DenseBatch) -> Tensor:
        """Return each image's anchors with the highest loss that remain after NMS.

        The host waits for a GPU once for all images, and in each NMS, whose result has an unknown length.
        """
        examples = (batch.labels != IGNORE_LABEL).sum(1).tolist()
        chosen = torch.zeros_like(batch.positive)
        for image, number in enumerate(examples):
            kept = self._survivors(image, loss[image], batch, number)
            chosen[image, kept] = self._at_ratio(batch.positive[image, kept])
        return chosen

    def _survivors(self, image: int, loss: Tensor, batch: DenseBatch, number: int) -> Tensor:
        """Return the anchors of an image that remain after NMS by loss, the highest first.

        With a ratio all of them are needed, because it is applied afterwards.
        """
        return suppress(
            loss.masked_fill(batch.labels[image] == IGNORE_LABEL, float("-inf")),
            partial(batch.predicted_boxes, image),
            lambda boxes, scores: nms(boxes, scores.to(boxes.dtype), self.nms_thresh),
            examples=number,
            count=number if self.negatives_per_positive > 0 else self.examples,
        )

    def _at_ratio(self, positive: Tensor) -> Tensor:
        """Return which of an image's survivors are chosen: all, or the highest positives and negatives."""
        if self.negatives_per_positive == 0:
            return torch.ones_like(positive)
        most_positives = round(self.examples / (1 + self.negatives_per_positive))
        positives = positive.sum().clamp(max=most_positives)
        negatives = (self.negatives_per_positive * positives.double()).floor()
        return torch.where(positive, positive.cumsum(0) <= positives, (~positive).cumsum(0) <= negatives)
