"""The targets of a batch: what each anchor must predict.

Shapes: N images, R anchors an image (all levels), K classes, M boxes of an image, B of all images, P positive
anchors of the batch. Boxes are XYXY in absolute pixels. Labels are int64: [0, K) a class, K background, -1
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor
from torch.nn import functional as F

from focal_d2.errors import UserError
from focal_d2.modeling.anchors import Anchors
from focal_d2.modeling.assigners import Assigner
from focal_d2.ops import IGNORE_LABEL
from focal_d2.ops.matching.match import Matches, inside_regions

# Rows that `TargetBuffers` begins with.
_LEAST_ROWS = 256


class Positives(NamedTuple):
    """The positive anchors, in the order of `AnchorTargets.positive.nonzero()`, and perhaps more rows."""

    image: Tensor  # (P,) int64
    anchor: Tensor  # (P,) int64
    gt_boxes: Tensor  # (P, 4) float
    valid: Tensor | None = None  # (P,) bool: the rows that are positive anchors; None: all


class AnchorTargets(NamedTuple):
    """The targets of all anchors of a batch."""

    labels: Tensor  # (N, R) int64
    positive: Tensor  # (N, R) bool
    matched: Tensor  # (N, R) int64: index into `boxes`; valid for positive anchors only
    boxes: Tensor  # (B, 4) float
    num_positives: Callable[[], int]  # P
    padded: Positives | None = None  # the positives, if `TargetBuffers` has them

    def positives(self) -> Positives:
        """Return the positive anchors. Their number is counted before, so that the host waits for no GPU."""
        if self.padded is not None:
            return self.padded
        if self.positive.is_cuda:
            image, anchor = torch.nonzero_static(self.positive, size=self.num_positives()).unbind(1)
        else:
            image, anchor = self.positive.nonzero(as_tuple=True)
        return Positives(image, anchor, self.boxes[self.matched[image, anchor]])

    def padded_positives(self, rows: int) -> Positives:
        """Return the positive anchors, at most `rows`, and after them rows that are not valid.

        The host does not wait for a GPU, and no shape depends on the number of positives.
        """
        image, anchor = torch.nonzero_static(self.positive, size=rows, fill_value=-1).unbind(1)
        valid = image >= 0
        # Different anchors: gradients of one and the same would be added one after another.
        unused = torch.arange(rows, device=anchor.device).remainder(self.positive.shape[1])
        image, anchor = image.clamp(min=0), torch.where(valid, anchor, unused)
        box = torch.where(valid, self.matched[image, anchor], len(self.boxes))
        return Positives(image, anchor, F.pad(self.boxes, (0, 0, 0, 1))[box], valid)


class TargetBuffers:
    """Keeps the targets of batches of one shape in the same tensors, as a CUDA graph needs them.

    Positives fill the first rows of tensors whose length is a power of two. It grows when a batch has more of
    them. The targets of a batch are lost with the next batch, so backward must have run before.
    """

    def __init__(self) -> None:
        self.rows = _LEAST_ROWS
        self._kept: dict[str, Tensor] = {}

    def hold(self, targets: AnchorTargets) -> AnchorTargets:
        """Copy a batch's targets. The host waits for a GPU as in `AnchorTargets.positives`."""
        self.rows = max(self.rows, 1 << (targets.num_positives() - 1).bit_length())
        padded = targets.padded_positives(self.rows)._asdict()
        return targets._replace(
            labels=self._hold("labels", targets.labels),
            positive=self._hold("positive", targets.positive),
            padded=Positives(**{name: self._hold(name, x) for name, x in padded.items()}),
        )

    def _hold(self, name: str, x: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.device) != (x.shape, x.device):
            kept = self._kept[name] = torch.empty_like(x)
        return kept.copy_(x)


