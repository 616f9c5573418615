"""Box losses, and the normaliser: the number that the losses are divided by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from fvcore.nn import smooth_l1_loss
from torch import Tensor, nn

from focal_d2.errors import UserError
from focal_d2.modeling.all_reduce import number_of_ranks, sum_over_ranks
from focal_d2.ops.common import sum_rows
from focal_d2.ops.losses.ghm import harmonise
from focal_d2.ops.losses.iou import ciou_loss, diou_loss, giou_loss

_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}
BOX_LOSSES = ("smooth_l1", *_IOU_LOSSES, "ghm_r")


class BoxLoss(nn.Module):
    """Sum over the positive anchors of smooth L1 (paper), GIoU, DIoU, CIoU or GHM-R.

    smooth_l1 and ghm_r compare (dx, dy, dw, dh), the others decoded boxes. GHM-R (arXiv 1811.05181, eq. 9
    to 11) divides the authentic smooth L1 loss √(d² + μ²) - μ by the density of its gradient norms
    |d| / √(d² + μ²); its histogram is a buffer, and it is not divided by the positives' number.
    """

    histogram: Tensor

    def __init__(
        self,
        *,
        kind: str,
        transform: Box2BoxTransform,
        smooth_l1_beta: float,
        ghm_mu: float,
        ghm_bins: int,
        ghm_momentum: float,
    ) -> None:
        """Choose a loss.

        Args:
            kind: one of `BOX_LOSSES`.
            transform: the R-CNN parametrisation.
            smooth_l1_beta: where smooth L1 turns from square to linear; 0 is plain L1.
            ghm_mu: μ of GHM-R, above 0.
            ghm_bins: unit regions of the gradient norm.
            ghm_momentum: of the moving average of their counts; 0: this batch's.
        """
        super().__init__()
        if not (ghm_mu > 0 and ghm_bins >= 1 and 0 <= ghm_momentum < 1):
            raise UserError(
                f"MODEL.FOCAL.GHM_R: MU is {ghm_mu}, BINS {ghm_bins}, MOMENTUM {ghm_momentum}; above 0, at "
                "least 1 and in [0, 1) are needed"
            )
        self.kind = kind
        self.transform = transform
        self.smooth_l1_beta = smooth_l1_beta
        self.ghm_mu = ghm_mu
        self.ghm_momentum = ghm_momentum
        if kind == "ghm_r":
            self.register_buffer("histogram", torch.zeros(ghm_bins))

    @property
    def divided_by_positives(self) -> bool:
        """Whether the sum is to be divided by the positives' number."""
        return self.kind != "ghm_r"

    def forward(
        self, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Return the sum, which has the same bits on a CPU if rows follow that are not valid.

        Args:
            deltas: (P, 4) predicted (dx, dy, dw, dh).
            anchors: (P, 4) XYXY absolute pixels.
            gt_boxes: (P, 4) XYXY absolute pixels, the box each anchor is matched to.
            valid: (P,) bool, the rows that count; None: all.

        Returns:
            A scalar; 0 with a gradient path if P = 0.
        """
        rows = torch.ones_like(deltas[:, :1], dtype=torch.bool) if valid is None else valid.unsqueeze(1)
        if valid is not None:
            # Rows that do not count compare an anchor with itself: a NaN would reach the gradient.
            deltas, gt_boxes = torch.where(rows, deltas, 0.0), torch.where(rows, gt_boxes, anchors)
        terms = self._terms(deltas, anchors, gt_boxes, rows)
        return sum_rows(terms if valid is None else torch.where(rows, terms, 0.0))

    def _terms(self, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, rows: Tensor) -> Tensor:
        """Return what each row adds to the sum, (P, 1) or (P, 4); `rows` (P, 1) bool are the valid ones."""
        if self.kind in _IOU_LOSSES:
            boxes = self.transform.apply_deltas(deltas, anchors)
            return _IOU_LOSSES[self.kind](boxes, gt_boxes).unsqueeze(1)
        targets = encode(anchors, gt_boxes, self.transform.weights)
        if self.kind == "smooth_l1":
            return smooth_l1_loss(deltas, targets, beta=self.smooth_l1_beta, reduction="none")
        difference = deltas - targets
        root = (difference**2 + self.ghm_mu**2).sqrt()
        norms = (difference / root).abs().detach()
        valid = rows.expand_as(norms)
        density = harmonise(norms, valid, self.histogram, self.ghm_momentum, sum_over_ranks)
        # Times the number of processes, because their gradients are averaged.
        return (root - self.ghm_mu) / density * number_of_ranks()

    def extra_repr(self) -> str:
        return f"kind={self.kind}"


def encode(anchors: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """Return the (dx, dy, dw, dh) that turn anchors into boxes, as `Box2BoxTransform.get_deltas`, to the bit.

    `get_deltas` checks its input, which makes the host wait for a GPU; anchors always have an area.

    Args:
        anchors: (P, 4) XYXY, of positive width and height.
        boxes: (P, 4) XYXY.
        weights: of dx, dy, dw, dh.
    """
    size, target_size = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + 0.5 * target_size) - (anchors[:, :2] + 0.5 * size)
    (x, y), growth = shift.unbind(1), (target_size / size).log().unbind(1)
    width, height = size.unbind(1)
    return torch.stack(
        [
            weights[0] * x / width,
            weights[1] * y / height,
            weights[2] * growth[0],
            weights[3] * growth[1],
        ],
        dim=1,
    )


class LossNormalizer(nn.Module):
    """The number that both losses are divided by.

    "paper": the batch's positive anchors (paper, section 4), at least 1. "ema": their moving average
    with momentum 0.9, starting at 100, as in detectron2. In detectron2 it is a plain attribute that starts
    again on resume, and each process has its own. Here it is a buffer and part of the checkpoint, and it
    counts the batch of all processes, so that their averaged gradients equal those of one process with the
    whole batch. Checkpoints without the buffer load, too.
    """

    MOMENTUM = 0.9
    INITIAL = 100.0

    ema: Tensor

    def __init__(self, *, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("ema", torch.tensor(self.INITIAL))
        self.register_load_state_dict_pre_hook(self._keep_if_absent)
        self._held: Tensor | float | None = None
        self.last: Tensor | float = self.INITIAL  # the last divisor
        self.upstream: Tensor | None = None  # see `expecting`

    @staticmethod
    def _keep_if_absent(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
        assert isinstance(module, LossNormalizer)
        state_dict.setdefault(prefix + "ema", module.ema)

    def forward(self, num_positives: Tensor) -> Tensor | float:
        """Return the divisor, a scalar, for a batch of which this process has `num_positives` (a scalar)."""
        self.last = self._divisor(num_positives) if self._held is None else self._held
        return self.last

    def _divisor(self, num_positives: Tensor) -> Tensor:
        current = sum_over_ranks(num_positives).clamp(min=1).to(self.ema.dtype)
        if self.kind == "ema":
            # In place, because DDP keeps a reference to the buffer; a copy below, because the caller's graph
            # keeps the value.
            self.ema.mul_(self.MOMENTUM).add_(current, alpha=1 - self.MOMENTUM)
            current = self.ema
        return current / number_of_ranks()

    @contextmanager
    def held(self, value: Tensor | float) -> Iterator[None]:
        """Use `value` as the divisor in this block and leave the moving average alone.

        This is for a batch that is computed in parts (accumulation), and for a step that is repeated.
        """
        self._held = value
        try:
            yield
        finally:
            self._held = None

    @contextmanager
    def expecting(self, upstream: Tensor) -> Iterator[None]:
        """Say which gradient (a scalar) backward will give both losses after their division.

        The fused loss on a GPU then writes its gradient in its final size in the forward pass. Results stay
        the same: if another gradient arrives, backward makes a second pass.
        """
        self.upstream = upstream
        try:
            yield
        finally:
            self.upstream = None

    def extra_repr(self) -> str:
        return f"kind={self.kind}"
