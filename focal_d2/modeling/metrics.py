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
    ignored_and_images = torch.stack(
        [(batch.labels == IGNORE_LABEL).sum(), total.new_tensor(len(batch.labels))]
    )
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
    """Sum over examples, one image at a time: all pairs of a large batch would take too much memory.

    Returns:
        The loss of each level (L,) float64, NaN if the loss has no `example_losses`. And (2, 5) float64, a
        row for positives and one for negatives: examples, easy ones, hard ones, loss, loss of hard ones.
    """
    by_level = batch.anchors.new_zeros(len(batch.logits), dtype=torch.float64)
    sides = by_level.new_zeros(2, 5)
    for i in range(len(batch.labels)):
        image = batch.of_image(i)
        labels = image.split(image.labels)
        losses = loss.example_losses(image) or [by_level.new_tensor(math.nan)] * len(labels)
        for j, (p_t, level_labels, part) in enumerate(
            zip(loss.correctness(image), labels, losses, strict=True)
        ):
            by_level[j] += part.sum()
            part = part.expand_as(p_t)
            positive = (level_labels >= 0) & (level_labels < loss.num_classes)
            index, label = positive.nonzero(as_tuple=True), level_labels[positive]
            pair_index = (*index, label if p_t.shape[-1] > 1 else torch.zeros_like(label))
            sides[0] += _side(p_t[pair_index].unsqueeze(-1), part[pair_index].unsqueeze(-1), label)
            # NaN is neither easy nor hard. Masks of all negative pairs would take as long as the loss.
            p_t = p_t.index_put(pair_index, p_t.new_tensor(math.nan))
            part = part.index_put(pair_index, part.new_zeros(()))
            sides[1] += _side(p_t, part, level_labels)
            sides[1, 0] -= len(label)
    return by_level, sides


def _side(p_t: Tensor, loss: Tensor, labels: Tensor) -> Tensor:
    """Sum as in `_sums` (5,) over examples (..., E) of anchors with labels (...)."""
    valid = labels >= 0
    easy, hard = p_t > EASY, p_t < HARD
    numbers = (valid.sum() * p_t.shape[-1], *(x.sum(-1)[valid].sum() for x in (easy, hard)))
    weights = (x.sum() for x in (loss, torch.where(hard, loss, 0.0)))  # those of ignored anchors are 0
    return torch.stack([x.double() for x in (*numbers, *weights)])
