"""What the detector minimises: classification loss, box loss, and what divides both.

A classification loss is a module that is called with raw head outputs and integer labels and returns a
sum. That is the whole interface: the detector divides by its normaliser.
"""

from __future__ import annotations

import torch
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor, nn

from focal_d2.ops import sigmoid_focal_loss

BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
NORMALIZERS = ("ema", "paper")


class SigmoidFocalLoss(nn.Module):
    """α-balanced focal loss over all levels (paper, eq. 5); see `focal_d2.ops.sigmoid_focal_loss`."""

    def __init__(self, *, num_classes: int, alpha: float, gamma: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return the sum over all anchors and classes.

        Args:
            logits: a level each, (N, A·K, H, W).
            labels: (N, R) int64, levels one after another, within a level row by row, A anchors a cell.
        """
        per_level = [permute_to_N_HWA_K(x, self.num_classes) for x in logits]  # (N, H·W·A, K)
        level_labels = labels.split([x.shape[1] for x in per_level], dim=1)
        sums = [
            sigmoid_focal_loss(x, y, num_classes=self.num_classes, alpha=self.alpha, gamma=self.gamma)
            for x, y in zip(per_level, level_labels, strict=True)
        ]
        return torch.stack(sums).sum()

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, alpha={self.alpha}, gamma={self.gamma}"


def box_loss(
    deltas: Tensor,
    anchors: Tensor,
    gt_boxes: Tensor,
    *,
    transform: Box2BoxTransform,
    loss_type: str,
    smooth_l1_beta: float,
) -> Tensor:
    """Sum of the box loss over P positive anchors.

    Args:
        deltas: (P, 4) predicted (dx, dy, dw, dh).
        anchors: (P, 4) XYXY absolute pixels.
        gt_boxes: (P, 4) XYXY absolute pixels, the box each anchor is matched to.
        transform: the R-CNN parametrisation.
        loss_type: one of `BOX_LOSSES`; smooth_l1 compares deltas (the paper), the others decoded boxes.
        smooth_l1_beta: where smooth L1 turns from square to linear; 0 is plain L1.

    Returns:
        A scalar; 0 with a gradient path if P = 0.
    """
    if loss_type == "smooth_l1":
        targets = transform.get_deltas(anchors, gt_boxes)
        return smooth_l1_loss(deltas, targets, beta=smooth_l1_beta, reduction="sum")
    iou_losses = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}
    boxes = transform.apply_deltas(deltas, anchors)
    return iou_losses[loss_type](boxes, gt_boxes, reduction="sum")


class LossNormalizer(nn.Module):
    """The number that both losses are divided by.

    "paper": this batch's positive anchors (paper, section 4), at least 1. "ema": their moving average
    with momentum 0.9, starting at 100, as detectron2 does. There it is a plain attribute and starts anew
    on resume; here it is a buffer and part of the checkpoint. Checkpoints without it load. As there, each
    of several processes keeps its own; the checkpoint has the first one's.
    """

    MOMENTUM = 0.9
    INITIAL = 100.0

    ema: Tensor

    def __init__(self, *, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("ema", torch.tensor(self.INITIAL))
        self.register_load_state_dict_pre_hook(self._keep_if_absent)

    @staticmethod
    def _keep_if_absent(module: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
        assert isinstance(module, LossNormalizer)
        state_dict.setdefault(prefix + "ema", module.ema)

    def forward(self, num_positives: Tensor) -> Tensor:
        """Return the divisor, a scalar, for a batch with `num_positives` (a scalar) positive anchors."""
        current = num_positives.clamp(min=1).to(self.ema.dtype)
        if self.kind == "paper":
            return current
        # In place, because DDP keeps a reference to the buffer; a copy, because the caller's graph keeps
        # the value.
        self.ema.mul_(self.MOMENTUM).add_(current, alpha=1 - self.MOMENTUM)
        return self.ema.clone()

    def extra_repr(self) -> str:
        return f"kind={self.kind}"