@torch.no_grad()
def label_anchors(
    anchors: Anchors,
    gt_instances: list[Instances],
    assigner: Assigner,
    num_classes: int,
    *,
    regions: Sequence[Tensor | None],
    region_share: float,
    use_kernels: bool,
) -> AnchorTargets:
    """Match every anchor to at most one box, as the assigner decides.

    Anchors without a box inside an ignored region (a crowd, or an object too difficult to count) are ignored,
    not background: COCO's evaluation ignores detections in such regions too. detectron2 has no regions.

    Args:
        anchors: of the batch's image shape.
        gt_instances: N × `Instances`, on any device, with gt_boxes (M, 4) and gt_classes (M); M may be 0.
        assigner: which anchors are positive, negative or ignored.
        num_classes: K.
        regions: N × (G, 4) boxes of an image's regions, on any device, or None.
        region_share: an anchor is in a region that covers at least this share of its area.
        use_kernels: on a GPU with Triton, label the whole batch with the assigner's kernels, if it has any;
            the labels are the same.

    Raises:
        UserError: for a class that the model does not have. Classes on a GPU are not checked: the host would
            have to wait for them.
    """
    device = anchors.boxes.device
    boxes, classes = _boxes_of(gt_instances, num_classes, device)
    counts = [len(x) for x in gt_instances]
    label_batch = assigner.batch_kernels(anchors.boxes) if use_kernels else None
    if label_batch is not None and boxes.dtype == torch.float32:
        labels, positive, matched = label_batch(
            boxes,
            classes,
            counts,
            regions,
            anchors.boxes,
            num_classes=num_classes,
            region_share=region_share,
        )
        return AnchorTargets(labels, positive, matched, boxes, _count(positive))
    labels = torch.full((len(counts), len(anchors.boxes)), num_classes, dtype=torch.int64, device=device)
    for of_image, ignored in zip(labels, regions, strict=True):
        if ignored is not None and len(ignored):
            inside = inside_regions(anchors.boxes, ignored.to(device, non_blocking=True), share=region_share)
            of_image.masked_fill_(inside, IGNORE_LABEL)
    positive, matched = _match_images(
        lambda of_image: assigner.assign(of_image, anchors), boxes.split(counts), classes, labels
    )
    return AnchorTargets(labels, positive, matched, boxes, _count(positive))


def _match_images(
    match: Callable[[Tensor], Matches], boxes: Sequence[Tensor], classes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the labels (N, R) of anchors with a box; return `positive` and `matched` of `AnchorTargets`."""
    positive = torch.zeros_like(labels, dtype=torch.bool)
    matched = torch.zeros_like(labels)
    first = 0
    for i, of_image in enumerate(boxes):
        if len(of_image) == 0:
            continue
        box, outcome = match(of_image)
        torch.add(box, first, out=matched[i])
        torch.eq(outcome, 1, out=positive[i])
        labels[i].masked_fill_(outcome == -1, IGNORE_LABEL)
        torch.where(positive[i], classes[matched[i]], labels[i], out=labels[i])
        first += len(of_image)
    return positive, matched


def _boxes_of(gt_instances: list[Instances], num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, 4) and classes (B,) of all images on the device; see `label_anchors`."""
    corners, labels_of = zip(*[(x.gt_boxes.tensor, x.gt_classes) for x in gt_instances], strict=True)
    boxes, classes = torch.cat(corners), torch.cat(labels_of)
    if not classes.is_cuda and len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise UserError(
            f"a box has class {int(classes.min())} or {int(classes.max())}; "
            f"MODEL.RETINANET.NUM_CLASSES {num_classes} means classes 0 to {num_classes - 1}"
        )
    return boxes.to(device, non_blocking=True), classes.to(device, non_blocking=True)


def _count(positive: Tensor) -> Callable[[], int]:
    """Count the positives. On a GPU, only the call of the returned function waits for the number."""
    number = positive.sum()
    if not number.is_cuda:
        return number.item  # type: ignore[return-value]
    host = torch.empty((), dtype=number.dtype, pin_memory=True)
    host.copy_(number, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(number.device))  # the copy's, which may not be the current GPU's

    def wait() -> int:
        arrived.synchronize()
        return int(host)

    return wait
