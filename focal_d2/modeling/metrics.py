"""Metrics of training in addition to its losses; docs/monitoring.md explains each.

Shapes: N images, L levels, r anchors of an image on a level, E examples an anchor: K classes with a sigmoid,
1 with a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor

from focal_d2.modeling.losses import ClassificationLoss, DenseBatch
from focal_d2.ops import IGNORE_LABEL

# Metrics are computed only when detectron2's writers read them: every 20 iterations.
PERIOD = 20
# An example is easy above, hard below this p_t. From 0.9 on focal loss (γ = 2) is 100 times below cross
# entropy; the paper calls examples above 0.5 well classified (section 3.2).
EASY, HARD = 0.9, 0.5
# Examples in memory at a time: those of an image of 800 × 1344 pixels with 80 classes, 64 MiB in float32.
_MOST_PAIRS = 1 << 24


def put_metrics(
    loss: ClassificationLoss, batch: DenseBatch, loss_cls: Tensor, *, levels: Sequence[str]
) -> None:
    """Put an iteration's metrics into detectron2's event storage, if there is one and they are due.

    This draws no random numbers and changes no state. The metrics are those of all processes.

    Args:
        loss: the loss that was computed on this batch.
        batch: its input.
        loss_cls: the classification loss as it is minimised, a scalar.
        levels: L names.
    """
    if not has_event_storage() or (get_event_storage().iter + 1) % PERIOD:
        return
    storage = get_event_storage()
    for name, value in measure(loss, batch, loss_cls, levels=levels).items():
        # Undefined metrics, such as shares of no positives, are left out: JSON has no NaN.
        if math.isfinite(value):
            storage.put_scalar(name, value, smoothing_hint=False)


@torch.no_grad()
def measure(
    loss: ClassificationLoss, batch: DenseBatch, loss_cls: Tensor, *, levels: Sequence[str]
) -> dict[str, float]:
    """Compute the metrics of all processes' batches; see `put_metrics`. Undefined metrics are NaN."""
    by_level, sides = _sums(loss, batch)
    # The examples' losses may lack a common factor, such as the normaliser.
    total = by_level.sum()
    scale = torch.where(total == 0, 0.0, loss_cls.double() / total)
    sides[:, 3:] *= scale
    images = total.new_full((), len(batch.labels))
    ignored_and_images = torch.stack([(batch.labels == IGNORE_LABEL).sum(), images])
    sums = torch.cat([ignored_and_images, by_level * scale, sides.flatten()])
    processes = comm.get_world_size()
    if processes > 1:
        torch.distributed.all_reduce(sums)
    ignored, images, *parts = sums.tolist()
    metrics = {"num_ignored_anchors": _share(ignored, images)}
    for name, part in zip(levels, parts, strict=False):
        metrics[f"level/{name}"] = part / processes
    weights = []
    for name, start in (("positive", len(levels)), ("negative", len(levels) + 5)):
        count, easy, hard, weight, weight_of_hard = parts[start : start + 5]
        metrics[f"examples/{name}_easy"] = _share(easy, count)
        metrics[f"examples/{name}_hard"] = _share(hard, count)
        metrics[f"weight/{name}_hard"] = _share(weight_of_hard, weight)
        weights.append(weight)
    metrics["weight/positive"] = _share(weights[0], sum(weights))
    return metrics


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _sums(loss: ClassificationLoss, batch: DenseBatch) -> tuple[Tensor, Tensor]:
    """Sum over examples, a few images at a time: all pairs of a large batch would take too much memory.

    Returns:
        The loss of each level (L,) float64, NaN if the loss has no `example_losses`. And (2, 5) float64, a
        row for positives and one for negatives: examples, easy ones, hard ones, loss, loss of hard ones.
    """
    by_level = batch.anchors.new_zeros(len(batch.logits), dtype=torch.float64)
    sides = by_level.new_zeros(2, 5)
    for part in batch.in_parts(pairs=_MOST_PAIRS):
        labels = part.split(part.labels)
        losses = loss.example_losses(part) or [by_level.new_full((), math.nan)] * len(labels)
        levels = torch.stack(
            [
                _sums_of_level(*level, num_classes=loss.num_classes)
                for level in zip(loss.correctness(part), losses, labels, strict=True)
            ]
        )
        by_level += levels[:, :, 3].sum(1)
        sides += levels.sum(0)
    return by_level, sides


def _sums_of_level(p_t: Tensor, losses: Tensor, labels: Tensor, *, num_classes: int) -> Tensor:
    """Sum as in `_sums`, (2, 5), over p_t and losses (N, r, E) of the examples of anchors with labels (N, r).

    Nothing is selected by a mask: the length of the result would have to be read from a GPU.
    """
    losses = losses.expand_as(p_t)
    of_class = labels.clamp(0, p_t.shape[-1] - 1).unsqueeze(-1)  # the positive example of a positive anchor
    positive = _sums_of_anchors(p_t.gather(-1, of_class), losses.gather(-1, of_class))
    valid = labels >= 0
    positives = torch.where(valid & (labels < num_classes), positive, 0.0).sum((1, 2), dtype=torch.float64)
    total = torch.where(valid, _sums_of_anchors(p_t, losses), 0.0).sum((1, 2), dtype=torch.float64)
    return torch.stack([positives, total - positives])


def _sums_of_anchors(p_t: Tensor, losses: Tensor) -> Tensor:
    """Sum over the examples (N, r, E) of each anchor, (5, N, r); NaN is neither easy nor hard."""
    hard = p_t < HARD
    number = losses.new_full(p_t.shape[:-1], p_t.shape[-1])
    weights = losses.sum(-1), torch.where(hard, losses, 0.0).sum(-1)
    return torch.stack([number, (p_t > EASY).sum(-1), hard.sum(-1), *weights])
