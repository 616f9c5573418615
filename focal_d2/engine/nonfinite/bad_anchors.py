"""Find the anchors that make a loss, or its gradient, not finite.

Every loss is a sum over anchors. The search computes the loss of half of the anchors. If it is not finite,
the search divides this half again, until single anchors are left.

Shapes: R anchors an image, C logits an anchor, E anchors that are not ignored, P positive ones. Boxes are
XYXY.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

from focal_d2.engine.nonfinite.facts import BadAnchor, ImageName
from focal_d2.modeling import FocalRetinaNet
from focal_d2.modeling.losses import DenseBatch, gather_deltas, level_ranges
from focal_d2.ops import IGNORE_LABEL

# Limit on the sums for each loss. So many find the first anchor and about a hundred others in a second.
_MOST_SUMS = 500


class _Anchors(NamedTuple):
    """Anchors of the batch, in the order of images and levels."""

    image: list[int]
    anchor: list[int]
    complete: bool


def find_bad_loss_anchors(
    model: FocalRetinaNet, dense: DenseBatch, names: Sequence[ImageName], instances: Sequence[Instances]
) -> list[BadAnchor]:
    """Return, for each loss, the first anchor whose own loss is not finite.

    A loss has no such anchor if it is finite, or if every anchor's loss is finite and only their sum is not.

    Args:
        model: the detector. The search may change the buffers of its losses.
        dense: what the classification loss got in the step.
        names: of the N images.
        instances: N, the images' objects.
    """
    bad_anchors = []
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        for term, anchors, value_of in (
            ("loss_cls", *_search_classification(model, dense)),
            ("loss_box_reg", *_search_boxes(model, dense)),
        ):
            if anchors.anchor:
                bad_anchors.append(_describe(model, dense, names, instances, term, anchors, value_of(0)))
    return bad_anchors


def find_bad_gradient_anchors(
    model: FocalRetinaNet,
    dense: DenseBatch,
    gradients: Sequence[Tensor | None],
    names: Sequence[ImageName],
    instances: Sequence[Instances],
) -> list[BadAnchor]:
    """Return the first anchor whose logits, and the first whose deltas, have a gradient that is not finite.

    Args:
        model: the detector that computed the outputs.
        dense: what the classification loss got in the step.
        gradients: of L logits, then of L deltas, in their shapes; None where there is none.
        names: of the N images.
        instances: N, the images' objects.
    """
    bad_anchors = []
    levels = len(dense.logits)
    for term, outputs, of_outputs, per_anchor in (
        ("the gradient of the logits", dense.logits, gradients[:levels], dense.num_logits),
        ("the gradient of the deltas", dense.deltas, gradients[levels:], 4),
    ):
        filled = [torch.zeros_like(x) if g is None else g for x, g in zip(outputs, of_outputs, strict=True)]
        values = dense._replace(logits=filled, num_logits=per_anchor).all_logits()  # (N, R, per_anchor)
        image, anchor = (~values.isfinite()).any(2).nonzero(as_tuple=True)
        if len(anchor):
            row = values[image[0], anchor[0]]
            anchors = _Anchors(image.tolist(), anchor.tolist(), complete=True)
            value = float(row[~row.isfinite()][0])
            bad_anchors.append(_describe(model, dense, names, instances, term, anchors, value))
    return bad_anchors


def _search_classification(
    model: FocalRetinaNet, dense: DenseBatch
) -> tuple[_Anchors, Callable[[int], float]]:
    images: list[int] = []
    anchors: list[int] = []
    complete = True
    # One image at a time: there may be no memory for a copy of all logits.
    for i in range(len(dense.labels)):
        counted = (dense.labels[i] != IGNORE_LABEL).nonzero().squeeze(1)
        sums = max(50, _MOST_SUMS // len(dense.labels))
        bad, is_all = _bisect(len(counted), _is_bad_part(model, dense, i, counted), sums)
        complete &= is_all
        images += [i] * len(bad)
        anchors += counted[bad].tolist()

    def value_of(n: int) -> float:
        chosen = torch.tensor([anchors[n]], device=dense.labels.device)
        return float(model.cls_loss(_part(dense, images[n], chosen)))

    return _Anchors(images, anchors, complete), value_of


def _is_bad_part(
    model: FocalRetinaNet, dense: DenseBatch, image: int, counted: Tensor
) -> Callable[[int, int], bool]:
    whole = _part(dense, image, counted)

    def is_bad(start: int, stop: int) -> bool:
        return not bool(model.cls_loss(_slice(whole, start, stop)).isfinite())

    return is_bad


def _part(dense: DenseBatch, image: int, chosen: Tensor) -> DenseBatch:
    """Return the chosen anchors (E,) of an image as a batch of one image, with one level of one row."""
    logits = torch.cat(
        [
            x[image].unflatten(0, (-1, dense.num_logits)).permute(2, 3, 0, 1).flatten(0, 2)
            for x, _, _ in level_ranges(dense.logits, dense.num_logits)
        ]
    )  # (R, C)
    of_image = dense.image == image
    gt_boxes = dense.gt_boxes.new_zeros(len(dense.anchors), 4)
    gt_boxes[dense.anchor[of_image]] = dense.gt_boxes[of_image]
    deltas = gather_deltas(dense.deltas, torch.full_like(chosen, image), chosen)
    return _as_batch(
        dense,
        logits[chosen],
        dense.labels[image, chosen],
        dense.positive[image, chosen],
        gt_boxes[chosen],
        deltas,
        dense.anchors[chosen],
    )


def _slice(whole: DenseBatch, start: int, stop: int) -> DenseBatch:
    positive = (whole.anchor >= start) & (whole.anchor < stop)  # positives of the slice
    return whole._replace(
        logits=[whole.logits[0][..., start:stop].contiguous()],
        labels=whole.labels[:, start:stop],
        positive=whole.positive[:, start:stop],
        image=whole.image[positive],
        anchor=whole.anchor[positive] - start,
        gt_boxes=whole.gt_boxes[positive],
        deltas=[whole.deltas[0][..., start:stop].contiguous()],
        anchors=whole.anchors[start:stop],
    )


def _as_batch(
    dense: DenseBatch,
    logits: Tensor,
    labels: Tensor,
    positive: Tensor,
    gt_boxes: Tensor,
    deltas: Tensor,
    anchors: Tensor,
) -> DenseBatch:
    """Lay out E anchors as (1, C, 1, E); `gt_boxes` (E, 4) counts where positive."""
    index = positive.nonzero().squeeze(1)
    return dense._replace(
        logits=[logits.t()[None, :, None].contiguous()],
        labels=labels[None],
        positive=positive[None],
        image=torch.zeros_like(index),
        anchor=index,
        gt_boxes=gt_boxes[index],
        deltas=[deltas.t()[None, :, None].contiguous()],
        anchors=anchors,
    )


def _search_boxes(model: FocalRetinaNet, dense: DenseBatch) -> tuple[_Anchors, Callable[[int], float]]:
    deltas = gather_deltas(dense.deltas, dense.image, dense.anchor)
    anchors = dense.anchors[dense.anchor]

    def loss(start: int, stop: int) -> Tensor:
        return model.box_loss(deltas[start:stop], anchors[start:stop], dense.gt_boxes[start:stop])

    bad, complete = _bisect(
        len(deltas), lambda start, stop: not bool(loss(start, stop).isfinite()), _MOST_SUMS
    )
    bad_anchors = _Anchors(dense.image[bad].tolist(), dense.anchor[bad].tolist(), complete)
    return bad_anchors, lambda n: float(loss(bad[n], bad[n] + 1))


def _bisect(count: int, is_bad: Callable[[int, int], bool], sums: int) -> tuple[list[int], bool]:
    """Return the elements that are bad by themselves, in ascending order, and whether the list is complete.

    Args:
        count: number of elements.
        is_bad: computes whether the sum over [start, stop) is not finite.
        sums: how often `is_bad` is called at most.
    """
    bad: list[int] = []
    todo = [(0, count)] if count else []
    for _ in range(sums):
        if not todo:
            break
        start, stop = todo.pop()
        if not is_bad(start, stop):
            continue
        if stop - start == 1:
            bad.append(start)
            continue
        middle = (start + stop) // 2
        todo += [(middle, stop), (start, middle)]
    return bad, not todo


def _describe(
    model: FocalRetinaNet,
    dense: DenseBatch,
    names: Sequence[ImageName],
    instances: Sequence[Instances],
    term: str,
    anchors: _Anchors,
    value: float,
) -> BadAnchor:
    """Describe the first of the bad anchors."""
    image, anchor = anchors.image[0], anchors.anchor[0]
    shapes = model.backbone.output_shape()
    ranges = list(level_ranges(dense.logits, dense.num_logits))
    level = next(n for n, (_, start, stop) in enumerate(ranges) if start <= anchor < stop)
    x, start, _ = ranges[level]
    per_cell = x.shape[1] // dense.num_logits
    row, column = divmod((anchor - start) // per_cell, x.shape[3])
    part = _part(dense, image, torch.tensor([anchor], device=dense.labels.device))
    label = int(part.labels[0, 0])
    box = part.gt_boxes[0] if len(part.gt_boxes) else None
    feature = model.head_in_features[level]
    return BadAnchor(
        term=term,
        image=names[image],
        level=feature,
        stride=int(shapes[feature].stride),
        cell=(column, row),
        anchor=part.anchors[0].tolist(),
        label={IGNORE_LABEL: "ignored", model.num_classes: "background"}.get(label, f"class {label}"),
        matched_index=None if box is None else _index_of(box, instances[image]),
        matched_box=None if box is None else box.tolist(),
        logits=part.logits[0].flatten().tolist(),
        deltas=part.deltas[0].flatten().tolist(),
        value=value,
        alike=len(anchors.anchor),
        complete=anchors.complete,
    )


def _index_of(box: Tensor, instances: Instances) -> int | None:
    boxes = instances.gt_boxes.tensor.to(box.device)
    same = ((boxes == box) | (boxes.isnan() & box.isnan())).all(1).nonzero()
    return int(same[0]) if len(same) else None
